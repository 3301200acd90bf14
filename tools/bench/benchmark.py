"""What a benchmark is: one class says everything that `addp bench` and its report need to know of it.

`Benchmark` evaluates what exists, `Transfer` trains each arm over a small grid and seeds. To add one, write a subclass
in `benchmarks/` and name it in `benchmarks/__init__.py`: its keys, datasets, commands, scores, columns and paper
numbers come from there. docs/extending.md shows an example.
"""

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import yaml

import addp_core
from addp_core.base.errors import UserError
from tools.bench import sweep
from tools.bench.arguments import as_arguments, digests_of_files, result_settings, verb_recipe
from tools.bench.arms import PRETRAINED, Arm, open_arm
from tools.bench.inputs import Inputs
from tools.bench.metric import Metric
from tools.bench.recipe import BEST_RUN, BenchRecipe, EvaluationKeys, TransferKeys
from tools.bench.step import PREDICTIONS, SWEEP, Command, Step

if TYPE_CHECKING:  # `addp report` does without torch
    from addp_core.data.sources import ImageSource

Settings: TypeAlias = dict[str, Any]  # key of a verb -> value
Scores: TypeAlias = dict[str, list[float | None]]  # metric -> a value for each seed, None if its run failed


@dataclass(frozen=True)
class Dataset:
    """A dataset.

    Attributes:
        key: Its key below `data` in the recipe.
        help: The help of that key.
        check: check(path, recipe, readers) raises UserError if the folder is not as expected; readers are those of the
            benchmarks to run that read the dataset, perhaps none. It returns the validation images, of which the bench
            takes a few samples to predict on, or None if no benchmark predicts on them.
    """

    key: str
    help: str
    check: "Callable[[str, BenchRecipe, Sequence[Benchmark]], ImageSource | None]"


@dataclass
class Outcome:
    """What a step that has run leaves in bench.json.

    Attributes:
        setting: The best setting of the grid, or the sampling of generated images.
        scores: metric -> a value for each seed.
        chance: metric -> chance level.
        runs: seed -> run folder.
        images: Images for the report.
        grid: The score of each run of a sweep.
        notes: Remarks of a sweep for the reader.
        rows: Of an evaluation of several settings, the setting and the scores of each.
        details: How it was measured: name -> description.
    """

    setting: Settings
    scores: Mapping[str, Sequence[float | None]]
    chance: Mapping[str, float]
    runs: Mapping[int, Path]
    images: Sequence[Path] = ()
    grid: Mapping[str, float | None] | None = None
    notes: Sequence[str] | None = None
    rows: Sequence[Mapping[str, Any]] | None = None
    details: Mapping[str, str] | None = None

    def entry(self, step: Step) -> dict[str, Any]:
        """Return it as step.json and bench.json have it, with paths relative to the bench folder."""
        optional = {"grid": self.grid, "notes": self.notes, "rows": self.rows, "details": self.details}
        return {
            "seeds": step.seeds,
            "setting": self.setting,
            **{key: value for key, value in optional.items() if value is not None},
            "scores": self.scores,
            "chance": self.chance,
            "runs": {str(seed): str(path.relative_to(step.out)) for seed, path in self.runs.items()},
            "pictures": [str(path.relative_to(step.out)) for path in self.images],
        }


class Benchmark(ABC):
    """A benchmark that evaluates what exists: a checkpoint, or the runs of another benchmark.

    Attributes:
        name: Its section in the recipe, its folder, and its key in bench.json.
        title: The heading of its section in the report.
        about: The paragraph below the heading.
        task: The task of `addp doctor` whose packages it needs.
        packages: Further packages that it needs.
        Keys: The dataclass of its section in the recipe.
        datasets: The datasets that it reads, at `data.<key>` of the recipe.
        builds_on: The benchmarks whose runs it evaluates.
        needs_labels: Whether it reads the labels of its images.
        of_paper: Whether the paper has it; a transfer that is not of the paper runs only where its recipe is named.
        metrics: Its metrics, in the order of the report's columns.
        published: model -> metric -> value in the ADDP paper, in the order of the report's rows.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    task: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    Keys: ClassVar[type[EvaluationKeys]] = EvaluationKeys
    datasets: ClassVar[tuple[Dataset, ...]]
    builds_on: ClassVar[tuple[str, ...]] = ()
    needs_labels: ClassVar[bool] = False
    of_paper: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]]
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {}

    # ---------------------------------------------------------------- planning

    @abstractmethod
    def add_commands(
        self, step: Step, settings: Settings, paths: Mapping[str, str], recipe: BenchRecipe, inputs: Inputs
    ) -> None:
        """Fill in a step: its commands, its `needs`, and by `set_basis` the settings which decide its result.

        Args:
            step: The step to fill in.
            settings: `set` in the recipe's section of the benchmark.
            paths: Path of each dataset that is given.
            recipe: The recipe of the bench.
            inputs: Digests and sample images of the datasets.

        Raises:
            UserError: If a verb refuses the settings.
        """

    @staticmethod
    def set_basis(step: Step, verb_recipe: Any) -> None:
        """Let a step's results depend on the recipe of its verb, and on the content of the files that it names."""
        step.basis["settings"] = result_settings(verb_recipe)
        step.files = digests_of_files(verb_recipe, step.out, known=step.arm.settings)

    def unsuitable(self, arm: Arm) -> str:
        """Return why an arm cannot take part, "" if it can."""
        return ""

    def seeds(self, recipe: BenchRecipe) -> list[int]:
        return recipe.seeds_of(self.name)

    def paths(self, recipe: BenchRecipe) -> dict[str, str]:
        """Return the paths of its datasets that are given."""
        return {dataset.key: path for dataset in self.datasets if (path := recipe.data.path(dataset.key))}

    def is_of_interest(self, recipe: BenchRecipe) -> bool:
        """Return whether a bench has steps of it although nothing names the benchmark."""
        return True

    def missing_key(self, recipe: BenchRecipe) -> str:
        """Return the key, such as that of a dataset, without which the benchmark does not run and which is not given.

        "" if all of them are.
        """
        return next((f"data.{dataset.key}" for dataset in self.datasets if not recipe.data.path(dataset.key)), "")

    def plan(self, arm: Arm, recipe: BenchRecipe, inputs: Inputs) -> Step:
        """Return the step of an arm. Raises UserError if the settings do not fit the verb."""
        section = recipe.section(self.name)
        step = Step(self.name, arm, Path(recipe.out), self.seeds(recipe), processes=recipe.bench.processes)
        step.needs += [arm.pretrained_by] if arm.pretrained_by else []
        if section.arms and arm.name not in section.arms:
            step.left_out = f"not one of {self.name}.arms"
        elif missing := self.missing_key(recipe):
            step.left_out, step.lacks_key = f"{missing} is not given", True
        elif problem := arm.problem or next(filter(None, map(inputs.problems.get, self.paths(recipe))), ""):
            step.left_out = problem
        else:
            step.left_out = self.unsuitable(arm)
        if step.left_out:
            return step
        self._check_seeds(step)
        paths = self.paths(recipe)
        settings = {key: _resolve_best_run(value, step, recipe) for key, value in section.set.items()}
        self.add_commands(step, settings, paths, recipe, inputs)
        step.basis |= {
            "addp": addp_core.__version__,
            "model": arm.digest,
            "data": {key: inputs.digests[path] for key, path in paths.items()},
        }
        return step

    def _check_seeds(self, step: Step) -> None:
        """Raise UserError if an arm that was pretrained with several seeds lacks one of the step's."""
        pretrained = step.arm.seeds if step.arm.init == PRETRAINED else ()
        missing = [seed for seed in step.seeds if seed not in pretrained] if len(pretrained) > 1 else []
        if missing:
            raise UserError(
                f"{self.name}.seeds: found {missing[0]}, expected seeds of pretrain.seeds: {list(pretrained)}; each "
                "takes the pretraining of the same seed"
            )

    # ---------------------------------------------------------------- results

    @abstractmethod
    def read_outcome(self, step: Step) -> Outcome:
        """Return what a step that has run has measured."""

    def complete_scores(self, scores: Scores) -> Scores:
        """Add the metrics that follow from others."""
        return scores

    def complete_chance(self, chance: Mapping[str, float]) -> Mapping[str, float]:
        """Add the chance levels that follow from others."""
        return chance

    # ---------------------------------------------------------------- comparison with the paper

    def comparable(self, metrics: Sequence[Metric]) -> bool:
        """Check whether the paper measured in the same way, given the metrics that were measured here."""
        return True

    def unlike_paper(self, chance: Mapping[str, float]) -> str:
        """Return why the data are not the paper's, judging by the chance levels; "" if there is no reason."""
        return ""


def keep_architecture(step: Step, arms: Sequence[Arm]) -> None:
    """Let random weights take their architecture from where the runs in the folder have it, if that still has it.

    Another checkpoint of the same architecture leaves these runs as good as they were.

    Args:
        step: Of an arm with random weights; any other is left as it is.
        arms: Of the bench, whose models need not exist yet.
    """
    path = step.folder / SWEEP
    if step.arm.init == PRETRAINED or not step.trials or not step.holds(step.record()):
        return
    try:
        before = str(yaml.safe_load(path.read_text(encoding="utf-8"))["arms"][step.arm.name]["model"])
        digests = {arm.model_of(seed): arm.random_digest for arm in arms for seed in arm.seeds}
        if before not in digests and before != step.arm.model:
            digests[before] = open_arm(step.arm.name, before, step.arm.settings).random_digest
        if digests.get(before) == step.arm.digest:
            step.trials.arms[step.arm.name]["model"] = before
    except (OSError, yaml.YAMLError, KeyError, TypeError, UserError):
        return


def _resolve_best_run(value: Any, step: Step, recipe: BenchRecipe) -> Any:
    """Return the path behind "best:<step>", which the step then needs, and any other value as it is."""
    if not (isinstance(value, str) and value.startswith(BEST_RUN)):
        return value
    needed = value.removeprefix(BEST_RUN)
    step.needs.append(needed)
    benchmark, _, arm = needed.partition("/")
    return str(sweep.best_run(step.out / needed / arm, recipe.seeds_of(benchmark)[0]))


class Transfer(Benchmark):
    """A benchmark that trains each arm by `addp sweep`: the same small grid for all, the best setting over seeds.

    The first metric selects the best setting; larger must be better.

    Attributes:
        verb: The verb that trains.
        source: Its key for the path of the dataset.
        predict: The verb that draws the best run's predictions on the sample images; "" if there is none.
        predict_settings: Settings of that verb.
    """

    Keys = TransferKeys
    verb: ClassVar[str]
    source: ClassVar[str]
    predict: ClassVar[str] = ""
    predict_settings: ClassVar[Mapping[str, Any]] = {}

    def is_of_interest(self, recipe: BenchRecipe) -> bool:
        section = recipe.section(self.name)
        assert isinstance(section, TransferKeys)
        return self.of_paper or bool(section.recipe)

    def missing_key(self, recipe: BenchRecipe) -> str:
        return super().missing_key(recipe) or ("" if self.is_of_interest(recipe) else f"{self.name}.recipe")

    def chance_level(self, results: Mapping[str, Any]) -> float:
        """Return the chance level of its metrics, given the results.json of a run."""
        return 100 / results["classes"]

    def measured(self, training: Any) -> tuple[Metric, ...]:
        """Return the metrics to read from the runs of a training, given the resolved recipe of its verb."""
        return self.metrics

    def add_commands(
        self, step: Step, settings: Settings, paths: Mapping[str, str], recipe: BenchRecipe, inputs: Inputs
    ) -> None:
        section = recipe.section(self.name)
        assert isinstance(section, TransferKeys)
        (dataset,) = self.datasets
        random = {"init": "random"} if step.arm.init == "random" else {}
        arm_settings = {"model": step.arm.model, **step.arm.settings, **random}
        common = {self.source: paths[dataset.key], **settings}
        arguments = [*self.verb.split(), *([section.recipe] if section.recipe else [])]
        arguments += [*as_arguments(common | arm_settings), f"out={step.folder}"]
        for values in itertools.product(*section.grid.values()):
            verb_recipe([*arguments, *as_arguments(dict(zip(section.grid, values, strict=True)))], self.name)
        training = verb_recipe(arguments, self.name)
        self.set_basis(step, training)
        step.metrics = self.measured(training)
        step.trials = sweep.Recipe(
            out=str(step.folder),
            verb=self.verb,
            arms={step.arm.name: arm_settings},
            recipe=section.recipe,
            set=common,
            grid=section.grid,
            seeds=step.seeds,
            metric=step.metrics[0].result,
            jobs=recipe.jobs,
            processes=step.processes,
        )
        step.commands = [Command(["sweep", str(step.folder / SWEEP)])]
        if self.predict:
            best = sweep.best_run(step.folder / step.arm.name, step.seeds[0])
            fixed = {"model": best, "images": inputs.folder(dataset.key), "out": step.folder / PREDICTIONS}
            predict = [*self.predict.split(), *as_arguments({**fixed, **self.predict_settings})]
            step.commands.append(Command(predict))

    def measured_metrics(self, step: Step, results: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """Return the metrics that the runs of a step have measured, given the content of their results."""
        return step.metrics

    def read_outcome(self, step: Step) -> Outcome:
        arm = step.arm.name
        summary = json.loads((step.folder / "sweep.json").read_text(encoding="utf-8"))["arms"][arm]
        runs = {seed: sweep.best_run(step.folder / arm, seed) for seed in step.seeds}
        results = [sweep.read_results(run) for run in runs.values()]
        measured = self.measured_metrics(step, results)
        scores = {metric.key: [metric.read(each) for each in results] for metric in measured}
        return Outcome(
            setting=summary["setting"],
            grid={name.split("/")[-1]: score for name, score in summary["grid"].items()},
            notes=summary["notes"],
            scores=scores,
            chance=dict.fromkeys(scores, self.chance_level(results[0])),
            runs=runs,
            images=sorted((step.folder / PREDICTIONS).glob("*.png")),
        )
