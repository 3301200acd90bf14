"""The interface between a task and the engine: settings (`TrainConfig`), what is trained (`Stage`), and where the run
stands (`MicroStep`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval, Le, Lt
from torch import Tensor, nn

from addp_core.base import rng
from addp_core.base.errors import did_you_mean

if TYPE_CHECKING:
    from accelerate import Accelerator

# Those that compute on sharded weights what they compute on whole ones, which the others do not all do.
SHARDED_OPTIMIZERS = (
    *("adamw", "adam", "adamax", "nadam", "nadamw", "radam", "adopt", "adabelief", "lion"),
    *("lamb", "lars", "sgd", "momentum", "rmsprop", "adafactor"),
)


@dataclass
class TrainConfig:
    """Length, batch, optimizer, schedule, precision and logging of a run: the section `train` of a recipe."""

    epochs: Annotated[float, Gt(0), "passes over the images"] = 100.0
    steps: Annotated[int | None, Ge(1), "optimizer steps; replaces epochs"] = None
    batch: Annotated[int, Ge(1), "images per optimizer step, over all processes and micro-steps"] = 256
    accumulate: Annotated[int, Ge(1), "micro-steps per optimizer step (gradient accumulation)"] = 1
    seed: Annotated[int, Ge(0), "seed of all random numbers"] = 0

    optimizer: Annotated[str, "any name of timm.optim.list_optimizers()"] = "adamw"
    betas: Annotated[tuple[float, float], "decay of the moments, for optimizers that have them"] = (0.9, 0.95)
    momentum: Annotated[float, Interval(ge=0, lt=1), "for optimizers that have it"] = 0.9
    weight_decay: Annotated[float, Ge(0), "always 0 for biases, norms and one-dimensional tensors"] = 0.05
    layer_decay: Annotated[
        float | None, Gt(0), Le(1), "factor on the learning rate from each layer to the one below"
    ] = None

    base_lr: Annotated[float, Ge(0), "peak learning rate at batch 256, scaled by batch / 256"] = 1e-4
    lr: Annotated[float | None, Ge(0), "peak learning rate, not scaled; replaces base_lr"] = None
    min_lr: Annotated[float, Ge(0), "learning rate at the end of the cosine"] = 0.0
    schedule: Annotated[Literal["cosine", "constant"], "learning rate after the warm-up"] = "cosine"
    warmup_epochs: Annotated[float, Ge(0), "epochs in which the learning rate rises from 0"] = 0.0
    warmup_steps: Annotated[int | None, Ge(0), "steps in which it rises; replaces warmup_epochs"] = None
    clip_grad: Annotated[float | None, Gt(0), "largest norm of the gradient"] = 3.0
    ema: Annotated[float | None, Gt(0), Lt(1), "decay of the weights' moving average, which is validated"] = None

    precision: Annotated[Literal["fp32", "bf16", "fp16"], "of matrix products; weights stay in float32"] = "fp32"
    compile: Annotated[bool, "torch.compile (compute only)"] = False
    channels_last: Annotated[bool, "memory format of convolutions (compute only)"] = False
    parallel: Annotated[
        Literal["ddp", "fsdp"],
        "what several processes hold: ddp: each of them all weights; fsdp: each of them a part of the weights, "
        "gradients, optimizer and moving average (compute only)",
    ] = "ddp"

    log_every: Annotated[int, Ge(1), "steps between lines of metrics"] = 50
    preview_every: Annotated[int, Ge(0), "steps between preview images; 0: at the end only"] = 0
    evaluate_every: Annotated[int, Ge(0), "steps between evaluations, for tasks that have one; 0: at the end only"] = 0
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
        if self.optimizer != "adamw":  # importing timm takes seconds
            import timm.optim

            names = [str(name) for name in timm.optim.list_optimizers()]
            if self.optimizer not in names:
                hint = did_you_mean(self.optimizer, names)
                raise ValueError(f"optimizer: found {self.optimizer!r}, expected a name of timm's{hint}")
        if self.parallel == "fsdp" and self.optimizer not in SHARDED_OPTIMIZERS:
            expected = ", ".join(SHARDED_OPTIMIZERS)
            raise ValueError(f"optimizer: found {self.optimizer!r}, expected one of {expected}, or parallel=ddp")

    @property
    def micro_batch(self) -> int:
        """Images of one micro-step over all processes: the `batch` of the stream."""
        return self.batch // self.accumulate

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr if self.lr is not None else self.base_lr * self.batch / 256


@dataclass(frozen=True)
class MicroStep:
    """Which micro-step this is, and which of its images this process has. All random numbers are functions of this."""

    seed: int
    step: int  # optimizer step
    index: int  # micro-step since the start of the run
    rank: int
    world: int  # number of processes
    batch: int  # images of the micro-step over all processes
    rows: slice  # those of this process

    def generator(self, purpose: str, shared: bool = True) -> torch.Generator:
        """Return a CPU generator for `purpose`; if `shared`, every process gets the same one.

        For results that do not depend on the number of processes, draw for all `batch` images from a shared generator
        and keep `rows`.
        """
        return rng.generator(self.seed, purpose, self.index, *(() if shared else (self.rank,)))


class Stage(ABC):
    """What a task trains. `name`, `model`, `loss` and `export` are required; the rest has a default."""

    name: str
    model: nn.Module
    """What is trained, wrapped and saved: its parameters that require a gradient, and its buffers."""
    frozen: Sequence[nn.Module] = ()
    """Modules moved to the device, in eval mode and without gradients; checkpoints do not store them. List the modules
    that are called."""
    find_unused: bool = False
    """True if some parameters get no gradient in some steps (DDP's find_unused_parameters)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, micro_step: MicroStep) -> dict[str, Tensor]:
        """Return {"loss": scalar, any other metric: scalar}, means over the rows in `batch`.

        Call `model`, not `self.model`. Runs under autocast. The gradient is the mean over processes and micro-steps.
        """

    def after_step(self, model: nn.Module, micro_step: MicroStep, accelerator: "Accelerator") -> dict[str, float]:
        """Do work after a successful optimizer step, such as updating a codebook's moving average; return metrics.

        `model` is the unwrapped model. With train.parallel=fsdp, its parameters are sharded; its buffers never are.
        """
        return {}

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Return images, name -> Float[n,3,h,w] in [0,1]. Runs under autocast without gradients.

        `model` is unwrapped, in eval mode, with its averaged weights if there are any, and all its weights are on this
        process. Every process calls this; rank 0's images are kept.
        """
        return {}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return metrics. Every process calls this as it calls `preview`; rank 0's metrics are kept."""
        return {}

    @abstractmethod
    def export(self, model: nn.Module, path: Path) -> None:
        """Write the trained model as safetensors, with what is needed to build it in the metadata."""
