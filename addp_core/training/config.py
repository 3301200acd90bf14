"""The section `train` of recipes. Nothing here imports torch before it is needed."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt

from addp_core.base.errors import did_you_mean
from addp_core.training.precision import PrecisionChoice
from addp_core.training.tracker_backends import PROJECT, TrackerName

# Those that compute on sharded weights what they compute on whole ones, which the others do not all do.
SHARDED_OPTIMIZERS = (
    *("adamw", "adam", "adamax", "nadam", "nadamw", "radam", "adopt", "adabelief", "lion"),
    *("lamb", "lars", "sgd", "momentum", "rmsprop", "adafactor"),
)

Decay = Annotated[float, Interval(ge=0, lt=1)]  # of a moving average


@dataclass
class TrainConfig:
    """Length, batch, optimizer, schedule, precision and logging of a run: the section `train` of a recipe."""

    __replaced_by__ = {"epochs": "steps", "base_lr": "lr", "warmup_epochs": "warmup_steps"}  # noqa: RUF012

    epochs: Annotated[float, Gt(0), "passes over the images"] = 100.0
    steps: Annotated[int | None, Ge(1), "optimizer steps; replaces epochs"] = None
    batch: Annotated[int, Ge(1), "images per optimizer step, over all processes and micro-steps"] = 256
    accumulate: Annotated[int, Ge(1), "micro-steps per optimizer step (gradient accumulation)"] = 1
    seed: Annotated[int, Ge(0), "seed of all random numbers"] = 0

    optimizer: Annotated[str, "any name of timm.optim.list_optimizers()"] = "adamw"
    betas: Annotated[
        tuple[Decay, Decay], "decay of the moments, for optimizers that have two; others keep timm's defaults"
    ] = (0.9, 0.95)
    momentum: Annotated[float, Interval(ge=0, lt=1), "for optimizers that have it"] = 0.9
    weight_decay: Annotated[float, Ge(0), "always 0 for biases, norms and one-dimensional tensors"] = 0.05
    layer_decay: Annotated[
        float | None, Gt(0), Le(1), "factor on the learning rate from each layer to the one below"
    ] = None

    base_lr: Annotated[float, Ge(0), "peak learning rate at batch 256, scaled by batch / 256"] = 1e-4
    lr: Annotated[float | None, Ge(0), "peak learning rate, not scaled; replaces base_lr"] = None
    min_lr: Annotated[float, Ge(0), "learning rate at the end of the cosine, at most the peak"] = 0.0
    schedule: Annotated[Literal["cosine", "constant"], "learning rate after the warm-up"] = "cosine"
    warmup_epochs: Annotated[float, Ge(0), "epochs in which the learning rate rises from 0"] = 0.0
    warmup_steps: Annotated[int | None, Ge(0), "steps in which it rises; replaces warmup_epochs"] = None
    clip_grad: Annotated[float | None, Gt(0), "largest norm of the gradient"] = 3.0
    ema: Annotated[float | None, Gt(0), Lt(1), "decay of the weights' moving average, which is validated"] = None

    precision: PrecisionChoice = "auto"
    compile: Annotated[bool, "torch.compile (compute only)"] = False
    channels_last: Annotated[bool, "memory format of convolutions (compute only)"] = False
    parallel: Annotated[
        Literal["ddp", "fsdp"],
        "what several processes hold: ddp: each of them all weights; fsdp: each of them a part of the weights, "
        "gradients, optimizer and moving average (compute only)",
    ] = "ddp"

    log_every: Annotated[int, Ge(1), "steps between lines of metrics"] = 50
    trackers: Annotated[
        tuple[TrackerName, ...],
        "where metrics, recipe and previews are logged besides metrics.jsonl and images/: tensorboard (in <out>/tb), "
        "wandb, mlflow, trackio",
    ] = ("tensorboard",)
    tracker_project: Annotated[
        str,
        "project of the run in wandb and trackio, experiment in mlflow; their environment variables come first",
    ] = PROJECT
    preview_every: Annotated[int, Ge(0), "steps between preview images; 0: at the end only"] = 0
    evaluate_every: Annotated[int, Ge(0), "steps between evaluations, for tasks that have one; 0: at the end only"] = 0
    keep_best: Annotated[
        str,
        "metric of the evaluations by which the best model so far is kept in model-best.safetensors; empty: the task's "
        "own (top1 in classification), if it has one",
    ] = ""
    checkpoint_every: Annotated[int, Ge(0), "steps between checkpoints; 0: at the end and on a signal only"] = 1000
    export_every: Annotated[
        int,
        Ge(0),
        "steps between intermediate checkpoints (weights only) in models/step-N, which other commands read like a run "
        "folder; 0: none",
    ] = 0
    keep: Annotated[int, Ge(1), "checkpoints kept; two or more allow for a damaged one"] = 2
    max_nonfinite: Annotated[int, Ge(1), "steps in a row without a finite loss and gradient until the run stops"] = 10

    def __post_init__(self) -> None:
        if self.batch % self.accumulate:
            raise ValueError(f"batch: found {self.batch}, expected a multiple of accumulate={self.accumulate}")
        if self.optimizer not in SHARDED_OPTIMIZERS:  # importing timm takes seconds
            import timm.optim

            names = [str(name) for name in timm.optim.list_optimizers()]
            if self.optimizer not in names:
                hint = did_you_mean(self.optimizer, names)
                raise ValueError(f"optimizer: found {self.optimizer!r}, expected a name of timm's{hint}")
            if timm.optim.get_optimizer_info(self.optimizer).second_order:  # a step takes first derivatives alone
                raise ValueError(f"optimizer: found {self.optimizer!r}, expected one without second derivatives")
        if self.parallel == "fsdp" and self.optimizer not in SHARDED_OPTIMIZERS:
            expected = ", ".join(SHARDED_OPTIMIZERS)
            raise ValueError(f"optimizer: found {self.optimizer!r}, expected one of {expected}, or parallel=ddp")
        # A rate of 0 is for a look at what a run would do; any other one falls along the cosine.
        if self.schedule == "cosine" and 0 < self.peak_lr < self.min_lr:
            raise ValueError(f"min_lr: found {self.min_lr}, expected at most the peak learning rate, {self.peak_lr:g}")

    @property
    def micro_batch(self) -> int:
        """Images of one micro-step over all processes: the `batch` of the stream."""
        return self.batch // self.accumulate

    def total_steps(self, images: int) -> int:
        """Return the optimizer steps of a run on so many images."""
        return self.steps if self.steps is not None else math.ceil(self.epochs * images / self.batch)

    @property
    def tracking(self) -> tuple[tuple[TrackerName, ...], str]:
        """The trackers and the project, as `RunLogger` takes them."""
        return self.trackers, self.tracker_project

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr if self.lr is not None else self.base_lr * self.batch / 256
