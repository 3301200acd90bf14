"""The shared encoder: sizes, feature maps, attention patterns, images of other sizes."""

import pytest
import torch
from tiny import WINDOWED, tiny_encoder

from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import VIT_SIZES, Encoder, EncoderConfig

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.mark.parametrize(("size", "millions"), [("tiny", 5.5), ("small", 21.7), ("base", 85.8), ("large", 303.3)])
def test_encoder_sizes(size, millions):
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(**VIT_SIZES[size]), (224, 224))
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_encoder_maps_are_its_patch_tokens():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(16, 3, 2), (8, 12), 2).eval()
    images = torch.randn(2, 3, 8, 12)
    first, last = encoder.forward_maps(images, (0, -1))
    assert first.shape == (2, 16, 4, 6)
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), encoder.forward_features(images)[:, 1:])
    torch.testing.assert_close(encoder(images), encoder.norm(encoder.forward_features(images)))


def test_image_sizes_must_be_multiples_of_the_patch_size():
    with pytest.raises(ValueError, match="multiples of the patch size 16"):
        Encoder(EncoderConfig(16, 1, 2), (200, 224))


@pytest.mark.parametrize(
    "attention",
    [AttentionConfig(), AttentionConfig(relative="table"), AttentionConfig(relative="decomposed"), WINDOWED],
    ids=["plain", "table", "decomposed", "windows"],
)
def test_dynamic_encoders_accept_other_sizes(attention):
    fixed, dynamic = tiny_encoder(attention), tiny_encoder(attention, dynamic=True)
    images = torch.randn(1, 3, 32, 40)
    torch.testing.assert_close(dynamic.forward_features(images), fixed.forward_features(images))
    (feature_map,) = dynamic.forward_maps(torch.randn(1, 3, 48, 24), [-1])
    assert feature_map.shape == (1, 16, 6, 3)
    assert dynamic(torch.randn(2, 3, 48, 24)).shape == (2, 18 + dynamic.num_prefix_tokens, 16)
    with pytest.raises(AssertionError, match="Input"):
        fixed.forward_features(torch.randn(1, 3, 48, 24))


@pytest.mark.parametrize("relative", ["none", "decomposed", "table"])
def test_one_window_over_the_whole_grid_is_global_attention(relative):
    config = {"relative": relative, "class_token": False}
    plain = tiny_encoder(AttentionConfig(**config), (32, 32))
    windowed = tiny_encoder(AttentionConfig(window=4, global_blocks=1, **config), (32, 32))
    windowed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(windowed.forward_features(images), plain.forward_features(images), **CLOSE)


@pytest.mark.parametrize("relative", ["decomposed", "table"])
def test_activation_checkpointing_keeps_the_gradients(relative):
    model = tiny_encoder(AttentionConfig(window=3, global_blocks=2, relative=relative, class_token=False)).train()
    images = torch.randn(1, 3, 32, 40)

    def gradients(enable):
        model.checkpointing = enable
        model.zero_grad()
        model.forward_features(images).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert any("relative" in name for name in expected)
    torch.testing.assert_close(found, expected)


def test_inference_before_training():
    """Tensors cached in inference mode must work in a later call with gradients."""
    model = tiny_encoder(AttentionConfig(relative="table"), dynamic=True).train()
    with torch.inference_mode():
        model.forward_features(torch.randn(1, 3, 72, 24))
    model.forward_features(torch.randn(1, 3, 72, 24)).sum().backward()
    assert model.blocks[0].relative.relative_position_bias_table.grad.abs().sum() > 0


def test_feature_maps_are_the_tokens_of_their_blocks():
    model = tiny_encoder(AttentionConfig())
    images = torch.randn(2, 3, 32, 40)
    first, last = model.forward_maps(images, [1, -1])
    torch.testing.assert_close(last.flatten(2).mT, model.forward_features(images)[:, 1:])
    torch.testing.assert_close(first.flatten(2).mT, model.forward_tokens(images, [1])[0][:, 1:])


def test_parameters_without_weight_decay():
    """Positions and class token do not decay; relative positions do, as in ViTDet's and BEiT's recipes."""
    for kind in ("table", "decomposed"):
        assert tiny_encoder(AttentionConfig(relative=kind)).no_weight_decay() == {"pos_embed", "cls_token"}


@pytest.mark.parametrize("attention", [AttentionConfig(), WINDOWED])
def test_hooks_on_the_attention_of_each_block_fire(attention):
    """Attention maps and probes of timm's users hang on `blocks[i].attn`."""
    model, shapes = tiny_encoder(attention), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, inputs, output: shapes.append((inputs[0].shape, output.shape)))
    model.forward_features(torch.randn(2, 3, 32, 40))
    assert len(shapes) == len(model.blocks)
    assert all(found == expected for found, expected in shapes)
