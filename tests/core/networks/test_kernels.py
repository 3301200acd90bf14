"""Faster CPU implementations change results by rounding only."""

import pytest
import torch
from tiny import random_tensor
from torch import nn
from torch.nn import functional as F

from addp_core.networks.kernels import HAS_WINOGRAD, Conv3x3, avg_pool_2x2, norm_swish

nnpack = pytest.mark.skipif(not HAS_WINOGRAD, reason="this build of torch has no NNPACK")


@nnpack
@pytest.mark.parametrize(
    ("widths", "hw", "bias"),
    [((32, 48), (16, 18), True), ((64, 32), (45, 35), False), ((32, 32), (70, 66), False)],
)
@torch.no_grad()
def test_winograd_matches_the_direct_convolution(widths, hw, bias):
    conv = Conv3x3(*widths, bias=bias)
    x = random_tensor(3, widths[0], *hw)
    direct = conv(x)
    conv.winograd = True
    assert conv.uses_winograd(x, *hw)
    assert (conv(x) - direct).abs().max() < 1e-4 * direct.std()
    assert torch.equal(conv(x)[1:2], conv(x[1:2]))  # an image's result does not depend on its neighbors


def test_winograd_is_used_for_large_float32_maps_without_gradients():
    conv = Conv3x3(32, 32)
    conv.winograd = True
    x = random_tensor(1, 32, 32, 32)
    assert not conv.uses_winograd(x, 32, 32)  # gradients are enabled
    with torch.no_grad():
        assert conv.uses_winograd(x, 32, 32)
        assert not conv.uses_winograd(x, 8, 8)
        assert not conv.uses_winograd(x.double(), 32, 32)
        with torch.autocast("cpu", torch.bfloat16):
            assert not conv.uses_winograd(x, 32, 32)
    x.requires_grad_()
    conv(x).sum().backward()
    assert x.grad is not None


def test_pooling_and_norm_match_torch_with_and_without_gradients():
    x, norm = random_tensor(2, 32, 6, 4), nn.GroupNorm(32, 32)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(avg_pool_2x2(x), F.avg_pool2d(x, 2))
            torch.testing.assert_close(norm_swish(norm, x), F.silu(norm(x)))
