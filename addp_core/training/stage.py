"""The interface between a task and the engine: settings (`TrainConfig`), what is trained (`Stage`), and where the run
stands (`MicroStep`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from addp_core.base import rng
from addp_core.training.config import SHARDED_OPTIMIZERS as SHARDED_OPTIMIZERS
from addp_core.training.config import TrainConfig as TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    metrics: Mapping[str, bool] = {}
    """The metrics that `evaluate` may return, and whether higher is better."""
    best_metric: str = ""
    """The metric by which the best model is kept unless `train.keep_best` names one; empty: none."""
    find_unused: bool = False
    """True if some parameters get no gradient in some steps (DDP's find_unused_parameters)."""

    @property
    def averaged_is_model(self) -> bool:
        """With `train.ema`, whether the averaged weights are the model: by default, if they are evaluated."""
        return type(self).evaluate is not Stage.evaluate

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, micro_step: MicroStep) -> dict[str, Tensor]:
        """Return {"loss": scalar, any other metric: scalar}, means over the rows in `batch`.

        Call `model`, not `self.model`. Runs under autocast. The gradient is the mean over processes and micro-steps.
        """

    def after_step(self, model: nn.Module, micro_step: MicroStep, accelerator: "Accelerator") -> dict[str, Tensor]:
        """Do work after an optimizer step, such as updating a codebook's moving average; return metrics.

        The metrics are scalars on the device. Change buffers only: the engine puts them back if the step was not
        finite. `model` is the unwrapped model. With train.parallel=fsdp, its parameters are sharded; its buffers never
        are.
        """
        return {}

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Return images, name -> Float[n,3,h,w] in [0,1]. Runs under autocast without gradients.

        `model` is unwrapped, in eval mode, with its averaged weights if there are any, and all its weights are on this
        process. Every process calls this; rank 0's images are kept.
        """
        return {}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return metrics, of which `metrics` has the names. Every process calls this as it calls `preview`; rank 0's
        metrics are kept.
        """
        return {}

    def after_evaluation(  # noqa: B027  # most stages have nothing to do
        self, step: int, metrics: dict[str, float], best: dict[str, Any] | None
    ) -> None:
        """Do work on rank 0 with the metrics of a step and with those of the best one so far, if the run keeps it."""

    @abstractmethod
    def export(self, model: nn.Module, path: Path) -> None:
        """Write the trained model as safetensors, with what is needed to build it in the metadata."""
