"""Timing of the parts of a step (by events on a GPU), peak memory, and the machine's fastest matrix product."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

MATMUL_SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}  # of the square products that are timed
MATMUL_REPEATS, MATMUL_SECONDS = 8, 4.0  # at most, for each side


class PartTimer:
    """Sums the seconds spent in named parts.

    The time of a part inside another is subtracted from the outer one, unless the outer one is `whole`.
    """

    def __init__(self, device: torch.device):
        self.cuda, self.mps = device.type == "cuda", device.type == "mps"
        self.spans: list[tuple[str, str, Any, Any]] = []  # part, enclosing part, start, end
        self.open: list[str] = []  # the parts that have started and not ended

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the block as `part`."""
        outer = self.open[-1] if self.open else ""
        self.open.append(part)
        start = self._now()
        try:
            yield
        finally:
            self.spans.append((part, outer, start, self._now()))
            self.open.pop()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time all calls of the method or module `owner.name` as `part`."""
        owner.__dict__[name] = _Timed(getattr(owner, name), self, part)  # found before a module's own children

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
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
        if self.mps:
            torch.mps.synchronize()
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Timed:
    """Wraps a callable to time its calls; its attributes are the callable's."""

    def __init__(self, function: Callable[..., Any], timer: PartTimer, part: str):
        self._function, self._timer, self._part = function, timer, part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._timer(self._part):
            return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def reset_peak_memory(device: torch.device) -> None:
    """Reset what `peak_memory` measures, if the operating system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark becomes the current size


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of CUDA tensors, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # the fallback is in kilobytes, except on macOS
    fallback = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _process_status("VmHWM") or fallback


def used_memory(device: torch.device) -> int:
    """Return the memory in use in bytes: of CUDA tensors, or on a CPU of the process (0 where it is not known)."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _process_status("VmRSS")


def _process_status(entry: str) -> int:
    """Return an entry of /proc/self/status in bytes; 0 on systems other than Linux."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{entry}:"):
                return int(line.split()[1]) * 1024
    return 0


def matmul_peak(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """Return GFLOP/s of square matrix products by side, each the fastest of several repeats.

    Larger sides are left out once a side has reached its time limit, as with types that the device emulates.
    """
    speeds, timer = {}, PartTimer(device)
    for side in MATMUL_SIDES[device.type]:
        a = torch.randn(side, side, device=device).to(dtype)
        seconds: list[float] = []
        while len(seconds) < MATMUL_REPEATS and sum(seconds) < MATMUL_SECONDS:
            with timer("product"):
                a @ a
            seconds.append(timer.take()["product"])
        speeds[side] = 2 * side**3 / min(seconds) / 1e9
        if sum(seconds) >= MATMUL_SECONDS:
            break
    return speeds
