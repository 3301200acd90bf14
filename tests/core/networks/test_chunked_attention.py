"""Attention in chunks of scores equals the formula, with all gradients, however long the chunks are."""

from dataclasses import replace

import pytest
import torch
from fake_cuda import fake_cuda, on_fake_cuda
from tiny import WINDOWED, tiny_encoder
from torch.nn import functional as F

from addp_core.networks import chunked_attention as module
from addp_core.networks.attention import DecomposedRelativePositions, RelativePositionTable, from_windows, to_windows
from addp_core.networks.chunked_attention import chunked_attention
from addp_core.networks.layers import Block

HEADS, ROWS, COLUMNS = 3, 5, 4
LENGTH = ROWS * COLUMNS


def inputs(kind, d_v=6):
    torch.manual_seed(0)
    shapes = [(2, HEADS, LENGTH, 6)] * 2 + [(2, HEADS, LENGTH, d_v)]
    shapes += [(1, HEADS, LENGTH, LENGTH)] if kind == "bias" else []
    shapes += [(2, HEADS, LENGTH, ROWS), (2, HEADS, LENGTH, COLUMNS)] if kind == "terms" else []
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return tensors[:3] + ([None, *tensors[3:]] if kind == "terms" else tensors[3:])


def reference(q, k, v, bias=None, vertical=None, horizontal=None):
    scores = q @ k.mT
    if bias is not None:
        scores = scores + bias
    if vertical is not None:
        scores = scores + (vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)).flatten(3)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("chunk", [1, LENGTH, 7 * LENGTH, LENGTH**2, 4 * LENGTH**2, 10**6])
@pytest.mark.parametrize("kind", ["none", "bias", "terms"])
def test_any_chunk_gives_the_formula_and_its_gradients(monkeypatch, kind, chunk):
    """From one query at a time to all at once; the last chunk is smaller than the others."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 8 * chunk)  # of float64
    tensors = inputs(kind)
    found, expected = chunked_attention(*tensors), reference(*tensors)
    torch.testing.assert_close(found, expected)
    wanted, d_out = [x for x in tensors if x is not None], torch.randn_like(found)
    gradients = zip(
        torch.autograd.grad(found, wanted, d_out), torch.autograd.grad(expected, wanted, d_out), strict=True
    )
    for found_gradient, expected_gradient in gradients:
        torch.testing.assert_close(found_gradient, expected_gradient, atol=1e-5, rtol=1e-5)  # sums are in float32


def test_values_may_have_another_width():
    tensors = inputs("none", d_v=3)
    torch.testing.assert_close(chunked_attention(*tensors), reference(*tensors))


def test_no_queries_give_no_outputs_and_no_gradient():
    """When every position is masked, the last block of the encoder has nothing to compute."""
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (0, 5, 5))

    out = chunked_attention(q, k, v)
    out.sum().backward()

    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert not k.grad.any()
    assert not v.grad.any()


def test_long_sequences_keep_no_scores(monkeypatch):
    def kept(chunk):
        monkeypatch.setattr(module, "CHUNK_BYTES", 8 * chunk)  # of float64
        output = chunked_attention(*inputs("terms"))  # its graph lives as long as it
        saved = output.grad_fn.next_functions[0][0].saved_tensors
        return max(x.numel() for x in saved if x is not None)

    assert kept(10**6) == 2 * HEADS * LENGTH**2
    assert kept(LENGTH) == 2 * HEADS * LENGTH * 6


@pytest.mark.parametrize("prefix", [0, 1])
def test_wider_queries_and_keys_have_the_scores_with_biases_as_products(prefix):
    positions = DecomposedRelativePositions((ROWS, COLUMNS), 6, prefix)
    for p in positions.parameters():
        torch.nn.init.normal_(p)
    q, k = torch.randn(2, 2, HEADS, prefix + LENGTH, 6).unbind(0)
    wide_q, wide_k = positions.product(q, k, 0.5, (ROWS, COLUMNS))
    torch.testing.assert_close(wide_q @ wide_k.mT, 0.5 * q @ k.mT + positions(q, (ROWS, COLUMNS)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["decomposed", "decomposed with a class token", "table"])
def test_a_block_attends_as_torch_does_with_the_bias_as_a_mask(kind, dtype):
    torch.manual_seed(0)
    prefix, grid = int("class" in kind), (ROWS, COLUMNS)
    block = Block(24, HEADS, 0.0, 0.0)
    block.relative = (
        RelativePositionTable(grid, HEADS, prefix) if kind == "table" else DecomposedRelativePositions(grid, 8, prefix)
    )
    for p in block.relative.parameters():
        torch.nn.init.normal_(p)
    q, k, v = torch.randn(3, 2, HEADS, prefix + LENGTH, 8).to(dtype).unbind(0)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = block.attn._attend_with_positions(q, k, v, block.relative, grid)
        bias = block.relative(q, grid)
    expected = F.scaled_dot_product_attention(*(x.float() for x in (q, k, v, bias)))
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(found.float(), expected, **close)


def test_windows_beyond_the_edge_hold_what_the_layer_makes_of_zeros():
    """Windows of the output, which is not computed beyond the edge, are the output of windows; so are gradients."""
    torch.manual_seed(0)
    block, grid, window = Block(24, HEADS, 0.0, 0.0), (ROWS, COLUMNS), 3
    block.relative = DecomposedRelativePositions((window, window), 8, 0)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    h = torch.randn(2, LENGTH, 24)
    found = block.attn(h, relative=block.relative, grid=grid, window=window)
    windows = block.attn(to_windows(h, grid, (window, window)), relative=block.relative, grid=(window, window))
    expected, d_out = from_windows(windows, grid, (window, window)), torch.randn_like(found)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    parameters = [*block.attn.parameters(), *block.relative.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, parameters, d_out) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_checkpointed_blocks_have_the_same_gradients():
    model = tiny_encoder(replace(WINDOWED, relative="decomposed")).train()
    images, gradients = torch.randn(1, 3, 32, 40), []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model.forward_maps(images, [-1])[0].square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(("precision", "has_bias"), [(torch.bfloat16, False), (torch.float32, True)])
def test_on_a_gpu_half_precision_needs_no_bias(monkeypatch, precision, has_bias):
    """Then torch's flash attention serves: queries, keys and values have one width, and there is no mask."""
    calls, attend = [], F.scaled_dot_product_attention

    def spy(q, k, v, mask=None, *args, **options):
        calls.append((mask is not None, {x.shape[-1] for x in (q, k, v)}))
        return attend(q, k, v, mask, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = tiny_encoder(replace(WINDOWED, relative="decomposed")).train().to(precision)  # there is no autocast here
    with fake_cuda() as device:
        images = torch.randn(1, 3, 32, 40, dtype=precision).to(device, non_blocking=True)
        features = on_fake_cuda(model).forward_maps(images, [-1])[0]
    assert features.device == device
    assert [found for found, _ in calls] == [has_bias] * len(model.blocks)
    assert all(len(widths) == 1 for _, widths in calls)


def test_training_in_bf16_without_positions_equals_torch():
    torch.manual_seed(0)
    attention, h = Block(24, HEADS, 0.0, 0.0).attn, torch.randn(2, LENGTH, 24)
    results = []
    for is_training in (True, False):  # without gradients, torch's attention serves
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(is_training):
            results.append(attention(h).float().detach())
    torch.testing.assert_close(*results, atol=1e-2, rtol=1e-2)
