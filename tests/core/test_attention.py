"""How the blocks of dense prediction attend: windows, relative positions, any size; and reading weights for them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import fails, same
from timm.layers import RelPosBias, resize_rel_pos_bias_table
from timm.models.beit import Attention
from tiny import tiny_addp

from addp_core import load_encoder, save_model
from addp_core.networks.attention import (
    AttentionConfig,
    DecomposedRelativePositions,
    RelativePositionTable,
    from_windows,
    resize_bias_table,
    to_windows,
)
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.networks.layers import Block

WINDOWED = AttentionConfig(window=3, global_blocks=2, class_token=False)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def encoder(attention, size=(32, 40), dynamic=False, depth=4, **options):
    """Over 4 x 5 patches, with relative positions away from zero."""
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(16, depth, 2, **options), size, 8, attention, dynamic)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".relative." in name:
                p.normal_()
    return model.eval()


# -------------------- windows


@given(rows=st.integers(1, 7), columns=st.integers(1, 7), window=st.integers(1, 5))
def test_windows_round_trip(rows, columns, window):
    x = torch.arange(2 * rows * columns * 3.0).view(2, rows * columns, 3)
    cut = to_windows(x, (rows, columns), window)
    assert cut.shape == (2 * -(-rows // window) * -(-columns // window), window * window, 3)
    assert torch.equal(from_windows(cut, (rows, columns), window), x)


def test_what_lies_in_a_window():
    """Of a 4 x 5 grid in windows of 3: the second holds columns 3 and 4, and zeros beyond."""
    x = torch.arange(1.0, 21).view(1, 20, 1)
    windows = to_windows(x, (4, 5), 3)[..., 0]
    assert windows[1].tolist() == [4, 5, 0, 9, 10, 0, 14, 15, 0]
    assert windows[3].tolist() == [19, 20, 0, 0, 0, 0, 0, 0, 0]


def test_which_blocks_are_global():
    twelve = AttentionConfig(window=14, class_token=False).windows(12)
    assert [i for i, window in enumerate(twelve) if not window] == [2, 5, 8, 11]
    many = AttentionConfig(window=14, class_token=False).windows(24)
    assert [i for i, window in enumerate(many) if not window] == [5, 11, 17, 23]
    assert AttentionConfig().windows(3) == [0, 0, 0]
    with pytest.raises(ValueError, match="class_token: found true"):
        AttentionConfig(window=14)


def test_patches_see_their_window_alone():
    model = encoder(WINDOWED, depth=1)
    model.blocks[0].window = 3
    images = torch.randn(1, 3, 32, 40, requires_grad=True)
    model.forward_maps(images, [0])[0][0, :, 0, 4].sum().backward()
    seen = images.grad.abs().sum((0, 1)) > 0
    assert seen[:24, 24:].all()
    assert not seen[24:].any()
    assert not seen[:, :24].any()


# -------------------- relative positions


def test_decomposed_positions_by_definition():
    rows, columns, d, prefix = 2, 3, 4, 1
    module = DecomposedRelativePositions((rows, columns), d, prefix)
    torch.nn.init.normal_(module.rel_pos_h)
    torch.nn.init.normal_(module.rel_pos_w)
    q = torch.randn(2, 3, prefix + rows * columns, d)
    wanted = torch.zeros(2, 3, 7, 7)
    places = [(i, j) for i in range(rows) for j in range(columns)]
    for a, (ai, aj) in enumerate(places):
        for b, (bi, bj) in enumerate(places):
            offset = module.rel_pos_h[ai - bi + rows - 1] + module.rel_pos_w[aj - bj + columns - 1]
            wanted[:, :, prefix + a, prefix + b] = q[:, :, prefix + a] @ offset
    torch.testing.assert_close(module(q, (rows, columns)), wanted)


def test_decomposed_positions_of_another_grid_interpolate():
    module = DecomposedRelativePositions((3, 3), 1, 0)
    with torch.no_grad():
        module.rel_pos_h.copy_(torch.arange(5.0)[:, None])  # a ramp stays a ramp
    bias = module(torch.ones(1, 1, 25, 1), (5, 5)).view(5, 5, 5, 5)[:, 0, :, 0]
    assert (bias[:, 0].diff() > 0).all()
    assert (bias[0].diff() < 0).all()
    assert bias.min() >= 0
    assert bias.max() <= 4
    torch.testing.assert_close(bias.diagonal(), torch.full((5,), 2.0))  # offset 0: the middle of the table


@pytest.mark.parametrize("prefix", [0, 1])
def test_tables_are_timms(prefix):
    theirs, ours = RelPosBias((3, 4), 2, prefix), RelativePositionTable((3, 4), 2, prefix)
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours.load_state_dict(theirs.state_dict())
    q = torch.zeros(1, 2, 12 + prefix, 5)
    torch.testing.assert_close(ours(q, (3, 4)), theirs.get_bias())


def test_attention_with_a_table_is_beits():
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
    torch.testing.assert_close(block.attend(x, None, None, (3, 4)), beit(x), **CLOSE)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("old", "new"), [(4, 4), (4, 6), (7, 14), (14, 16)])
def test_tables_of_other_sizes_are_timms(prefix, old, new):
    table = torch.randn((2 * old - 1) ** 2 + 3 * prefix, 2)
    shape = ((2 * new - 1) ** 2 + 3 * prefix, 2)
    wanted = resize_rel_pos_bias_table(table, (new, new), shape)
    torch.testing.assert_close(resize_bias_table(table, (old, old), (new, new), prefix), wanted, atol=1e-4, rtol=1e-4)


def test_tables_between_oblong_grids():
    """A constant stays one, the class token's entries stay, and offset zero keeps its bias."""
    table = torch.randn(3 * 9 + 3, 2)
    large = resize_bias_table(table, (2, 5), (4, 6), 1)
    assert large.shape == (7 * 11 + 3, 2)
    assert torch.equal(large[-3:], table[-3:])
    torch.testing.assert_close(large[7 * 11 // 2], table[3 * 9 // 2])
    torch.testing.assert_close(resize_bias_table(torch.ones(27, 2), (2, 5), (4, 6), 0), torch.ones(77, 2))
    assert resize_bias_table(torch.randn(4, 1), (1, 1), (2, 2), 1).shape == (12, 1)


# -------------------- the encoder


@pytest.mark.parametrize(
    "attention",
    [AttentionConfig(), AttentionConfig(relative="table"), AttentionConfig(relative="decomposed"), WINDOWED],
    ids=["plain", "table", "decomposed", "windows"],
)
def test_dynamic_sizes(attention):
    fixed, dynamic = encoder(attention), encoder(attention, dynamic=True)
    images = torch.randn(1, 3, 32, 40)
    torch.testing.assert_close(dynamic.forward_features(images), fixed.forward_features(images))
    (found,) = dynamic.forward_maps(torch.randn(1, 3, 48, 24), [-1])
    assert found.shape == (1, 16, 6, 3)
    assert dynamic(torch.randn(2, 3, 48, 24)).shape == (2, 18 + dynamic.num_prefix_tokens, 16)
    with pytest.raises(AssertionError, match="Input"):
        fixed.forward_features(torch.randn(1, 3, 48, 24))


@pytest.mark.parametrize("relative", ["none", "decomposed", "table"])
def test_windows_over_the_whole_grid_change_nothing(relative):
    """One window that covers a square grid is global attention."""
    config = {"relative": relative, "class_token": False}
    plain = encoder(AttentionConfig(**config), (32, 32))
    windowed = encoder(AttentionConfig(window=4, global_blocks=1, **config), (32, 32))
    windowed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(windowed.forward_features(images), plain.forward_features(images), **CLOSE)


@pytest.mark.parametrize("relative", ["decomposed", "table"])
def test_checkpointed_gradients_are_equal(relative):
    model = encoder(AttentionConfig(window=3, global_blocks=2, relative=relative, class_token=False)).train()
    images = torch.randn(1, 3, 32, 40)

    def gradients(enable):
        model.checkpointing = enable
        model.zero_grad()
        model.forward_features(images).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    kept, again = gradients(False), gradients(True)
    assert any("relative" in name for name in kept)
    torch.testing.assert_close(again, kept)


def test_inference_before_training():
    """What a first call in inference mode keeps must serve a later one with gradients."""
    model = encoder(AttentionConfig(relative="table"), dynamic=True).train()
    with torch.inference_mode():
        model.forward_features(torch.randn(1, 3, 72, 24))
    model.forward_features(torch.randn(1, 3, 72, 24)).sum().backward()
    assert model.blocks[0].relative.relative_position_bias_table.grad.abs().sum() > 0


def test_maps_are_the_tokens_of_their_blocks():
    model = encoder(AttentionConfig())
    images = torch.randn(2, 3, 32, 40)
    first, last = model.forward_maps(images, [1, -1])
    torch.testing.assert_close(last.flatten(2).mT, model.forward_features(images)[:, 1:])
    torch.testing.assert_close(first.flatten(2).mT, model.forward_tokens(images, [1])[0][:, 1:])


def test_what_weight_decay_spares():
    """Positions and class token; relative positions decay, as in ViTDet's and BEiT's recipes."""
    for kind in ("table", "decomposed"):
        assert encoder(AttentionConfig(relative=kind)).no_weight_decay() == {"pos_embed", "cls_token"}


# -------------------- files


def test_reading_for_dense_prediction(tmp_path):
    """A plain file for windows without a class token: relative positions start at zero, so nothing changes yet."""
    save_model(tiny_addp(image_size=(12, 12)), tmp_path / "m.safetensors")
    config = {"window": 3, "global_blocks": 1, "class_token": False}
    plain = load_encoder(tmp_path / "m.safetensors", 12, attention=AttentionConfig(**config))
    images = torch.randn(1, 3, 16, 20)
    for relative in ("decomposed", "table"):
        attention = AttentionConfig(relative=relative, **config)
        model = load_encoder(tmp_path / "m.safetensors", 12, attention=attention, dynamic=True, drop_path=0.1)
        torch.testing.assert_close(
            model.forward_features(images[..., :12, :12]), plain.forward_features(images[..., :12, :12])
        )
        assert model.forward_maps(images, [-1])[0].shape == (1, 16, 8, 10)
        assert not hasattr(model, "cls_token")


@pytest.mark.parametrize("relative", ["decomposed", "table"])
@pytest.mark.parametrize("window", [0, 3])
def test_relative_positions_travel_with_the_file(tmp_path, relative, window):
    attention = AttentionConfig(window=window, relative=relative, global_blocks=2, class_token=window == 0)
    model = encoder(attention)
    save_model(model, tmp_path / "e.safetensors")
    assert same(load_encoder(tmp_path / "e.safetensors", (32, 40)), model)
    other = load_encoder(tmp_path / "e.safetensors", (48, 64))
    assert other.attention == attention
    assert other.forward_features(torch.randn(1, 3, 48, 64)).isfinite().all()
    for mine, its in zip(model.blocks, other.blocks, strict=True):
        for a, b in zip(mine.relative.parameters(), its.relative.parameters(), strict=True):
            if mine.window:  # a window stays as large as it was
                assert torch.equal(a, b)
            else:
                assert len(b) > len(a)
                torch.testing.assert_close(b.mean(), a.mean(), atol=0.3, rtol=0.3)
    dropped = load_encoder(tmp_path / "e.safetensors", (32, 40), attention=AttentionConfig(class_token=window == 0))
    assert not any("relative" in key for key in dropped.state_dict())


def test_tables_lose_the_class_tokens_entries(tmp_path):
    model = encoder(AttentionConfig(relative="table"))
    save_model(model, tmp_path / "e.safetensors")
    attention = AttentionConfig(relative="table", class_token=False)
    without = load_encoder(tmp_path / "e.safetensors", (32, 40), attention=attention)
    name = "blocks.0.relative.relative_position_bias_table"
    assert torch.equal(without.get_parameter(name), model.get_parameter(name)[:-3])


def test_random_starts(tmp_path):
    save_model(tiny_addp(image_size=(8, 8)), tmp_path / "m.safetensors")

    def draw(seed, source=tmp_path / "m.safetensors", **options):
        torch.manual_seed(seed)
        return load_encoder(source, 16, init="random", **options)

    assert same(draw(1), draw(1))
    assert not same(draw(1), draw(2))
    read = load_encoder(tmp_path / "m.safetensors", 16)
    assert draw(1).config == read.config
    assert {k: v.shape for k, v in draw(1).state_dict().items()} == {k: v.shape for k, v in read.state_dict().items()}
    assert draw(1, "tiny", patch_size=8).blocks[0].attn.num_heads == 3
    assert hasattr(draw(1, tokenizer_norm=True), "tokenizer_norm")
    fails(lambda: load_encoder("tiny", 16), "a size, which has no weights", "init=random")
    fails(lambda: draw(1, "tiny"[:3]), "no such file")
    fails(lambda: draw(1, patch_size=16), "patch_size: found 16", "leave the key out")
