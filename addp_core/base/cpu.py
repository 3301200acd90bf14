"""The processor: its name, and the cores that this process may use."""

import os
import platform
from contextlib import suppress
from pathlib import Path


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use: in a container or job, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name, as precisely as the system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
