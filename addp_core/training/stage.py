"""What a task hands to the engine: settings (`TrainConfig`), a `Stage`; and where a micro-step stands (`Draw`)."""

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


@dataclass
class TrainConfig:
    """How long, how fast, with what; the section `train` of a recipe."""

    epochs: Annotated[float, Gt(0), "passes over the images"] = 100.0
    steps: Annotated[int | None, Ge(1), "optimizer steps; takes the place of epochs"] = None
    batch: Annotated[int, Ge(1), "images of one optimizer step, over all processes and micro-steps"] = 256
    accumulate: Annotated[int, Ge(1), "micro-steps that make up one optimizer step"] = 1
    seed: Annotated[int, Ge(0), "start of every random number"] = 0

    optimizer: Annotated[str, "any name of timm.optim.list_optimizers()"] = "adamw"
    betas: Annotated[tuple[float, float], "decay of the moments, for optimizers that have them"] = (0.9, 0.95)
    momentum: Annotated[float, Interval(ge=0, lt=1), "for optimizers that have it"] = 0.9
    weight_decay: Annotated[float, Ge(0), "0 for biases, norms and one-dimensional tensors in any case"] = 0.05
    layer_decay: Annotated[float | None, Gt(0), Le(1), "factor on the rate from each layer to the one below"] = None

    base_lr: Annotated[float, Ge(0), "peak learning rate at batch 256; it grows with batch / 256"] = 1e-4
    lr: Annotated[float | None, Ge(0), "peak learning rate as it is; takes the place of base_lr"] = None
    min_lr: Annotated[float, Ge(0), "learning rate at the end of the cosine"] = 0.0
    schedule: Annotated[Literal["cosine", "constant"], "after the warm-up"] = "cosine"
    warmup_epochs: Annotated[float, Ge(0), "epochs in which the learning rate rises from 0"] = 0.0
    warmup_steps: Annotated[int | None, Ge(0), "the same in steps; takes the place of warmup_epochs"] = None
    clip_grad: Annotated[float | None, Gt(0), "largest norm of the gradient"] = 3.0
    ema: Annotated[float | None, Gt(0), Lt(1), "decay of the weights' moving average, which is validated"] = None

    precision: Annotated[Literal["fp32", "bf16", "fp16"], "of matrix products; weights stay in float32"] = "fp32"
    compile: Annotated[bool, "torch.compile (compute only)"] = False
    channels_last: Annotated[bool, "memory format of convolutions (compute only)"] = False

    log_every: Annotated[int, Ge(1), "steps from one line of figures to the next"] = 50
    preview_every: Annotated[int, Ge(0), "steps between preview pictures; 0: at the end only"] = 0
    evaluate_every: Annotated[int, Ge(0), "steps between evaluations, for tasks that have one; 0: at the end only"] = 0
    checkpoint_every: Annotated[int, Ge(0), "steps between checkpoints; 0: at the end and on a signal only"] = 1000
    export_every: Annotated[
        int, Ge(0), "steps between weights kept for good in models/step-N, which reads like a run; 0: at the end only"
    ] = 0
    keep: Annotated[int, Ge(1), "checkpoints kept; two or more leave one to fall back to"] = 2
    max_nonfinite: Annotated[int, Ge(1), "steps in a row without a finite loss and gradient until the run stops"] = 10

    def __post_init__(self):
        if self.batch % self.accumulate:
            raise ValueError(f"batch: found {self.batch}, expected a multiple of accumulate={self.accumulate}")
        if self.optimizer != "adamw":  # timm takes seconds to import
            import timm.optim

            if self.optimizer not in (known := timm.optim.list_optimizers()):
                hint = did_you_mean(self.optimizer, known)
                raise ValueError(f"optimizer: found {self.optimizer!r}, expected a name of timm's{hint}")

    @property
    def micro_batch(self) -> int:
        """Images of one micro-step over all processes: the `batch` of the stream."""
        return self.batch // self.accumulate

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr if self.lr is not None else self.base_lr * self.batch / 256


@dataclass(frozen=True)
class Draw:
    """Where a micro-step stands. All its randomness is a function of this."""

    seed: int
    step: int  # optimizer step
    micro: int  # micro-step since the start of the run
    rank: int
    world: int
    batch: int  # images of the micro-step over all processes
    rows: slice  # those of this process

    def generator(self, what: str, shared: bool = True) -> torch.Generator:
        """A CPU generator for `what`; the same on every process if `shared`.

        To be independent of the number of processes, draw for all `batch` images from a shared one and keep `rows`.
        """
        return rng.generator(self.seed, what, self.micro, *(() if shared else (self.rank,)))


class Stage(ABC):
    """What a task brings. `name`, `model`, `loss` and `export` are needed; the rest has a default."""

    name: str
    model: nn.Module
    """What is trained, wrapped and saved: its parameters that require a gradient, and its buffers."""
    frozen: Sequence[nn.Module] = ()
    """Moved to the device, in eval mode, without gradients; not in checkpoints. List the modules that are called."""
    find_unused: bool = False
    """True where some parameters take no part in some steps (DDP's find_unused_parameters)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, draw: Draw) -> dict[str, Tensor]:
        """{"loss": scalar, anything else to log: scalar}; means over the rows at hand. Call `model`, not `self.model`.

        Runs under autocast. The gradient is the mean over processes and micro-steps.
        """

    def after_step(self, model: nn.Module, draw: Draw, accelerator: "Accelerator") -> dict[str, float]:
        """Work after a successful optimizer step, on the bare model, for example a codebook's moving average."""
        return {}

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Pictures, name -> Float[n,3,h,w] in [0,1], drawn under autocast without gradients.

        `model` is the bare model in eval mode, with its averaged weights where there are any. Called on every process
        (FSDP wants that); the first one's pictures are kept.
        """
        return {}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Figures; called on every process as `preview` is, the first one's answer is kept."""
        return {}

    @abstractmethod
    def export(self, model: nn.Module, path: Path) -> None:
        """Writes the trained model as safetensors, with what is needed to build it in the metadata."""
