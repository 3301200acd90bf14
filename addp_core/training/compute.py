"""Switches that change how fast results are computed, but not the results beyond rounding: for training, generation and
benchmarks.
"""

import ctypes
import platform
from contextlib import AbstractContextManager
from typing import Annotated, Literal

import torch
from torch import nn

from addp_core.networks.kernels import HAS_WINOGRAD, Conv3x3
from addp_core.networks.tokenizer import Tokenizer

Precision = Annotated[Literal["fp32", "bf16", "fp16"], "precision of the networks' matrix products"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_CHUNK = 8  # images that a tokenizer processes at a time on a CPU; more take memory and are no faster


def accelerate_model(model: nn.Module, compile: bool = False, channels_last: bool = False) -> None:
    """Switch on what is faster on the device of `model`. Results change by rounding only.

    Args:
        model: is changed in place.
        compile: use torch.compile.
        channels_last: use this memory format in convolutions.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compile:
        # a tokenizer is called by its methods, so the modules that they call are compiled
        for part in (model.encoder, model.decoder) if isinstance(model, Tokenizer) else (model,):
            part.compile()
    if next(model.parameters()).device.type != "cpu":
        return
    keep_freed_memory()
    winograd = HAS_WINOGRAD and not compile
    for module in model.modules():
        if isinstance(module, Tokenizer):
            module.chunk_size = TOKENIZER_CHUNK
        if isinstance(module, Conv3x3):
            module.winograd = winograd


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the networks compute in this precision."""
    return torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of returning it page by page; no effect elsewhere."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
