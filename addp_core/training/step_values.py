"""The values of optimizer steps: a GPU computes them, and the host reads those of a step while the next one runs.

A step with values that are not finite is skipped on the device, and counted here.
"""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.training.checkpoints import Checkpoints
from addp_core.training.state import Counters

log = logging.getLogger("addp")

LATE_DEVICES = ("cuda",)  # that go on while the host does something else


class StepValues:
    """What a step leaves for the host: scalars, copied while the device goes on.

    Attributes:
        number: of the step, from 1.
        rate: its learning rate.
    """

    def __init__(
        self, number: int, rate: float, skipped: Tensor, values: Mapping[str, Tensor], more: Mapping[str, Tensor]
    ):
        """skipped, values, more: scalars on the device; those of `more` mean nothing if the step is skipped."""
        self.number, self.rate = number, rate
        self._names, self._more = [*values, *more], list(more)
        stacked = torch.stack([value.float() for value in (skipped, *values.values(), *more.values())])
        self._copied: torch.cuda.Event | None = None
        if stacked.device.type == "cuda":
            stacked = stacked.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._values = stacked

    def read(self) -> tuple[dict[str, float], bool]:
        """Wait until the device has done the step; return its values, and whether it was skipped."""
        if self._copied:
            self._copied.synchronize()
        skipped, *numbers = self._values.tolist()
        values = zip(self._names, numbers, strict=True)
        return {name: value for name, value in values if not (skipped and name in self._more)}, skipped > 0


def count_skipped(
    counters: Counters,
    step: StepValues,
    metrics: Mapping[str, float],
    limit: int,
    scaler: torch.amp.GradScaler | None,
    checkpoints: Checkpoints,
) -> str | None:
    """Count a step that was skipped because its values are not finite; return what to say of it, if anything.

    Raises UserError if it is the `limit`-th in a row.
    """
    if scaler is not None:
        # fp16 finds its loss scale by occasional overflows; they are no fault while the scale can still fall.
        overflow = math.isfinite(metrics["loss"]) and scaler.get_scale() > 1
        scaler.update()
        if overflow:
            log.debug("step %d: fp16 overflow, loss scale now %g", step.number, scaler.get_scale())
            return None
    counters.skipped += 1
    counters.bad_in_a_row += 1
    values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    not_finite = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
    message = f"step {step.number}: not finite: {not_finite} (all: {values}; lr {step.rate:.3g})"
    if counters.bad_in_a_row < limit:
        return f"{message}; step skipped, {counters.bad_in_a_row} in a row"
    steps = checkpoints.steps()
    rescue = f"the last checkpoint, {checkpoints.path(steps[0])}, is intact" if steps else "no checkpoint yet"
    raise UserError(
        f"{message}; {counters.bad_in_a_row} such steps in a row (train.max_nonfinite), {rescue}; "
        "lower the learning rate, clip harder or look at the data"
    )
