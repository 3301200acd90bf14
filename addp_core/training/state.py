"""The state of a run: model, optimizer, moving average and counters, as checkpoints store and restore them."""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.training import parallel
from addp_core.training.compute import accelerate_model
from addp_core.training.optimization import check_layer_decay, make_optimizer
from addp_core.training.stage import TrainConfig

log = logging.getLogger("addp")


@dataclass
class Counters:
    """What a run counts. The names of the fields are keys of state.json."""

    step: int = 0  # optimizer steps done
    skipped: int = 0  # steps that were not finite
    bad_in_a_row: int = 0  # the last of them in a row
    window: dict[str, list[float]] = field(default_factory=dict)  # metric -> [sum, count] since the last log line
    window_steps: int = 0

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Counters":
        """Read the counters of a checkpoint's state.json."""
        return cls(**{item.name: state[item.name] for item in fields(cls)})

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add a step's metrics to the window; values that are not finite are left out."""
        for name, value in metrics.items():
            if math.isfinite(value):
                total = self.window.setdefault(name, [0.0, 0])
                total[0] += value
                total[1] += 1
        self.window_steps += 1

    def take_window(self) -> tuple[dict[str, float], int]:
        """Return the mean of each metric and the number of steps since the last call."""
        means = {name: total / count for name, (total, count) in self.window.items()}
        steps = self.window_steps
        self.window, self.window_steps = {}, 0
        return means, steps


class MovingAverage(ModelEmaV3):
    """timm's moving average of weights and buffers. It can leave out a step, and each process updates its shards."""

    def update_unless(self, skipped: Tensor, model: nn.Module, step: int) -> None:
        """Move towards a model after its step `step` (from 1), unless `skipped`, a Bool scalar on the device, is true.

        Skipped steps have left the model as it was.
        """
        weight = torch.where(skipped, 0.0, 1 - self.get_decay(step))
        with torch.no_grad():
            for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
                if average.is_floating_point():
                    parallel.local_shard(average).lerp_(parallel.local_shard(value), weight.to(average.dtype))
                else:
                    average.copy_(value)


class TrainingState:
    """The model of a run with its optimizer and moving average, newly built or as a checkpoint holds them.

    `model` is what the loss calls, wrapped by DDP or sharded; `unwrapped` is the stage's own module. If the state is
    `sharded`, each process holds a part of the weights, and works on a full copy in previews, evaluation and export.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        accelerator: Accelerator,
        payload: Mapping[str, Any] | None,
        source: Path | None,
    ):
        """Build everything; fill it from a checkpoint's `payload`, which error messages call `source`.

        Raises UserError if the checkpoint is of another model.
        """
        self.accelerator = accelerator
        self.sharded = config.parallel == "fsdp" and accelerator.num_processes > 1
        model = model.to(accelerator.device)
        self.names = list(model.state_dict())
        self.ema = None
        if config.ema:
            self.ema = MovingAverage(model, decay=config.ema, use_warmup=True)
        if payload:
            _fill(model, payload["model"], self.names, source)
            if self.ema:
                _fill(self.ema.module, payload["ema"], self.names, source)
        self.full_copy = deepcopy(model).cpu() if self.sharded else None
        if self.sharded:
            for module in (model, self.ema.module) if self.ema else (model,):
                parallel.shard(module, accelerator.device)
            if config.channels_last and accelerator.is_main_process:
                log.info("train.channels_last: with train.parallel=fsdp, of the frozen parts alone")
        accelerate_model(model, config.compile, config.channels_last and not self.sharded)
        if not payload:  # a run from before this was an error goes on
            check_layer_decay(type(model), config)
        optimizer = make_optimizer(model, config)
        if self.sharded:
            self.model, self.optimizer = model, accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        # fp16's loss scale needs the host anyway.
        self.skips_on_device = (
            can_skip(optimizer, accelerator.device) and not self.sharded and accelerator.scaler is None
        )
        self.unwrapped = accelerator.unwrap_model(self.model)
        self.buffers = list(self.unwrapped.buffers())
        self.saved_buffers = [buffer.clone() for buffer in self.buffers]
        if payload:
            optimizer.load_state_dict(parallel.optimizer_state_for(optimizer, payload["optimizer"]))
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(payload["scaler"])

    def payload(self) -> dict[str, Any]:
        """Return what a checkpoint stores, as trees of dicts with tensors, which may be sharded.

        All processes must call this if the state is sharded.
        """
        self._share_buffers()
        weights = self.unwrapped.state_dict()
        payload = {
            "model": {name: weights[name] for name in self.names},
            "optimizer": self.optimizer.optimizer.state_dict(),
        }
        if self.ema:
            average = self.ema.module.state_dict()
            payload["ema"] = {name: average[name] for name in self.names}
        if self.accelerator.scaler is not None:
            payload["scaler"] = self.accelerator.scaler.state_dict()
        return payload

    @contextlib.contextmanager
    def full_model(self, averaged: bool = False) -> Iterator[nn.Module]:
        """Yield the trained model, or the one with averaged weights, with all its weights on this process.

        All processes must enter this if the state is sharded.
        """
        module = self.ema.module if averaged and self.ema else self.unwrapped
        if self.full_copy is None:
            yield module
            return
        self._share_buffers()
        weights = module.state_dict()
        self.full_copy.load_state_dict({name: parallel.full_tensor(weights[name]) for name in self.names})
        yield self.full_copy.to(self.accelerator.device)
        self.full_copy.cpu()  # the device keeps no full copy while the run trains

    def _share_buffers(self) -> None:
        """Give all processes rank 0's buffers, such as batch statistics; DDP does this at each step."""
        if self.sharded:
            for module in (self.unwrapped, self.ema.module) if self.ema else (self.unwrapped,):
                parallel.broadcast_tensors(module.buffers())

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of every parameter group, scaled by the group's `lr_scale`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def save_buffers(self) -> None:
        """Remember the buffers, such as batch statistics, in case the step has to be undone."""
        for saved, buffer in zip(self.saved_buffers, self.buffers, strict=True):
            saved.copy_(buffer)

    def step(self, skipped: Tensor) -> None:
        """Do the optimizer's step unless `skipped`, a Bool scalar on the device, is true."""
        if self.skips_on_device:
            self.optimizer.optimizer.found_inf = skipped.float()  # as torch's GradScaler does
            self.optimizer.step()
        elif not skipped.item():
            self.optimizer.step()

    def restore_buffers(self, skipped: Tensor) -> None:
        """Put the buffers back to what they were at `save_buffers` if `skipped`, a Bool scalar, is true."""
        for saved, buffer in zip(self.saved_buffers, self.buffers, strict=True):
            buffer.copy_(torch.where(skipped, saved, buffer))

    def local_weights_finite(self) -> bool:
        """Check whether all weights on this process are finite."""
        return all(bool(parallel.local_shard(weight).isfinite().all()) for weight in self.unwrapped.parameters())


def _fill(module: nn.Module, weights: dict[str, Tensor], expected: Iterable[str], source: Path | None) -> None:
    """Load the weights. Raises UserError if names or shapes differ from the module's."""
    missing, unknown = sorted(set(expected) - weights.keys()), sorted(weights.keys() - set(expected))
    current = module.state_dict()
    other_shape = [name for name in weights.keys() & current.keys() if weights[name].shape != current[name].shape]
    if missing or unknown or other_shape:
        raise UserError(
            f"{source}: does not fit this model: missing {missing}, unknown {unknown}, "
            f"other shape {sorted(other_shape)}; choose another out"
        )
    module.load_state_dict(weights, strict=False)


def can_skip(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Return whether an optimizer leaves out a step by itself if its `found_inf` is 1, as torch's fused ones do.

    On Apple's GPUs, they ignore it (github.com/pytorch/pytorch/pull/186360).
    """
    return bool(optimizer.defaults.get("fused")) and device.type != "mps"
