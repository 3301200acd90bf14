"""Attention for dense prediction: windows and relative positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import RelPosBias, resize_rel_pos_bias_table
from timm.models.beit import Attention
from tiny import WINDOWED, tiny_encoder

from addp_core.networks.attention import (
    AttentionConfig,
    DecomposedRelativePositions,
    RelativePositionTable,
    from_windows,
    resize_bias_table,
    to_windows,
)
from addp_core.networks.layers import Block

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@given(rows=st.integers(1, 7), columns=st.integers(1, 7), window=st.integers(1, 5))
def test_windows_round_trip(rows, columns, window):
    x = torch.arange(2 * rows * columns * 3.0).view(2, rows * columns, 3)
    windows = to_windows(x, (rows, columns), (window, window))
    assert windows.shape == (2 * -(-rows // window) * -(-columns // window), window * window, 3)
    assert torch.equal(from_windows(windows, (rows, columns), (window, window)), x)


def test_windows_at_the_edge_are_padded_with_zeros():
    """In a 4 x 5 grid with windows of 3, the second window holds columns 3 and 4 and zeros beyond."""
    x = torch.arange(1.0, 21).view(1, 20, 1)
    windows = to_windows(x, (4, 5), (3, 3))[..., 0]
    assert windows[1].tolist() == [4, 5, 0, 9, 10, 0, 14, 15, 0]
    assert windows[3].tolist() == [19, 20, 0, 0, 0, 0, 0, 0, 0]


def test_global_blocks_are_evenly_spaced():
    base = AttentionConfig(window=14, class_token=False).windows(12)
    assert [i for i, window in enumerate(base) if not window] == [2, 5, 8, 11]
    large = AttentionConfig(window=14, class_token=False).windows(24)
    assert [i for i, window in enumerate(large) if not window] == [5, 11, 17, 23]
    assert AttentionConfig().windows(3) == [0, 0, 0]
    with pytest.raises(ValueError, match="class_token: found true"):
        AttentionConfig(window=14)


def test_patches_attend_to_their_window_only():
    model = tiny_encoder(WINDOWED, depth=1)
    model.blocks[0].window = 3
    images = torch.randn(1, 3, 32, 40, requires_grad=True)
    model.forward_maps(images, [0])[0][0, :, 0, 4].sum().backward()
    attended = images.grad.abs().sum((0, 1)) > 0
    assert attended[:24, 24:].all()
    assert not attended[24:].any()
    assert not attended[:, :24].any()


def test_decomposed_positions_match_their_definition():
    rows, columns, d, prefix = 2, 3, 4, 1
    module = DecomposedRelativePositions((rows, columns), d, prefix)
    torch.nn.init.normal_(module.rel_pos_h)
    torch.nn.init.normal_(module.rel_pos_w)
    q = torch.randn(2, 3, prefix + rows * columns, d)
    expected = torch.zeros(2, 3, 7, 7)
    patches = [(i, j) for i in range(rows) for j in range(columns)]
    for a, (ai, aj) in enumerate(patches):
        for b, (bi, bj) in enumerate(patches):
            offset = module.rel_pos_h[ai - bi + rows - 1] + module.rel_pos_w[aj - bj + columns - 1]
            expected[:, :, prefix + a, prefix + b] = q[:, :, prefix + a] @ offset
    torch.testing.assert_close(module(q, (rows, columns)), expected)


def test_decomposed_positions_are_interpolated_for_other_grids():
    module = DecomposedRelativePositions((3, 3), 1, 0)
    with torch.no_grad():
        module.rel_pos_h.copy_(torch.arange(5.0)[:, None])  # interpolation keeps a ramp monotonic
    bias = module(torch.ones(1, 1, 25, 1), (5, 5)).view(5, 5, 5, 5)[:, 0, :, 0]
    assert (bias[:, 0].diff() > 0).all()
    assert (bias[0].diff() < 0).all()
    assert bias.min() >= 0
    assert bias.max() <= 4
    torch.testing.assert_close(bias.diagonal(), torch.full((5,), 2.0))  # offset 0: the middle of the table


@pytest.mark.parametrize("prefix", [0, 1])
def test_bias_table_matches_timm(prefix):
    timm_table, table = RelPosBias((3, 4), 2, prefix), RelativePositionTable((3, 4), 2, prefix)
    torch.nn.init.normal_(timm_table.relative_position_bias_table)
    table.load_state_dict(timm_table.state_dict())
    q = torch.zeros(1, 2, 12 + prefix, 5)
    torch.testing.assert_close(table(q, (3, 4)), timm_table.get_bias())


def test_the_last_entries_of_a_bias_table_are_the_class_tokens():
    """BEiT's layout: one entry per offset of query and key, then class to patch, patch to class, class to class."""
    rows, columns = 3, 4
    table = RelativePositionTable((rows, columns), 1, 1)
    entries = len(table.relative_position_bias_table)
    assert entries == (2 * rows - 1) * (2 * columns - 1) + 3
    with torch.no_grad():
        table.relative_position_bias_table.copy_(torch.arange(entries)[:, None])
    bias = table(torch.zeros(1, 1, 13, 5), (rows, columns))[0, 0].int()
    assert bias[0].tolist() == [entries - 1] + [entries - 3] * 12
    assert bias[1:, 0].tolist() == [entries - 2] * 12
    position = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    vertical, horizontal = (position[:, None] - position[None]).unbind(2)
    assert torch.equal(bias[1:, 1:], (vertical + rows - 1) * (2 * columns - 1) + horizontal + columns - 1)


def test_attention_with_a_bias_table_matches_beit():
    torch.manual_seed(0)
    beit = Attention(16, 2, qkv_bias=True, window_size=(3, 4))
    for p in beit.parameters():
        torch.nn.init.normal_(p, std=0.3)
    block = Block(16, 2, 0.0, 0.0)
    block.relative = RelativePositionTable((3, 4), 2, 1)
    with torch.no_grad():
        block.attn.qkv.weight.copy_(beit.qkv.weight)
        block.attn.qkv.bias.copy_(torch.cat([beit.q_bias, torch.zeros(16), beit.v_bias]))
        block.relative.relative_position_bias_table.copy_(beit.relative_position_bias_table)
    block.attn.proj.load_state_dict(beit.proj.state_dict())
    x = torch.randn(2, 13, 16)
    torch.testing.assert_close(block.attn(x, relative=block.relative, grid=(3, 4)), beit(x), **CLOSE)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("old", "new"), [(4, 4), (4, 6), (7, 14), (14, 16)])
def test_resized_bias_table_matches_timm(prefix, old, new):
    table = torch.randn((2 * old - 1) ** 2 + 3 * prefix, 2)
    shape = ((2 * new - 1) ** 2 + 3 * prefix, 2)
    expected = resize_rel_pos_bias_table(table, (new, new), shape)
    torch.testing.assert_close(resize_bias_table(table, (old, old), (new, new), prefix), expected, atol=1e-4, rtol=1e-4)


def test_bias_table_is_resized_between_oblong_grids():
    """A constant stays constant, the class token's entries stay, and offset zero keeps its bias."""
    table = torch.randn(3 * 9 + 3, 2)
    large = resize_bias_table(table, (2, 5), (4, 6), 1)
    assert large.shape == (7 * 11 + 3, 2)
    assert torch.equal(large[-3:], table[-3:])
    torch.testing.assert_close(large[7 * 11 // 2], table[3 * 9 // 2])
    torch.testing.assert_close(resize_bias_table(torch.ones(27, 2), (2, 5), (4, 6), 0), torch.ones(77, 2))
    assert resize_bias_table(torch.randn(4, 1), (1, 1), (2, 2), 1).shape == (12, 1)
