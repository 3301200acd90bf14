"""The precision of matrix products: the choices of recipes, and what `auto` stands for on a device and in a network."""

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

if TYPE_CHECKING:  # `addp <verb> --help` does without torch
    import torch
    from torch import nn

log = logging.getLogger("addp")

Precision = Annotated[Literal["fp32", "bf16", "fp16"], "precision of the networks' matrix products"]
PrecisionChoice = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    "precision of the networks' matrix products; weights stay in float32. auto: bf16 where the device multiplies it "
    "natively (GPUs from Ampere, CPUs with AVX512-BF16 or AMX) and the network is wide enough to gain, else fp32; "
    "fp16: GPUs only",
]
AUTO = "auto"
# Features per token from which `auto` takes bf16. On an EPYC with AVX512-BF16, one thread, torch 2.15, the networks of
# the recipes `cifar10`, 128 wide, train 1.5 to 1.8 times as fast in bf16. At 96, forward passes and training steps are
# 1.03 to 1.5 times as fast (docs/speed.md): these are networks of demonstrations, whose numbers are the same everywhere
# in fp32.
BF16_WIDTH = 128
MATRIX_UNIT = "amx_bf16"
NATIVE_CPU_FLAGS = frozenset({"avx512_bf16", MATRIX_UNIT})  # in /proc/cpuinfo
AMPERE = 8  # CUDA's compute capability from which tensor cores multiply bf16


def has_native_bf16(device: "torch.device") -> bool:
    """Return whether the device multiplies bf16 matrices itself, instead of converting them to float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= AMPERE if torch.version.hip is None else True
    return device.type == "cpu" and not NATIVE_CPU_FLAGS.isdisjoint(_cpu_flags())


def has_matrix_unit() -> bool:
    """Return whether the CPU multiplies bf16 tiles (AMX), several times as fast as vectors."""
    return MATRIX_UNIT in _cpu_flags()


@functools.cache
def _cpu_flags() -> set[str]:
    """Return the flags of the first processor; none on systems other than Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def matrix_width(*modules: "nn.Module") -> int:
    """Return the width of the networks' matrix products: of linear layers and convolutions, the smaller of a weight
    matrix's two sides. Half of all weights are in matrices of at least this width; 0 if there are none.
    """
    from torch import nn

    layers = [m for module in modules for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    sizes = sorted((min(len(layer.weight), layer.weight[0].numel()), layer.weight.numel()) for layer in layers)
    half, total = sum(count for _, count in sizes) / 2, 0
    for width, count in sizes:
        total += count
        if total >= half:
            return width
    return 0


def resolve_precision(choice: str, device: "torch.device", width: int, key: str = "precision") -> Precision:
    """Return the precision that a recipe's `key` asks for, and log what `auto` stands for.

    Processes that have joined a group take bf16 if the devices of all of them multiply it natively.

    Args:
        choice: the value of the key.
        device: of this process.
        width: of the matrix products (`matrix_width`).
        key: the full name of the key.
    """
    if choice != AUTO:
        return cast(Precision, choice)
    native = _on_all_processes(has_native_bf16(device))
    precision: Precision = "bf16" if native and width >= BF16_WIDTH else "fp32"
    if not native:
        reason = f"this {device.type} does not multiply bf16 natively"
    elif precision == "fp32":
        reason = f"matrices {width} wide, below {BF16_WIDTH}, gain little from bf16"
    else:
        reason = f"this {device.type} multiplies bf16 natively, and matrices are {width} wide"
    log.info("%s=auto: %s (%s)", key, precision, reason)
    return precision


def warn_if_not_native(precision: str, device: "torch.device") -> None:
    """Log that a run computes in bf16 on a device that has to emulate it, as after a move from another machine."""
    if precision == "bf16" and not has_native_bf16(device):
        log.warning(
            "train.precision=bf16: this %s does not multiply bf16 natively and is slow at it; a run that has begun "
            "goes on with it, for the same numbers up to rounding",
            device.type,
        )


def _on_all_processes(flag: bool) -> bool:
    """Return whether the flag is set on every process of the job; all of them get the same answer."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    if not PartialState._shared_state or PartialState().num_processes == 1:
        return flag
    return all(gather_object([flag]))
