"""Encoders for dense prediction: weights from files, relative positions, random initialization."""

import pytest
import torch
from checks import assert_user_error, same_weights
from tiny import tiny_addp, tiny_encoder

from addp_core import load_encoder, save_model
from addp_core.networks.attention import AttentionConfig


def test_plain_weights_for_windows_and_relative_positions(tmp_path):
    """Relative positions are initialized to zero, so they do not change the features at first."""
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
def test_relative_positions_are_saved_and_resized(tmp_path, caplog, relative, window):
    attention = AttentionConfig(window=window, relative=relative, global_blocks=2, class_token=window == 0)
    model = tiny_encoder(attention)
    save_model(model, tmp_path / "e.safetensors")
    assert same_weights(load_encoder(tmp_path / "e.safetensors", (32, 40)), model)
    larger = load_encoder(tmp_path / "e.safetensors", (48, 64))
    assert larger.attention == attention
    assert larger.forward_features(torch.randn(1, 3, 48, 64)).isfinite().all()
    for block, larger_block in zip(model.blocks, larger.blocks, strict=True):
        for a, b in zip(block.relative.parameters(), larger_block.relative.parameters(), strict=True):
            if block.window:  # the size of windows does not depend on the image size
                assert torch.equal(a, b)
            else:
                assert len(b) > len(a)
                torch.testing.assert_close(b.mean(), a.mean(), atol=0.3, rtol=0.3)
    assert not caplog.messages
    without_relative = load_encoder(
        tmp_path / "e.safetensors", (32, 40), attention=AttentionConfig(class_token=window == 0)
    )
    assert not any("relative" in key for key in without_relative.state_dict())
    assert [message.partition(",")[0] for message in caplog.messages] == [
        f"relative positions: found relative={relative} in the file"
    ]


def test_bias_tables_lose_the_entries_of_a_dropped_class_token(tmp_path):
    model = tiny_encoder(AttentionConfig(relative="table"))
    save_model(model, tmp_path / "e.safetensors")
    attention = AttentionConfig(relative="table", class_token=False)
    without_class_token = load_encoder(tmp_path / "e.safetensors", (32, 40), attention=attention)
    name = "blocks.0.relative.relative_position_bias_table"
    assert torch.equal(without_class_token.get_parameter(name), model.get_parameter(name)[:-3])


def test_random_initialization(tmp_path):
    save_model(tiny_addp(image_size=(8, 8)), tmp_path / "m.safetensors")

    def initialize(seed, source=tmp_path / "m.safetensors", **options):
        torch.manual_seed(seed)
        return load_encoder(source, 16, init="random", **options)

    assert same_weights(initialize(1), initialize(1))
    assert not same_weights(initialize(1), initialize(2))
    loaded = load_encoder(tmp_path / "m.safetensors", 16)
    assert initialize(1).config == loaded.config
    assert {k: v.shape for k, v in initialize(1).state_dict().items()} == {
        k: v.shape for k, v in loaded.state_dict().items()
    }
    assert initialize(1, "tiny", patch_size=8).blocks[0].attn.num_heads == 3
    assert hasattr(initialize(1, tokenizer_norm=True), "tokenizer_norm")
    assert_user_error(lambda: load_encoder("tiny", 16), "a size, which has no weights", "init=random")
    assert_user_error(lambda: initialize(1, "tiny"[:3]), "no such file")
    assert_user_error(lambda: initialize(1, patch_size=16), "patch_size: found 16", "leave the key out")
