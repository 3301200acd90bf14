"""Seconds of the parts of a step (by events on a GPU), peak memory, and the machine's best matrix product."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}  # of the square products tried
TRIES, PATIENCE = 8, 4.0  # of each side; seconds


class Parts:
    """Adds up the seconds spent in named parts. A part inside another is taken off the outer one, but not off
    `whole`.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[str, str, Any, Any]] = []  # part, enclosing part, start, end
        self.open: list[str] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        outer = self.open[-1] if self.open else ""
        self.open.append(part)
        start = self._now()
        try:
            yield
        finally:
            self.spans.append((part, outer, start, self._now()))
            self.open.pop()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Let the time of the method or module `owner.name` count towards `part`, wherever it is called through
        `owner`.
        """
        owner.__dict__[name] = _Timed(getattr(owner, name), self, part)  # before a module's own children

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for part, outer, start, end in self.spans:
            span = start.elapsed_time(end) / 1000 if self.cuda else end - start
            seconds[part] += span
            if outer and outer != "whole":
                seconds[outer] -= span
        self.spans.clear()
        return dict(seconds)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Timed:
    """A callable whose calls are timed and which otherwise looks like what it stands for."""

    def __init__(self, of: Callable, parts: Parts, part: str):
        self._of, self._parts, self._part = of, parts, part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._parts(self._part):
            return self._of(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark becomes the present size


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that CUDA tensors took, or the high-water mark of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # kilobytes, except on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """GFLOP a second of square matrix products by side, each the best of some tries; sides that would take long where
    there is no fast way for this type are left out.
    """
    rates, parts = {}, Parts(device)
    for side in SIDES[device.type]:
        a = torch.randn(side, side, device=device).to(dtype)
        seconds: list[float] = []
        while len(seconds) < TRIES and sum(seconds) < PATIENCE:
            with parts("product"):
                a @ a
            seconds.append(parts.take()["product"])
        rates[side] = 2 * side**3 / min(seconds) / 1e9
        if sum(seconds) >= PATIENCE:
            break
    return rates
