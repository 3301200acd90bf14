"""The steps of `addp bench` from its recipe: the class of the recipe, the checks before the first step, the order."""

import dataclasses
import importlib.util
from collections.abc import Collection, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated

from addp_core.base.errors import UserError, did_you_mean
from tools import doctor
from tools.bench.arguments import errors_name
from tools.bench.arms import PRETRAINED, Arm, open_arm, random_arm, with_settings
from tools.bench.benchmark import Benchmark, Dataset, keep_architecture
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.inputs import Inputs, listing_digest
from tools.bench.paper import check_paper
from tools.bench.pretraining import Pretraining
from tools.bench.recipe import BEST_RUN, PRETRAIN, PRETRAINED_HERE, STAGES, BenchRecipe, DataPaths
from tools.bench.step import Step


def recipe_class(benchmarks: Iterable[Benchmark]) -> type[BenchRecipe]:
    """Return the dataclass of `addp bench`: `BenchRecipe`, a path for each dataset, a section for each benchmark."""
    benchmarks = list(benchmarks)
    data = dataclasses.make_dataclass(
        "Data",
        [(dataset.key, Annotated[str, dataset.help], "") for dataset in datasets_of(benchmarks)],
        bases=(DataPaths,),
        namespace={"__doc__": DataPaths.__doc__},
    )
    sections = [(each.name, each.Keys, dataclasses.field(default_factory=each.Keys)) for each in benchmarks]
    return dataclasses.make_dataclass(
        "Recipe",
        [("data", data, dataclasses.field(default_factory=data)), *sections],
        bases=(BenchRecipe,),
        namespace={"__doc__": "Keys of `addp bench`.", "__module__": __name__},
    )


def datasets_of(benchmarks: Iterable[Benchmark]) -> list[Dataset]:
    """Return the datasets that the benchmarks read, each once."""
    return list(dict.fromkeys(dataset for benchmark in benchmarks for dataset in benchmark.datasets))


Recipe = recipe_class(BENCHMARKS.values())


class Plan:
    """The steps of a recipe, after all of its inputs have been checked.

    Raises UserError if something is wrong with them.
    """

    def __init__(self, recipe: BenchRecipe):
        self.recipe, self.out = recipe, Path(recipe.out)
        names = [*recipe.pretrain.arms, *recipe.models]
        if not names:
            raise UserError(
                "models: none given; expected model=<run or file>, models={name: <run or file>, ...}, or pretraining "
                "as in pretrain.recipe=tiny"
            )
        check_paper(recipe.paper)
        check_benchmarks(recipe)
        self.only: Sequence[str] = recipe.bench.only
        arms = [*names, *(["random"] if recipe.random else [])]
        check_only(recipe, arms)
        wanted = wanted_steps(recipe, arms, self.only)
        check_needed_keys(recipe, arms, benchmarks_of(wanted))
        self.inputs = check_datasets(recipe, benchmarks_of(wanted))
        needed_arms = {name.split("/")[1] for name in wanted}
        if "random" in needed_arms:  # which has the first model's architecture
            needed_arms.add(arms[0])
        needed_arms |= {arm_of_run(recipe.model_of(name)) for name in needed_arms & recipe.models.keys()}
        pretraining = Pretraining(recipe, self.inputs, needed_arms)
        self.arms: list[Arm] = all_arms(recipe, pretraining, needed_arms)
        self.steps = plan_steps(recipe, self.arms, self.inputs, wanted, pretraining.steps)
        check_only(recipe, arms, self.steps)
        check_packages({step.benchmark for step in self.chosen_steps()})

    def chosen_steps(self) -> list[Step]:
        """Return the steps that bench.only names and those that they need, in an order in which they can run."""
        names: dict[str, None] = {}

        def add(step: Step) -> None:
            for needed in step.needs:
                add(self.steps[needed])
            names.setdefault(step.name)

        for step in self.steps.values():
            if not self.only or step.benchmark in self.only or step.name in self.only:
                if not step.left_out:
                    add(step)
                elif step.name in self.only or (step.benchmark in self.only and step.lacks_key):
                    raise UserError(f"bench.only: {step.name} cannot be done: {step.left_out}")
        if not names:
            reason = next(iter(self.left_out_steps()))
            raise UserError(f"nothing to do: {reason}; expected at least one dataset, as in data.imagenet=<folder>")
        return [self.steps[name] for name in names]

    def left_out_steps(self) -> dict[str, list[str]]:
        """Return reason -> names of the steps that are left out for it."""
        names: dict[str, list[str]] = {}
        for step in self.steps.values():
            if step.left_out:
                names.setdefault(step.left_out, []).append(step.name)
        return names


def check_only(recipe: BenchRecipe, arms: Sequence[str], steps: Collection[str] | None = None) -> None:
    """Raise UserError if bench.only names neither benchmarks nor steps. Before there are `steps`, it is not known which
    of them train the tokenizers and predictors.
    """
    pretrained, benchmarks = list(recipe.pretrain.arms), included_benchmarks(recipe, arms)
    kinds = [*([PRETRAIN] if pretrained else []), *benchmarks]
    known = [*kinds, *(f"{PRETRAIN}/{arm}" for arm in pretrained)]
    known += [f"{benchmark}/{arm}" for benchmark in benchmarks for arm in arms]
    for name in recipe.bench.only:
        trains_stages = pretrained and name.startswith(f"{PRETRAIN}/{STAGES}")
        if name not in known and not (trains_stages and (steps is None or name in steps)):
            expected = f"benchmarks ({', '.join(kinds)}) or steps (as det/{arms[0]})"
            raise UserError(f"bench.only: found {name!r}, expected {expected}{did_you_mean(name, known)}")


def check_benchmarks(recipe: BenchRecipe) -> None:
    """Raise UserError if `benchmarks` names one that does not exist."""
    for name in recipe.benchmarks:
        if name not in BENCHMARKS:
            expected = f"some of {', '.join(BENCHMARKS)}{did_you_mean(name, BENCHMARKS)}"
            raise UserError(f"benchmarks: found {name!r}, expected {expected}")


def check_needed_keys(recipe: BenchRecipe, arms: Sequence[str], wanted: Collection[str]) -> None:
    """Raise UserError if data of one of `benchmarks` are not given; `wanted` names the benchmarks to run."""
    for name in included_benchmarks(recipe, arms) if recipe.benchmarks else ():
        if name in wanted and (missing := BENCHMARKS[name].missing_key(recipe)):
            raise UserError(
                f"{missing}: not given; expected {missing}=<path>, because {name} is among the benchmarks of this "
                f"bench ({', '.join(recipe.benchmarks)}) or needed by one, or others of them in bench.only"
            )


def included_benchmarks(recipe: BenchRecipe, arms: Sequence[str]) -> list[str]:
    """Return the benchmarks of a recipe: those that it names and those that they need, or all."""
    included = benchmarks_of(wanted_steps(recipe, arms, ()))
    return [name for name in BENCHMARKS if not recipe.benchmarks or name in included]


def benchmarks_of(steps: Collection[str]) -> set[str]:
    """Return the benchmarks of steps, and "pretrain" if one of them is a pretraining."""
    return {name.split("/")[0] for name in steps}


def arm_of_run(model: str) -> str:
    """Return the arm whose pretraining `pretrain:<arm>` names, with or without a checkpoint, "" for any other model."""
    return model.removeprefix(PRETRAINED_HERE).partition("/")[0] if model.startswith(PRETRAINED_HERE) else ""


def all_arms(recipe: BenchRecipe, pretraining: Pretraining, needed: Collection[str]) -> list[Arm]:
    """Return the arms in the order of the table: those pretrained here, the models, random weights.

    Raises UserError, with the key, if a checkpoint of an arm in `needed` cannot be read, or will not exist.
    """
    arms = list(pretraining.arms)
    for name in recipe.models:
        model, settings = recipe.model_of(name), recipe.encoder_settings(name)
        try:
            if arm_of_run(model):
                arms.append(with_settings(pretraining.model_of_arm(name, model), settings))
            else:
                arms.append(open_arm(name, model, settings))
        except UserError as error:
            if name in needed:
                raise
            arms.append(Arm(name, model, PRETRAINED, "", None, (224, 224), False, str(error)))
    return [*arms, random_arm(arms[0])] if recipe.random else arms


def wanted_steps(recipe: BenchRecipe, arms: Sequence[str], only: Sequence[str]) -> set[str]:
    """Return the names of the steps that `only` asks for (nothing: all), and of those that they need.

    Some may not exist.
    """
    pending: list[str] = []
    wanted: set[str] = set()
    for name in only or [PRETRAIN, *(recipe.benchmarks or BENCHMARKS)]:
        benchmark, _, arm = name.partition("/")
        if benchmark == PRETRAIN:
            wanted.update(f"{PRETRAIN}/{each}" for each in recipe.pretrain.arms if arm in ("", each))
            continue
        pending += [f"{benchmark}/{each}" for each in ([arm] if arm else recipe.section(benchmark).arms or arms)]
    while pending:
        name = pending.pop()
        benchmark, _, arm = name.partition("/")
        if name not in wanted and benchmark in BENCHMARKS:
            pending += [f"{needed}/{arm}" for needed in BENCHMARKS[benchmark].builds_on]
            settings = recipe.section(benchmark).set.values()
            pending += [each.removeprefix(BEST_RUN) for each in settings if str(each).startswith(BEST_RUN)]
            wanted.add(name)
    return wanted


def check_datasets(recipe: BenchRecipe, wanted: Collection[str]) -> Inputs:
    """Check every dataset whose path is given; `wanted` names the benchmarks to run.

    Raises UserError, with the key, if one that they read is missing or not laid out as expected.
    """
    inputs = Inputs(Path(recipe.out))
    for dataset in datasets_of(BENCHMARKS.values()):
        if path := recipe.data.path(dataset.key):
            readers = [each for each in BENCHMARKS.values() if each.name in wanted and dataset in each.datasets]
            try:
                with errors_name(f"data.{dataset.key}"):
                    inputs.digests[path] = listing_digest(path)
                    if source := dataset.check(path, recipe, readers):
                        inputs.take_samples(dataset.key, source)
            except UserError as error:
                if readers:
                    raise
                inputs.problems[dataset.key] = str(error)
    return inputs


def plan_steps(
    recipe: BenchRecipe,
    arms: Sequence[Arm],
    inputs: Inputs,
    wanted: Collection[str],
    pretraining: Mapping[str, Step],
) -> dict[str, Step]:
    """Return all steps by name, with those that are left out; `pretraining` are the first ones.

    Raises UserError if a setting of a step in `wanted` does not fit its verb; any other such step is left out.
    """
    names = [arm.name for arm in arms]
    steps = dict(pretraining)
    included = wanted_steps(recipe, names, ())
    named = {*recipe.benchmarks, *(name.split("/")[0] for name in recipe.bench.only)}
    for benchmark in BENCHMARKS.values():
        if benchmark.name not in named and not benchmark.is_of_interest(recipe):
            continue
        is_wanted = any(name.startswith(f"{benchmark.name}/") for name in wanted)
        for unknown in set(recipe.section(benchmark.name).arms) - set(names) if is_wanted else ():
            expected = f"some of {', '.join(names)}{did_you_mean(unknown, names)}"
            raise UserError(f"{benchmark.name}.arms: found {unknown!r}, expected {expected}")
        for arm in arms:
            try:
                if recipe.benchmarks and f"{benchmark.name}/{arm.name}" not in included:
                    step = Step(benchmark.name, arm, Path(recipe.out), left_out="not one of benchmarks")
                else:
                    step = benchmark.plan(arm, recipe, inputs)
            except (UserError, ModuleNotFoundError) as error:
                if is_wanted:
                    raise
                step = Step(benchmark.name, arm, Path(recipe.out), left_out=str(error))
            steps[step.name] = step
    _check_needs(steps, wanted)
    # an arm's digest stands for its pretraining
    needs_of = {step.name: [needed for needed in step.needs if needed not in pretraining] for step in steps.values()}
    try:
        order = list(TopologicalSorter(needs_of).static_order())
    except CycleError as error:
        raise UserError(f"{BEST_RUN}: steps need each other: {' -> '.join(error.args[1])}; expected none to") from error
    for name in order:
        if name in steps and not steps[name].left_out and name not in pretraining:
            needs, arm = {needed: steps[needed] for needed in needs_of[name]}, steps[name].arm
            if arm.init == PRETRAINED and arm.pretrained_by and (files := pretraining[arm.pretrained_by].files):
                steps[name].files = {**steps[name].files, PRETRAIN: files}
            steps[name].basis["needs"] = {needed: each.basis_digest for needed, each in needs.items()}
            steps[name].needed = {needed: (each.fingerprint, each.pretrainings) for needed, each in needs.items()}
            keep_architecture(steps[name], arms)
    return steps


def _check_needs(steps: Mapping[str, Step], wanted: Collection[str]) -> None:
    """Leave out the steps that need one which is left out.

    Raises UserError if a step that one in `wanted` needs does not exist.
    """
    for step in steps.values():
        for needed in step.needs:
            if needed not in steps:
                expected = ", ".join(name for name in steps if name.startswith("finetune/"))
                problem = f"{step.benchmark}.set: {BEST_RUN}{needed}: no such step; expected one of {expected}"
                if step.name in wanted:
                    raise UserError(problem)
                step.left_out = problem
            elif steps[needed].left_out and not step.left_out:
                step.left_out = f"needs {needed}, which is left out"


def check_packages(benchmarks: Collection[str]) -> None:
    """Raise UserError if a package that one of the benchmarks needs is not installed."""
    for name in sorted(benchmarks):
        task, packages = (PRETRAIN, ()) if name == PRETRAIN else (BENCHMARKS[name].task, BENCHMARKS[name].packages)
        for module in doctor.TASKS[task].needs + packages:
            if importlib.util.find_spec(module) is None:
                raise UserError(
                    f"{name}: the package {module!r} is not installed; add it with: {doctor.command_for(module)}; "
                    "or name the other benchmarks in bench.only"
                )
