"""The encoder as timm models: the interface that timm's tools need, compared with timm's own `VisionTransformer`."""

import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from tiny import tiny_addp

import cls  # noqa: F401 (registers the models)
from addp_core import load_encoder, save_model, save_published
from addp_core.networks.encoder import VIT_SIZES

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 5}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
NAMES = [f"addp_vit_{size}_patch16" for size in VIT_SIZES]


@pytest.fixture(params=["avg", "token"])
def pair(request):
    """(ours, timm's) with the same weights, far from their initialization."""
    torch.manual_seed(0)
    options = SHAPE | {"global_pool": request.param}
    vit = VisionTransformer(**options, fc_norm=True)
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = timm.create_model("addp_vit_base_patch16", **options)
    model.load_state_dict(vit.state_dict())  # timm's layout: only the encoder is loaded
    model.fc_norm.load_state_dict(vit.fc_norm.state_dict())
    model.head.load_state_dict(vit.head.state_dict())
    return model.eval(), vit.eval()


def images(*size):
    return torch.randn(2, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))


# -------------------- the models


@pytest.mark.parametrize("name", NAMES)
def test_registered_sizes(name):
    assert name in timm.list_models("addp_vit_*")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, img_size=(256, 224), depth=2)
    size = VIT_SIZES[name.split("_")[2]]
    assert model.num_features == model.embed_dim == size["width"]
    assert model.encoder.blocks[0].attn.num_heads == size["heads"]
    assert model.encoder.pos_embed.shape == (1, 1 + 16 * 14, size["width"])
    assert model.head.out_features == model.num_classes == 7
    full = timm.get_pretrained_cfg(name)
    assert full.input_size == (3, 224, 224)
    assert full.mean == (0.485, 0.456, 0.406)


def test_depths():
    with torch.device("meta"):
        depths = {name: len(timm.create_model(name).encoder.blocks) for name in NAMES}
    assert depths == {name: VIT_SIZES[name.split("_")[2]]["depth"] for name in NAMES}


def test_options_of_timms_training_script():
    options = {"drop_rate": 0.3, "drop_path_rate": 0.2, "proj_drop_rate": 0.1, "in_chans": 3, "global_pool": "avg"}
    model = timm.create_model("addp_vit_tiny_patch16", scriptable=False, **SHAPE | options)
    assert model.head_drop.p == 0.3
    assert model.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.encoder.blocks[0].mlp.drop1.p == 0.1
    with pytest.raises(ValueError, match="in_chans: found 1, expected 3"):
        timm.create_model("addp_vit_tiny_patch16", in_chans=1)


# -------------------- compared with timm's VisionTransformer


def test_features_and_logits(pair):
    ours, theirs = pair
    x = images()
    tokens = theirs.forward_features(x)
    torch.testing.assert_close(ours.forward_features(x), tokens, **CLOSE)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    for pre_logits in (False, True):
        torch.testing.assert_close(
            ours.forward_head(tokens, pre_logits=pre_logits),
            theirs.forward_head(tokens, pre_logits=pre_logits),
            **CLOSE,
        )


@pytest.mark.parametrize("indices", [None, 1, 2, [0, 2], [-2]])
@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("prefix", [False, True])
def test_intermediates(pair, indices, fmt, prefix):
    ours, theirs = pair
    x = images()
    for early in (False, True):
        options = {"indices": indices, "output_fmt": fmt, "return_prefix_tokens": prefix, "stop_early": early}
        torch.testing.assert_close(
            ours.forward_intermediates(x, **options), theirs.forward_intermediates(x, **options), **CLOSE
        )
        torch.testing.assert_close(
            ours.forward_intermediates(x, intermediates_only=True, **options),
            theirs.forward_intermediates(x, intermediates_only=True, **options),
            **CLOSE,
        )


def test_intermediates_as_a_dictionary(pair):
    for only in (False, True):
        options = {"indices": [0, 1], "output_dict": True, "return_prefix_tokens": True, "intermediates_only": only}
        found, expected = (model.forward_intermediates(images(), **options) for model in pair)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], **CLOSE)


def test_normed_intermediates(pair):
    ours, _ = pair
    (plain,) = ours.forward_intermediates(images(), 1, intermediates_only=True, output_fmt="NLC")
    (normed,) = ours.forward_intermediates(images(), 1, intermediates_only=True, output_fmt="NLC", norm=True)
    torch.testing.assert_close(normed, ours.encoder.norm(plain))


def test_features_only():
    options = {"features_only": True, "out_indices": (0, 2)}
    model = timm.create_model("addp_vit_small_patch16", **SHAPE, **options).eval()
    assert model.feature_info.channels() == [64, 64]
    assert model.feature_info.reduction() == [8, 8]
    assert [f.shape for f in model(images())] == [(2, 64, 4, 4)] * 2
    assert "head.weight" not in model.state_dict()


def test_dynamic_sizes(pair):
    ours, _ = pair
    theirs = VisionTransformer(**SHAPE, global_pool=ours.pooling, fc_norm=True, dynamic_img_size=True).eval()
    theirs.load_state_dict(pair[1].state_dict())
    model = timm.create_model("addp_vit_base_patch16", **SHAPE, global_pool=ours.pooling, dynamic_img_size=True).eval()
    model.load_state_dict(ours.state_dict())
    x = images(32, 32)
    torch.testing.assert_close(model(x), theirs(x), **CLOSE)
    assert model(images(40, 64)).shape == (2, 5)
    assert model.forward_intermediates(images(40, 64), 1, intermediates_only=True)[0].shape == (2, 64, 5, 8)


def test_reset_classifier(pair):
    ours, _ = pair
    ours.reset_classifier(9)
    assert ours(images()).shape == (2, 9)
    assert ours.get_classifier() is ours.head
    ours.reset_classifier(0, "token")
    torch.testing.assert_close(ours(images()), ours.fc_norm(ours.forward_features(images())[:, 0]))
    with pytest.raises(ValueError, match="global_pool: found 'map'"):
        ours.reset_classifier(2, "map")


def test_gradient_checkpointing_gives_the_same_gradients(pair):
    ours, _ = pair
    ours.train()

    def gradients(enable):
        ours.set_grad_checkpointing(enable)
        ours.zero_grad()
        ours(images()).square().sum().backward()
        return {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}

    torch.testing.assert_close(gradients(True), gradients(False))


# -------------------- layers


def test_layer_ids_are_the_published_ones():
    """Embeddings: 0; block i: i + 1; fc_norm and head: last (App. D.2)."""
    model = timm.create_model("addp_vit_tiny_patch16", **SHAPE, pre_norm=True)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    for name, layer in layers.items():
        parts = name.removeprefix("encoder.").split(".")
        if parts[0] in ("patch_embed", "cls_token", "pos_embed", "tokenizer_norm"):
            assert layer == 0, name
        elif parts[0] == "blocks":
            assert layer == int(parts[1]) + 1, name
        else:
            assert layer == SHAPE["depth"] + 1, name
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 3


def test_learning_rates_and_weight_decay_of_timms_optimizer():
    model = timm.create_model("addp_vit_tiny_patch16", **SHAPE)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    last = SHAPE["depth"] + 1
    assert found["encoder.patch_embed.proj.weight"] == (0.5**last, 0.05)
    assert found["encoder.pos_embed"] == found["encoder.cls_token"] == (0.5**last, 0.0)
    for i in range(SHAPE["depth"]):
        assert found[f"encoder.blocks.{i}.attn.qkv.weight"] == (0.5 ** (last - i - 1), 0.05)
        assert found[f"encoder.blocks.{i}.norm1.weight"] == (0.5 ** (last - i - 1), 0.0)
    assert found["fc_norm.weight"] == (1.0, 0.0)
    assert found["head.weight"] == (1.0, 0.05)


# -------------------- files

TINY = {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": (8, 8), "num_classes": 3}


@pytest.mark.parametrize("layout", ["ours", "published"])
@pytest.mark.parametrize("norm", [False, True])
def test_checkpoint_path(tmp_path, layout, norm):
    model = tiny_addp(image_size=(8, 8))
    path = tmp_path / ("m.safetensors" if layout == "ours" else "m.pth")
    (save_model if layout == "ours" else save_published)(model, path)
    found = timm.create_model("addp_vit_base_patch16", checkpoint_path=path, **TINY, pre_norm=norm).eval()
    expected = load_encoder(path, (8, 8), encoder_heads=2, tokenizer_norm=norm)
    torch.testing.assert_close(found.forward_features(images(8, 8)), expected.forward_features(images(8, 8)))
    other = timm.create_model("addp_vit_base_patch16", checkpoint_path=path, **TINY | {"img_size": 12}, pre_norm=norm)
    expected = load_encoder(path, 12, encoder_heads=2, tokenizer_norm=norm)
    assert torch.equal(other.encoder.pos_embed, expected.pos_embed)


def test_a_classifiers_head_is_loaded_only_if_it_fits(tmp_path, caplog):
    model = timm.create_model("addp_vit_base_patch16", **TINY)
    torch.nn.init.normal_(model.head.weight)
    save_model(model, tmp_path / "c.safetensors")

    def read(**options):
        return timm.create_model("addp_vit_base_patch16", checkpoint_path=tmp_path / "c.safetensors", **TINY | options)

    with caplog.at_level(logging.WARNING, "addp"):
        assert torch.equal(read().head.weight, model.head.weight)
        assert torch.equal(read(img_size=12).head.weight, model.head.weight)
        assert not caplog.records
        other = read(num_classes=7)
    assert torch.equal(other.encoder.cls_token, model.encoder.cls_token)
    assert [record.getMessage() for record in caplog.records] == ["dropping the checkpoint's head for 3 classes"]


def test_the_head_of_timms_file_is_dropped_with_a_warning(tmp_path, caplog):
    vit = VisionTransformer(**SHAPE, fc_norm=True)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    with caplog.at_level(logging.WARNING, "addp"):
        model = timm.create_model("addp_vit_base_patch16", checkpoint_path=tmp_path / "vit.safetensors", **SHAPE)
    assert torch.equal(model.encoder.pos_embed, vit.pos_embed)
    assert [record.getMessage() for record in caplog.records] == ["dropping the checkpoint's head for 5 classes"]


@pytest.mark.parametrize("kind", ["addp", "classifier"])
def test_features_only_from_a_checkpoint(tmp_path, kind):
    model = tiny_addp(image_size=(8, 8))
    if kind == "classifier":
        model = timm.create_model("addp_vit_base_patch16", **TINY)
    save_model(model, tmp_path / "m.safetensors")
    options = {"features_only": True, "out_indices": (0,), "checkpoint_path": tmp_path / "m.safetensors"}
    found = timm.create_model("addp_vit_base_patch16", **TINY | options).eval()
    encoder = load_encoder(tmp_path / "m.safetensors", (8, 8), encoder_heads=2)
    torch.testing.assert_close(found(images(8, 8)), encoder.forward_maps(images(8, 8), [0]))
    again = timm.create_model("addp_vit_base_patch16", **TINY | options | {"checkpoint_path": ""})
    again.load_state_dict(found.state_dict())  # its own layout
    torch.testing.assert_close(again.eval()(images(8, 8)), found(images(8, 8)))


def test_pretrained_loads_the_published_file(tmp_path, monkeypatch):
    model = tiny_addp(image_size=(8, 8))
    save_published(model, tmp_path / "published.pth")
    requested = []

    def fetch(repository, filename, **_):
        requested.append((repository, filename))
        return str(tmp_path / "published.pth")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetch)
    for size in ("base", "large"):
        found = timm.create_model(f"addp_vit_{size}_patch16", pretrained=True, **TINY)
        assert torch.equal(found.encoder.cls_token, model.denoiser.encoder.cls_token)
    assert requested == [("Changyao/ADDP", "addp-vit-base-16.pth"), ("Changyao/ADDP", "addp-vit-large-16.pth")]
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("addp_vit_tiny_patch16", pretrained=True, **TINY)
