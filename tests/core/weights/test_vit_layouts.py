"""ViTs of MAE, BEiT and timm: our encoder equals the model that wrote the file, at its own size and at others."""

import pytest
import torch
from checks import assert_user_error, same_weights
from timm.models.beit import Beit, checkpoint_filter_fn
from timm.models.vision_transformer import VisionTransformer

from addp_core import load_encoder, save_model
from addp_core.networks.attention import AttentionConfig

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def perturbed(model):
    """Return the model with every parameter moved away from zero and one, so that a missing one changes the result."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.1},
        {"pre_norm": True},
        {"init_values": 0.1, "no_embed_class": True, "fc_norm": True, "global_pool": "avg"},
    ],
    ids=["layer scale", "CLIP", "DeiT III"],
)
def test_timm_vits(tmp_path, options):
    vit = perturbed(VisionTransformer(**SHAPE, **options))
    encoder = load_encoder(vit.state_dict(), 32, encoder_heads=2)
    images = torch.randn(2, 3, 32, 32)
    vit.norm = torch.nn.Identity()
    torch.testing.assert_close(encoder.forward_features(images), vit.forward_features(images), **CLOSE)
    save_model(encoder, tmp_path / "e.safetensors")
    again = load_encoder(tmp_path / "e.safetensors", 32)
    torch.testing.assert_close(again.forward_features(images), encoder.forward_features(images))
    assert load_encoder(tmp_path / "e.safetensors", 64, dropout=0.1).grid == (8, 8)


@pytest.mark.parametrize("tables", ["own", "shared", "both"])
@pytest.mark.parametrize("absolute", [False, True])
def test_beit(tables, absolute):
    beit = Beit(
        **SHAPE,
        init_values=0.1,
        use_abs_pos_emb=absolute,
        use_rel_pos_bias=tables != "shared",
        use_shared_rel_pos_bias=tables != "own",
    )
    state = {"model": perturbed(beit).state_dict() | {"mask_token": torch.zeros(1, 1, 64)}}
    encoder = load_encoder(state, 32)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.forward_features(images), beit.forward_features(images), **CLOSE)
    assert encoder.config.heads == 2  # read from the table
    assert encoder.config.layer_scale
    assert encoder.attention == AttentionConfig(relative="table")
    assert encoder(images).shape == (2, 17, 64)


def test_beit_at_another_size_equals_timm():
    beit = perturbed(Beit(**SHAPE, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True))
    encoder = load_encoder(beit.state_dict(), (48, 64))
    larger = Beit(**SHAPE | {"img_size": (48, 64)}, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)
    larger.load_state_dict(checkpoint_filter_fn(beit.state_dict(), larger))
    images = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(encoder.forward_features(images), larger.eval().forward_features(images), **CLOSE)


def test_beit_with_a_final_norm_round_trips(tmp_path):
    """As in published pretraining files; the final norm keeps its name."""
    beit = perturbed(Beit(**SHAPE, init_values=0.1, use_rel_pos_bias=True, global_pool="token"))
    encoder = load_encoder(beit.state_dict(), 32)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), beit.forward_features(images), **CLOSE)
    save_model(encoder, tmp_path / "e.safetensors")
    assert same_weights(load_encoder(tmp_path / "e.safetensors", 32), encoder)


def test_beit_without_positions_is_refused():
    beit = Beit(**SHAPE, use_abs_pos_emb=False)
    assert_user_error(lambda: load_encoder(beit.state_dict(), 32), "without positions")
    beit = Beit(**SHAPE | {"img_size": (32, 40)}, use_abs_pos_emb=False, use_rel_pos_bias=True)
    assert_user_error(lambda: load_encoder(beit.state_dict(), 32), "do not belong to a square grid")


@pytest.mark.parametrize("kind", ["mae", "timm"])
def test_plain_vits(tmp_path, kind):
    """The encoder equals the ViT that wrote the file: timm's, and a MAE file with its decoder."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=5).eval()
    state = vit.state_dict()
    if kind == "mae":
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
        decoder = {"mask_token": (1, 1, 8), "decoder_pos_embed": (1, 17, 8), "decoder_pred.weight": (192, 8)}
        state = {"model": state | {name: torch.zeros(shape) for name, shape in decoder.items()}}
    torch.save(state, tmp_path / "vit.pth")
    encoder = load_encoder(tmp_path / "vit.pth", img_size=32, encoder_heads=1)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), vit.forward_features(images), atol=1e-5, rtol=1e-4)


def test_vits_with_parts_that_our_encoder_lacks_are_refused(tmp_path):
    state = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1, init_values=0.1, reg_tokens=2
    ).state_dict()
    assert_user_error(lambda: load_encoder(state, img_size=32), "reg_token", "does not have")
