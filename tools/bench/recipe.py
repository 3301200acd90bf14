"""The recipe of `addp bench`: the keys that all benchmarks share, and the keys that the section of each one has.

`plan.recipe_class` completes it with the datasets and sections of the registered benchmarks.
"""

import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, MinLen

from addp_core.base.errors import did_you_mean
from addp_core.weights.config import EncoderKeys

BEST_RUN = "best:"  # best:finetune/random stands for the best run of that step with its first seed
MODEL_ARM = "addp"  # the arm of the key `model`, and that of a pretraining without arms
PRETRAIN = "pretrain"  # the section, the folder and the steps of pretraining
STAGES = "stages"  # the step that trains the tokenizer and the predictor which arms share
PRETRAINED_HERE = "pretrain:"  # pretrain:addp stands for the model of the arm's pretraining
ARM_NAME = re.compile(r"[\w.+-]+")


@dataclass
class EvaluationKeys:
    """Settings of a benchmark that evaluates."""

    set: Annotated[
        dict[str, Any], f"settings of its verb; {BEST_RUN}finetune/random stands for the best run of that step"
    ] = field(default_factory=dict)
    seeds: Annotated[list[int] | None, "seeds of this benchmark; null: those of the bench"] = None
    arms: Annotated[list[str], "the models (and random) that take part; empty: all"] = field(default_factory=list)


@dataclass
class TransferKeys(EvaluationKeys):
    """Settings of a benchmark that trains."""

    recipe: Annotated[str, "recipe of its verb; empty: none"] = ""
    grid: Annotated[
        dict[str, list[Any]], "key -> values: the small grid that every arm searches with the first seed"
    ] = field(default_factory=dict)


@dataclass
class PretrainKeys:
    """Pretraining that the bench begins with: an `addp pretrain` for each arm, whose model all later steps use."""

    recipe: Annotated[str, "recipe of `addp pretrain`; empty: none"] = ""
    set: Annotated[
        dict[str, Any], "settings of every arm's `addp pretrain`; the images are data.imagenet if none are given"
    ] = field(default_factory=dict)
    arms: Annotated[
        dict[str, dict[str, Any]],
        "name -> settings of its `addp pretrain`: the first rows of the table; with a recipe alone, there is one, addp",
    ] = field(default_factory=dict)
    seeds: Annotated[
        list[int],
        MinLen(1),
        "seeds of each pretraining; with several of them, a transfer with a seed takes the model of the same seed",
    ] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        if self.recipe and not self.arms:
            self.arms = {MODEL_ARM: {}}
        for name in self.arms:
            if not ARM_NAME.fullmatch(name) or name == "random" or name.partition("-")[0] == STAGES:
                raise ValueError(
                    f"arms: {name!r}, expected a name of letters, digits, . + - _, other than random and {STAGES}"
                )


@dataclass
class PaperKeys:
    """The paper's numbers of the arms, which the report shows and compares with; no result depends on them."""

    table: Annotated[str, "where the paper has them, as in Table 3"] = ""
    baseline: Annotated[str, "the arm to which the differences of all others are; empty: none but `pairs`"] = ""
    arms: Annotated[
        dict[str, dict[str, dict[str, float]]],
        "arm -> benchmark -> metric -> the paper's value, as in {z_t: {generation: {fid: 80.75}, finetune: {top1: "
        "83.7}}}; an arm that this bench does not have is a row without differences",
    ] = field(default_factory=dict)
    pairs: Annotated[list[list[str]], "further differences: [a, b] is that of a to b"] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.baseline and self.baseline not in self.arms:
            expected = f"one of paper.arms ({', '.join(self.arms) or 'none'}){did_you_mean(self.baseline, self.arms)}"
            raise ValueError(f"baseline: found {self.baseline!r}, expected {expected}")
        for pair in self.pairs:
            unknown = [name for name in pair if name not in self.arms]
            if len(pair) != 2 or unknown:
                hint = did_you_mean(unknown[0], self.arms) if unknown else ""
                raise ValueError(f"pairs: found {pair}, expected two of paper.arms ({', '.join(self.arms)}){hint}")

    def differences(self) -> list[tuple[str, str]]:
        """Return (arm, the arm to which its difference is taken), those to the baseline first."""
        to_baseline = [(arm, self.baseline) for arm in self.arms if self.baseline and arm != self.baseline]
        return [*to_baseline, *((pair[0], pair[1]) for pair in self.pairs)]


@dataclass
class DataPaths:
    """Paths of the datasets; benchmarks whose dataset has no path are left out."""

    def path(self, dataset: str) -> str:
        """Return the path of a dataset, "" if none is given."""
        return getattr(self, dataset)


@dataclass
class Launch:
    """Which steps to run, where and how."""

    only: Annotated[list[str] | str, "benchmarks or steps, as in det,seg or [det/addp]; empty: all"] = field(
        default_factory=list
    )
    launch: Annotated[
        Literal["local", "print", "slurm"], "run the steps here, print their commands, or submit a job for each"
    ] = "local"
    sbatch: Annotated[
        list[str],
        "sbatch options of each job, as in ['--gres=gpu:8','--time=24:00:00']; the job of the report takes only "
        "account, partition and the like",
    ] = field(default_factory=list)
    processes: Annotated[int, Ge(1), "processes of each training and evaluation, started by torchrun"] = 1
    share: Annotated[bool, "allow several processes (such as Slurm jobs) to work on this bench folder at once"] = False

    def __post_init__(self) -> None:
        if isinstance(self.only, str):
            self.only = [name.strip() for name in self.only.split(",") if name.strip()]


@dataclass
class Estimate:
    """What the steps will take, without running them; estimate=true measures their speed here."""

    __shorthand__ = "enabled"
    enabled: Annotated[bool, "print what every step will take and cost, and run nothing"] = False
    seconds: Annotated[float, Gt(0), "time over which each speed is measured"] = 10.0
    gpus: Annotated[
        int | None,
        Ge(1),
        "GPUs of each run, to which measured speeds are scaled in proportion; null: as many as bench.processes",
    ] = None
    img_s: Annotated[
        dict[str, float],
        "instead of measuring: images per second of a run on its GPUs, as in {finetune: 2000, finetune.validation: "
        "6000, generation: 20}; without a phase, of what takes most of the time",
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, given in (("img_s", self.img_s), ("gpus", self.gpus)):
            if given and not self.enabled:  # the bench would start instead
                raise ValueError(f"{key}: found {given} without estimate=true; add it")
        for key, value in self.img_s.items():
            if not value > 0:
                raise ValueError(f"img_s.{key}: found {value:g}, expected images per second above 0")


@dataclass
class BenchRecipe:
    """Keys of `addp bench` that do not depend on the benchmarks."""

    out: Annotated[str, "folder for the steps, bench.json, report.html and report.md"] = "runs/bench"
    model: Annotated[str, "short for models={addp: ...}; replaces the models of a recipe"] = ""
    pretrain: PretrainKeys = field(default_factory=PretrainKeys)
    models: Annotated[
        dict[str, str | dict[str, Any]],
        "name -> a run folder, a file, hf://owner/repository/file, or pretrain:<arm>/models/step-<n> for an "
        "intermediate checkpoint of an arm of `pretrain`: the rows of the table; or {model: <one of these>, <key>: "
        "<value>, ...} with keys of every transfer's encoder, as in {model: base, init: random} or tokenizer: <file>",
    ] = field(default_factory=dict)
    random: Annotated[
        bool, "also train from random weights, with the first arm's architecture and the same settings"
    ] = True
    benchmarks: Annotated[
        list[str], "the benchmarks of this bench, whose data then have to be given; empty: all whose data are given"
    ] = field(default_factory=list)
    data: DataPaths = field(default_factory=DataPaths)
    seeds: Annotated[list[int], MinLen(1), "seeds of every transfer; the first one searches the grid"] = field(
        default_factory=lambda: [0]
    )
    jobs: Annotated[
        int | None,
        Ge(1),
        "runs at a time within a step, each with GPUs of its own; null: as many as there are GPUs for, two without one",
    ] = 1
    price_per_hour: Annotated[float | None, Ge(0), "price of an hour of this machine, for the report"] = None
    paper: PaperKeys = field(default_factory=PaperKeys)
    bench: Launch = field(default_factory=Launch)
    estimate: Estimate = field(default_factory=Estimate)
    replaced_models: tuple[str, ...] = field(default=(), init=False)  # names of the recipe's models, if `model` is set

    def __post_init__(self) -> None:
        if self.model:
            self._replace_models()
        self._join_models()
        for name in self.models:
            if not ARM_NAME.fullmatch(name) or name == "random":
                raise ValueError(f"models: {name!r}, expected a name of letters, digits, . + - _, other than random")
            if name in self.pretrain.arms:
                raise ValueError(f"models: {name!r} is also in pretrain.arms, expected another name")
            if not self.model_of(name):
                raise ValueError(f"models.{name}: found no model, expected {{model: <run or file>, ...}}")

    def _join_models(self) -> None:
        """Put `models.<name>.<key>=<value>`, a setting of one model among the others, into that model."""
        for dotted in [name for name in self.models if "." in name]:
            name, _, key = dotted.rpartition(".")
            if name in self.models and key in {each.name for each in fields(EncoderKeys)}:
                model, value = self.models[name], self.models.pop(dotted)
                self.models[name] = ({"model": model} if isinstance(model, str) else model) | {key: value}

    def _replace_models(self) -> None:
        """Put `model` in the place of all models and of the pretraining, and in the place of each one that a section
        names in `arms`.
        """
        self.replaced_models = (*self.pretrain.arms, *self.models)
        self.pretrain = PretrainKeys()
        self.models, self.model = {MODEL_ARM: self.model}, ""
        for section in vars(self).values():
            if isinstance(section, EvaluationKeys):
                arms = (MODEL_ARM if name in self.replaced_models else name for name in section.arms)
                section.arms = list(dict.fromkeys(arms))

    def model_of(self, name: str) -> str:
        """Return the run folder, file or the like of a model."""
        value = self.models[name]
        return value if isinstance(value, str) else str(value.get("model") or "")

    def encoder_settings(self, name: str) -> dict[str, Any]:
        """Return the settings of a model's encoder in every transfer."""
        value = self.models[name]
        return {} if isinstance(value, str) else {key: each for key, each in value.items() if key != "model"}

    def section(self, benchmark: str) -> EvaluationKeys:
        """Return the keys of a benchmark."""
        return getattr(self, benchmark)

    def seeds_of(self, benchmark: str) -> list[int]:
        """Return the seeds in a benchmark's section or, if it names none, those of the bench."""
        section = getattr(self, benchmark, None)
        return (section.seeds if isinstance(section, EvaluationKeys) else None) or self.seeds
