"""What is only there for speed changes results by rounding alone."""

import pytest
import torch
from tiny import tiny_addp
from torch import nn
from torch.nn import functional as F

from addp_core.base.rng import generator
from addp_core.method.sampler import sample
from addp_core.networks.kernels import HAS_WINOGRAD, Conv3x3, avg_pool_2x2, norm_swish
from addp_core.networks.layers import Block, Dropout, MaskPositions, gather_tokens, scatter_tokens
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig
from addp_core.training import compute
from addp_core.training.compute import accelerate_model

nnpack = pytest.mark.skipif(not HAS_WINOGRAD, reason="this build of torch has no NNPACK")


def spread(*shape, seed="x"):
    return torch.randn(*shape, generator=generator(seed))


@nnpack
@pytest.mark.parametrize(
    ("widths", "hw", "bias"),
    [((32, 48), (16, 18), True), ((64, 32), (45, 35), False), ((32, 32), (70, 66), False)],
)
@torch.no_grad()
def test_winograd_is_a_convolution(widths, hw, bias):
    conv = Conv3x3(*widths, bias=bias)
    x = spread(3, widths[0], *hw)
    direct = conv(x)
    conv.winograd = True
    assert conv.uses_winograd(x, *hw)
    assert (conv(x) - direct).abs().max() < 1e-4 * direct.std()
    assert torch.equal(conv(x)[1:2], conv(x[1:2]))  # an image's result does not depend on its neighbours


def test_winograd_is_left_alone_where_it_does_not_serve():
    conv = Conv3x3(32, 32)
    conv.winograd = True
    x = spread(1, 32, 32, 32)
    assert not conv.uses_winograd(x, 32, 32)  # gradients
    with torch.no_grad():
        assert conv.uses_winograd(x, 32, 32)
        assert not conv.uses_winograd(x, 8, 8)
        assert not conv.uses_winograd(x.double(), 32, 32)
        with torch.autocast("cpu", torch.bfloat16):
            assert not conv.uses_winograd(x, 32, 32)
    x.requires_grad_()
    conv(x).sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_tokenizer_is_the_same_when_accelerated():
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(width=32, multipliers=(1, 2), blocks=1, codebook=16, dim=8)).eval()
    images = torch.rand(2, 3, 64, 48, generator=generator("images"))
    h, codes = tokenizer.encoder(images), spread(2, 8, 32, 24, seed="codes")
    expected = tokenizer.decode(codes)
    accelerate_model(tokenizer)
    found = tokenizer.encoder(images[:1])
    assert (found - h[:1]).abs().max() < 1e-3 * h.std()
    assert (tokenizer.decode(codes) - expected).abs().max() < 1e-3 * expected.std()
    assert tokenizer.encode(images).shape == (2, 32 * 24)


def test_sampling_is_the_same_when_accelerated():
    model = tiny_addp()
    before = sample(model, 2, steps=3, temperature=0.0, top_p=0.0)
    accelerate_model(model)
    torch.testing.assert_close(sample(model, 2, steps=3, temperature=0.0, top_p=0.0), before, atol=1e-4, rtol=0)


def test_without_glibc_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(compute.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(compute.ctypes, "CDLL", None)
    compute.keep_freed_memory()


def test_pooling_and_norm_match_torch_with_and_without_gradients():
    x, norm = spread(2, 32, 6, 4), nn.GroupNorm(32, 32)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(avg_pool_2x2(x), F.avg_pool2d(x, 2))
            torch.testing.assert_close(norm_swish(norm, x), F.silu(norm(x)))


# -------------------- dropout


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    drop, x = Dropout(p).train(), torch.ones(1001, 999)
    y = drop(x)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
    assert y.mean().item() == pytest.approx(1, abs=2e-3)
    assert len(y.unique()) == 2
    rows, columns = (y == 0).float().mean(0), (y == 0).float().mean(1)
    assert rows.std().item() == pytest.approx((p * (1 - p) / 1001) ** 0.5, rel=0.1)  # as independent draws vary
    assert columns.std().item() == pytest.approx((p * (1 - p) / 999) ** 0.5, rel=0.1)


def test_dropout_follows_the_seed_and_its_gradient_the_mask():
    drop, x = Dropout(0.3).train(), spread(7, 5).requires_grad_()
    torch.manual_seed(1)
    first = drop(x)
    torch.manual_seed(1)
    assert torch.equal(drop(x), first)
    assert not torch.equal(drop(x), first)
    first.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), first.detach())


@pytest.mark.parametrize("p", [0.0, 1e-7])
def test_dropout_of_nothing(p):
    x = spread(4, 4)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    torch.testing.assert_close(Dropout(p).train()(x), x)


# -------------------- blocks that compute some positions alone


def test_block_at_positions_equals_those_rows_of_the_whole():
    torch.manual_seed(0)
    block, x, at = Block(16, 2, 0.0, 0.0), spread(3, 7, 16), torch.tensor([[0, 6], [5, 5], [2, 1]])
    mask = torch.rand(3, 1, 1, 7) < 0.8
    torch.testing.assert_close(block(x, mask, at), gather_tokens(block(x, mask), at))
    assert block(x, None, at[:, :0]).shape == (3, 0, 16)


def test_attention_with_dropout_is_the_same_attention():
    torch.manual_seed(0)
    block, x = Block(16, 2, 0.0, 0.0), spread(3, 7, 16)
    mask = torch.rand(3, 1, 1, 7) < 0.8
    fused = block(x, mask)
    block.attn.attn_drop.p = 1e-7  # takes the way of dropout and drops nothing
    torch.testing.assert_close(block.train()(x, mask), fused)


def test_block_is_timms():
    torch.manual_seed(0)
    block, x = Block(16, 2, 0.0, 0.0).eval(), spread(3, 7, 16)
    torch.testing.assert_close(block(x), super(Block, block).forward(x))


def test_positions_of_rows_that_differ():
    mask = torch.tensor([[True, False, True, False], [True, True, True, False]])
    positions = MaskPositions.from_mask(mask)
    assert positions.visible[positions.visible_valid].tolist() == [1, 3, 3]
    assert positions.masked[positions.masked_valid].tolist() == [0, 2, 0, 1, 2]
    x = spread(2, 4, 3)
    torch.testing.assert_close(positions.unpad_masked(gather_tokens(x, positions.masked)), x[mask])
    even = MaskPositions.from_mask(mask[:1])
    assert (even.visible.tolist(), even.visible_valid) == ([[1, 3]], None)
    torch.testing.assert_close(scatter_tokens(gather_tokens(x[:1], even.visible), even.visible, 4), x[:1] * ~mask[:1, :, None])
