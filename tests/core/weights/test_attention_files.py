"""Reading encoders for dense prediction from files, with relative positions, and with random weights."""

import pytest
import torch
from checks import assert_user_error, same_weights
from tiny import tiny_addp, tiny_encoder

from addp_core import load_encoder, save_model
from addp_core.networks.attention import AttentionConfig


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
    model = tiny_encoder(attention)
    save_model(model, tmp_path / "e.safetensors")
    assert same_weights(load_encoder(tmp_path / "e.safetensors", (32, 40)), model)
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
    model = tiny_encoder(AttentionConfig(relative="table"))
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

    assert same_weights(draw(1), draw(1))
    assert not same_weights(draw(1), draw(2))
    read = load_encoder(tmp_path / "m.safetensors", 16)
    assert draw(1).config == read.config
    assert {k: v.shape for k, v in draw(1).state_dict().items()} == {k: v.shape for k, v in read.state_dict().items()}
    assert draw(1, "tiny", patch_size=8).blocks[0].attn.num_heads == 3
    assert hasattr(draw(1, tokenizer_norm=True), "tokenizer_norm")
    assert_user_error(lambda: load_encoder("tiny", 16), "a size, which has no weights", "init=random")
    assert_user_error(lambda: draw(1, "tiny"[:3]), "no such file")
    assert_user_error(lambda: draw(1, patch_size=16), "patch_size: found 16", "leave the key out")
