"""A CUDA device that computes nothing, on any machine: shapes, types and devices as on a GPU, but no values.

Whatever would make the host wait for a GPU raises an error: `.item()`, `.tolist()`, `bool(tensor)`, `nonzero`, a mask
as an index, a blocking copy from the CPU. So does an operation on tensors of two devices, and a tensor of type float64,
which is slow on most GPUs and unknown to Apple's. Tensors on the CPU keep their
values, and there is no backward pass, for which torch wants a real device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)


class _FakeCuda(FakeTensorMode):
    """Computes nothing where a tensor is, or is to be, on the fake device, and everything else for real."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        to_cuda = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not to_cuda and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and to_cuda and not isinstance(args[0], FakeTensor):
            assert kwargs.get("non_blocking"), "a blocking copy to the device"
        result = super().__torch_dispatch__(func, types, args, kwargs)
        fakes = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        assert not any(each.dtype == torch.float64 and each.device.type == "cuda" for each in fakes), f"float64: {func}"
        return result


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Yield the device; tensors can be moved to it and used inside of the context."""
    with _FakeCuda():
        try:
            torch.zeros(1).to(CUDA, non_blocking=True)
        except RuntimeError as error:
            if "NVIDIA driver" not in str(error):
                raise
            pytest.skip(f"torch {torch.__version__} wants a driver for fake tensors too")  # 2.6
        yield CUDA


def on_fake_cuda(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers to the device, in place; returns it."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to(CUDA, non_blocking=True)
                part._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(CUDA, non_blocking=True)
    return module
