"""Which of several implementations of a layer is the fastest on this CPU, measured once for each shape.

They differ by rounding, so that a run has to go on with those that it began with: its checkpoints hold the choices. New
runs on the same machine take the choices of a file in the user's cache, one for each processor, version of torch and
number of threads. Several processes of a run would not measure the same, so they do not measure.
"""

import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from addp_core.base.cpu import cpu_name
from addp_core.base.files import write_atomically
from addp_core.base.launch import world_size
from addp_core.base.paths import user_cache
from addp_core.networks.kernels import DIRECT, WINOGRAD
from addp_core.training.precision import has_matrix_unit

log = logging.getLogger("addp")

SWITCH = "ADDP_MEASURE_KERNELS"  # environment variable; 0: take what is faster on most CPUs, without measuring
REPEATS = 3  # timed runs of each implementation, in turns; the fastest counts


class KernelChoices:
    """The choices of this process: name of a shape -> name of its implementation."""

    def __init__(self) -> None:
        self.table: dict[str, str] = {}
        self.begin({})

    def __deepcopy__(self, memo: object) -> "KernelChoices":
        return self  # copies of a model share the choices

    def begin(self, stored: Mapping[str, str] | None) -> None:
        """Begin a run with the choices that its checkpoint has stored; None: it is from before there was a choice."""
        self.measures = stored is not None and world_size() == 1 and os.environ.get(SWITCH, "1") != "0"
        self.default = DIRECT if stored is None or has_matrix_unit() else WINOGRAD
        self.table = (_read(_cache_file()) if self.measures else {}) | dict(stored or {})

    def faster(self, shape: str, candidates: Mapping[str, Callable[[], Tensor]]) -> str:
        """Return the name of the fastest implementation of a shape; it is measured if it is not known."""
        if shape not in self.table:
            if not self.measures:
                return self.default
            self.table[shape] = _fastest(candidates)
            log.debug("%s: %s is the fastest", shape, self.table[shape])
            file = _cache_file()
            with suppress(OSError):  # then the next run measures again
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(_read(file) | self.table, indent=1).encode())
        return self.table[shape]


@functools.cache
def kernel_choices() -> KernelChoices:
    """Return the choices of this process."""
    return KernelChoices()


def _fastest(candidates: Mapping[str, Callable[[], Tensor]]) -> str:
    seconds = dict.fromkeys(candidates, float("inf"))
    for repeat in range(-1, REPEATS):  # the first run allocates memory
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            if repeat >= 0:
                seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return min(seconds, key=seconds.__getitem__)


def _cache_file() -> Path:
    name = f"{cpu_name()}-torch-{torch.__version__}-{torch.get_num_threads()}-threads"
    return user_cache("kernels") / f"{re.sub(r'[^A-Za-z0-9.+]+', '-', name)}.json"


def _read(file: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text())
        return {shape: name for shape, name in content.items() if name in (DIRECT, WINOGRAD)}
    return {}
