"""The one place of switches that change how fast results come, not which: for training, generation and benchmarks."""

import ctypes
import platform
from contextlib import AbstractContextManager
from typing import Annotated, Literal

import torch
from torch import nn

from addp_core.networks.kernels import HAS_WINOGRAD, Conv3x3
from addp_core.networks.tokenizer import Tokenizer

Precision = Annotated[Literal["fp32", "bf16", "fp16"], "arithmetic of the networks"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
IMAGES = 8  # that a tokenizer handles at a time: more cost memory and gain nothing


def accelerate_model(model: nn.Module, compile: bool = False, channels_last: bool = False) -> None:
    """Switch on what pays on the device of `model`. Results change by rounding alone.

    compile: torch.compile. channels_last: the memory format of convolutions.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compile:
        # a tokenizer is called by its methods; what compiles is what they call
        for part in (model.encoder, model.decoder) if isinstance(model, Tokenizer) else (model,):
            part.compile()
    if next(model.parameters()).device.type != "cpu":
        return
    keep_freed_memory()
    winograd = HAS_WINOGRAD and not compile
    for module in model.modules():
        if isinstance(module, Tokenizer):
            module.chunk_size = IMAGES
        if isinstance(module, Conv3x3):
            module.winograd = winograd


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which the networks compute with this precision."""
    return torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor rather than hand it back page by page (elsewhere: nothing)."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
