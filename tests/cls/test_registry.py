"""The registered models of timm: the contract that timm's own tests/test_models.py asks of its ViTs, at a tiny size."""

import copy

import pytest
import timm
import torch
from timm.models import FeatureInfo, group_parameters
from timm.optim import create_optimizer_v2
from torch.export import Dim
from torchvision.models.feature_extraction import create_feature_extractor

import cls  # noqa: F401 (registers the models)
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import VIT_SIZES, Encoder, EncoderConfig

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 5}
NAMES = [f"addp_vit_{size}_patch16" for size in VIT_SIZES]


def build(**options):
    torch.manual_seed(0)
    return timm.create_model("addp_vit", **SHAPE | options).eval()


def images(*size, channels=3):
    return torch.randn(2, channels, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))


def own_classifier():
    """Return our classifier of the same shape."""
    return Classifier(Encoder(EncoderConfig(64, 3, 2), (32, 32), 8), 5)


# -------------------- names and sizes


@pytest.mark.parametrize("name", NAMES)
def test_registered_sizes(name):
    assert name in timm.list_models("addp_vit*")
    model = timm.create_model(name, num_classes=7, img_size=(256, 224), device="meta")
    size = VIT_SIZES[name.split("_")[2]]
    assert model.num_features == model.embed_dim == size["width"]
    assert len(model.blocks) == size["depth"]
    assert model.blocks[0].attn.num_heads == size["heads"]
    assert model.pos_embed.shape == (1, 1 + 16 * 14, size["width"])
    assert model.head.out_features == model.num_classes == 7
    full = timm.get_pretrained_cfg(name)
    assert (full.input_size, full.fixed_input_size, full.mean) == ((3, 224, 224), True, (0.485, 0.456, 0.406))


def test_the_name_without_a_size_is_vit_b_unless_a_file_says_otherwise():
    model = timm.create_model("addp_vit", device="meta")
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (768, 12, 12)


# -------------------- timm's keywords


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"in_chans": 1}, (2, 5)),
        ({"global_pool": ""}, (2, 17, 5)),
        ({"global_pool": "token"}, (2, 5)),
        ({"global_pool": "map"}, (2, 5)),
        ({"init_values": 1e-5, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.1}, (2, 5)),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (2, 5)),
        ({"dtype": torch.float64, "device": "cpu"}, (2, 5)),
        ({"pre_norm": True, "qk_norm": True, "reg_tokens": 2}, (2, 5)),
        ({"num_classes": 0}, (2, 64)),
    ],
)
def test_keywords_of_timms_vit(options, shape):
    model = build(**options).train()
    size = (30, 44) if "dynamic_img_pad" in options else (32, 32)
    out = model(images(*size, channels=options.get("in_chans", 3)).to(options.get("dtype", torch.float32)))
    assert out.shape == shape
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_size_of_the_input_may_be_set_later():
    model = build()
    model.set_input_size((48, 64))
    assert model(images(48, 64)).shape == (2, 5)
    model = build(dynamic_img_size=True)
    assert model(images(40, 64)).shape == (2, 5)


# -------------------- features


def test_features():
    model = build()
    x = images()
    last, features = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    assert [f.shape for f in features] == [(2, 64, 4, 4)] * 3
    assert FeatureInfo(model.feature_info, (0, 1, 2)).reduction() == [8, 8, 8]
    assert model.get_intermediate_layers(x, n=2, reshape=True)[1].shape == (2, 64, 4, 4)
    pooled = model.forward_head(last, pre_logits=True)
    torch.testing.assert_close(pooled, model.fc_norm(last[:, 1:].mean(1)))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)


def test_features_only():
    model = build(features_only=True, out_indices=(0, 2))
    assert model.feature_info.channels() == [64, 64]
    assert [f.shape for f in model(images())] == [(2, 64, 4, 4)] * 2
    assert "head.weight" not in model.state_dict()
    torch.testing.assert_close(copy.deepcopy(model).state_dict(), model.state_dict())


def test_hooks_on_the_attention_fire():
    model, shapes = build(), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model(images())
    assert shapes == [(2, 17, 64)] * 3


# -------------------- tracing


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript():
    model, x = build(), images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_fx():
    model, x = build(), images()
    try:
        create_feature_extractor(timm.create_model("vit_tiny_patch16_224", depth=1), ["head"])
    except TypeError as error:
        pytest.skip(f"torch {torch.__version__} does not trace timm's own ViT either: {error}")
    extractor = create_feature_extractor(model, ["blocks.1.attn.proj", "head"])
    torch.testing.assert_close(extractor(x)["head"], model(x))


def test_export_with_free_batch_height_and_width():
    model = build(dynamic_img_size=True)
    rows, columns = Dim("rows", min=2, max=16), Dim("columns", min=2, max=16)
    shapes = {"x": {0: Dim("batch", min=1, max=8), 2: 8 * rows, 3: 8 * columns}}
    program = torch.export.export(model, (images(40, 48),), dynamic_shapes=shapes, strict=False)
    torch.testing.assert_close(program.module()(images(64, 24)[:1]), model(images(64, 24)[:1]))


def test_gradient_checkpointing_gives_the_same_gradients():
    model = build().train()

    def gradients(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images()).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    torch.testing.assert_close(gradients(True), gradients(False))


# -------------------- initialization and layers, as in our fine-tuning


def test_initialization_is_that_of_our_classifier():
    torch.manual_seed(0)
    model, own = build(), own_classifier()
    renamed = {name.removeprefix("encoder."): p for name, p in own.named_parameters() if "encoder.norm" not in name}
    assert renamed.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert p.std(correction=0).item() == pytest.approx(renamed[name].std(correction=0).item(), rel=0.4), name
        assert p.mean().item() == pytest.approx(renamed[name].mean().item(), abs=0.01), name
    assert build(weight_init="jax").head.weight.std() == 0


def test_layers_and_weight_decay_are_those_of_our_classifier():
    model, own = build(), own_classifier()
    layers = group_parameters(own, own.group_matcher(), reverse=True).items()
    expected = {name.removeprefix("encoder."): layer for name, layer in layers if "encoder.norm" not in name}
    assert group_parameters(model, model.group_matcher(), reverse=True) == expected
    names = {name.removeprefix("encoder.") for name in own.no_weight_decay()}
    assert names == model.no_weight_decay() & dict(model.named_parameters()).keys()


def test_learning_rates_and_weight_decay_of_timms_optimizer():
    model = build()
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    last = SHAPE["depth"] + 1
    assert found["patch_embed.proj.weight"] == (0.5**last, 0.05)
    assert found["pos_embed"] == found["cls_token"] == (0.5**last, 0.0)
    assert found["blocks.0.attn.qkv.weight"] == (0.5 ** (last - 1), 0.05)
    assert found["head.weight"] == (1.0, 0.05)
    assert found["fc_norm.bias"] == (1.0, 0.0)


def test_a_new_head_starts_small():
    model = build()
    model.reset_classifier(9, "token")
    assert model(images()).shape == (2, 9)
    assert 0 < model.head.weight.abs().max() < 1e-3
