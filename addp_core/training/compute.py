"""Switches that change how fast results are computed, but not the results beyond rounding, and the precision: for
training, generation, evaluation and benchmarks.
"""

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator

import torch
from torch import nn

from addp_core.method.addp import Denoiser
from addp_core.networks.kernels import HAS_WINOGRAD, Conv3x3
from addp_core.networks.predictor import TokenPredictor
from addp_core.networks.tokenizer import Tokenizer
from addp_core.training.kernel_choices import kernel_choices

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_PIXELS = 4 * 256**2  # at a time in a tokenizer on a CPU: more leave the cache, fewer repeat a call's work


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
        for module in model.modules():
            if isinstance(module, (Denoiser, TokenPredictor)):
                module.compiled = True
    if next(model.parameters()).device.type != "cpu":
        return
    keep_freed_memory()
    winograd = HAS_WINOGRAD and not compile
    for module in model.modules():
        if isinstance(module, Tokenizer):
            module.chunk_pixels = TOKENIZER_PIXELS
        if isinstance(module, Conv3x3):
            module.winograd, module.faster = winograd, kernel_choices().faster


@contextlib.contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Let the networks compute in this precision within the context."""
    with tf32_for(precision), torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES):
        yield


@contextlib.contextmanager
def tf32_for(precision: str) -> Iterator[None]:
    """Keep GPUs from rounding float32 products to TF32 within the context, if the precision is "fp32".

    TF32 keeps 10 of 23 bits of the mantissa, and PyTorch uses it in convolutions unless told otherwise. In the other
    precisions it is allowed there: what they leave in float32 is then still more precise than they are.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = before[0] and precision != "fp32", precision != "fp32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@functools.cache
def turn_off_tf32() -> None:
    """Turn TF32 off for this process, once: commands without a precision compute in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of returning it page by page; no effect elsewhere."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
