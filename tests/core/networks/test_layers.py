"""Dropout, transformer blocks that compute some positions only, and positions of masks."""

from functools import partial

import pytest
import torch
from timm.models import vision_transformer
from tiny import nested_masks, random_images, random_tensor, tiny_addp

from addp_core.networks.layers import (
    Block,
    Dropout,
    MaskPositions,
    checkpoint_blocks,
    gather_tokens,
    scatter_tokens,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_has_the_right_rate_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    drop, x = Dropout(p).train(), torch.ones(1001, 999, dtype=dtype)
    y = drop(x).float()
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
    assert y.mean().item() == pytest.approx(1, abs=2e-3)
    assert len(y.unique()) == 2
    rows, columns = (y == 0).float().mean(0), (y == 0).float().mean(1)
    assert rows.std().item() == pytest.approx((p * (1 - p) / 1001) ** 0.5, rel=0.1)  # the spread of independent draws
    assert columns.std().item() == pytest.approx((p * (1 - p) / 999) ** 0.5, rel=0.1)


def test_dropout_follows_the_seed_and_masks_the_gradient():
    drop, x = Dropout(0.3).train(), random_tensor(7, 5).requires_grad_()
    torch.manual_seed(1)
    first = drop(x)
    torch.manual_seed(1)
    assert torch.equal(drop(x), first)
    assert not torch.equal(drop(x), first)
    first.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), first.detach())


@pytest.mark.parametrize("p", [0.0, 1e-7])
def test_inactive_dropout_is_the_identity(p):
    x = random_tensor(4, 4)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    torch.testing.assert_close(Dropout(p).train()(x), x)


def test_block_at_some_positions_matches_the_full_block():
    torch.manual_seed(0)
    block, x, queries = Block(16, 2, 0.0, 0.0), random_tensor(3, 7, 16), torch.tensor([[0, 6], [5, 5], [2, 1]])
    mask = torch.rand(3, 1, 1, 7) < 0.8
    torch.testing.assert_close(block(x, mask, queries), gather_tokens(block(x, mask), queries))
    assert block(x, None, queries[:, :0]).shape == (3, 0, 16)


def test_attention_with_dropout_matches_fused_attention():
    torch.manual_seed(0)
    block, x = Block(16, 2, 0.0, 0.0), random_tensor(3, 7, 16)
    mask = torch.rand(3, 1, 1, 7) < 0.8
    fused = block(x, mask)
    block.attn.attn_drop.p = 1e-7  # takes the branch for dropout but drops nothing
    torch.testing.assert_close(block.train()(x, mask), fused)


def test_block_matches_timm():
    torch.manual_seed(0)
    block, x = Block(16, 2, 0.0, 0.0).eval(), random_tensor(3, 7, 16)
    expected = vision_transformer.Block(16, 2, qkv_bias=True).eval()
    expected.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), expected(x))


def test_mask_positions_with_rows_of_different_length():
    mask = torch.tensor([[True, False, True, False], [True, True, True, False]])
    positions = MaskPositions.from_mask(mask)
    assert positions.visible[positions.visible_valid].tolist() == [1, 3, 3]
    assert positions.masked.flatten()[positions.masked_valid].tolist() == [0, 2, 0, 1, 2]
    x = random_tensor(2, 4, 3)
    torch.testing.assert_close(positions.unpad_masked(gather_tokens(x, positions.masked)), x[mask])
    single_row = MaskPositions.from_mask(mask[:1])
    assert (single_row.visible.tolist(), single_row.visible_valid) == ([[1, 3]], None)
    torch.testing.assert_close(
        scatter_tokens(gather_tokens(x[:1], single_row.visible), single_row.visible, 4), x[:1] * ~mask[:1, :, None]
    )


def count_elements(counts, tensor):
    """Remember the size of a tensor that is stored for the backward pass."""
    counts.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_gives_the_same_gradients_and_stores_less(precision):
    """With dropout, and with the padding of rows that differ in their number of reliable ids."""
    model, masks = tiny_addp(dropout=0.1), nested_masks()
    masks[0][0, masks[0][0].nonzero()[0]] = False
    found: dict[bool, tuple[int, list[torch.Tensor]]] = {}
    for checkpointing in (False, True):
        stored: list[int] = []
        model.train().zero_grad()
        checkpoint_blocks(model.denoiser, checkpointing)
        torch.manual_seed(0)
        count = torch.autograd.graph.saved_tensors_hooks(partial(count_elements, stored), lambda x: x)
        with count, torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = model.training_loss(model.denoiser, random_images(), *masks)
        loss.backward()
        gradients = [p.grad.clone() for p in model.denoiser.parameters() if p.grad is not None]
        found[checkpointing] = sum(stored), [loss.detach(), *gradients]
    for stored, checkpointed in zip(found[False][1], found[True][1], strict=True):
        assert torch.equal(stored, checkpointed)
    assert found[True][0] < 0.6 * found[False][0]
