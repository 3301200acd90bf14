"""What tensors do not tell (heads, grids), several models in one file, and what wraps a model's names."""

import argparse
import collections
import pathlib

import numpy as np
import pytest
import torch
from checks import assert_user_error
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

from addp_core import load_addp, load_encoder, load_tokenizer
from addp_core.recipes.cli import main

HEADS = {"encoder_heads": 4, "decoder_heads": 4, "predictor_heads": 4, "predictor_decoder_heads": 4}


def vit(width=192, heads=3, size=(32, 32), seed=0, **options):
    """A small ViT whose attention is far from uniform, so that the number of heads changes its features."""
    torch.manual_seed(seed)
    model = VisionTransformer(size, 8, embed_dim=width, depth=2, num_heads=heads, num_classes=0, **options)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.1) if value.ndim > 1 else value
    model.norm = torch.nn.Identity()
    return model.eval()


def assert_same_features(encoder, model, size):
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(encoder.forward_features(images), model.forward_features(images), atol=1e-4, rtol=1e-3)


def named(prefix, state):
    return {prefix + key: value for key, value in state.items()}


# -------------------- heads


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (1280, 16)])
def test_heads_are_those_of_published_vits_of_the_same_width(width, heads):
    model = vit(width, heads)
    assert_same_features(load_encoder(model.state_dict(), 32), model, (32, 32))


def test_a_width_with_two_numbers_of_heads_is_said(caplog):
    model = vit(384, 12)
    assert load_encoder(model.state_dict(), 32).config.heads == 6
    assert "width 384 have 6 or 12 attention heads" in caplog.text
    assert "took 6 (encoder_heads=12 overrides this)" in caplog.text
    caplog.clear()
    assert_same_features(load_encoder(model.state_dict(), 32, encoder_heads=12), model, (32, 32))
    assert not caplog.text
    moco_v3 = {"state_dict": named("module.base_encoder.", model.state_dict())}
    assert_same_features(load_encoder(moco_v3, 32), model, (32, 32))
    assert "took 12 (encoder_heads=6 overrides this)" in caplog.text


def test_verbs_demand_the_heads_of_other_widths(tmp_path, capsys):
    torch.save(vit(96, 3).state_dict(), tmp_path / "v.pth")
    arguments = ["export", f"model={tmp_path / 'v.pth'}", f"out={tmp_path / 'o'}", "layout=timm", "img_size=32"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "has width 96" in error
    assert "expected encoder_heads=<number>" in error
    assert main([*arguments, "encoder_heads=3"]) == 0


# -------------------- grids


def test_a_grid_that_is_not_square_is_told_from_deit_iii_by_the_size(caplog):
    model = vit(size=(40, 56))  # 5 x 7 patches and a class token: 6 x 6 positions
    assert_same_features(load_encoder(model.state_dict(), (40, 56)), model, (40, 56))
    assert "took its 36 positions for a class token and 5 x 7 patches" in caplog.text
    for size in (32, 64):
        assert_user_error(lambda size=size: load_encoder(model.state_dict(), size), "6 x 6", "5 x 7", "img_size=")
    assert load_encoder(model.state_dict(), 32, init="random").grid == (4, 4)

    deit = vit(no_embed_class=True)
    assert_same_features(load_encoder(deit.state_dict(), 32), deit, (32, 32))
    assert "took its 16 positions for 4 x 4 patches without one for the class token (DeiT III)" in caplog.text
    assert_user_error(lambda: load_encoder(deit.state_dict(), 48), "4 x 4", "3 x 5")
    published = vit(no_embed_class=True, init_values=0.1)
    assert load_encoder(published.state_dict(), 48).grid == (6, 6)


def test_other_grids_are_read_at_their_own_size(caplog):
    model = vit(size=(32, 40))
    assert_same_features(load_encoder(model.state_dict(), (32, 40)), model, (32, 40))
    assert "took its 21 positions for a class token and 4 x 5 patches" in caplog.text
    assert_user_error(lambda: load_encoder(model.state_dict(), 32), "do not form a square grid", "img_size=")
    beit = Beit((32, 48), 8, embed_dim=192, depth=1, num_heads=3, use_abs_pos_emb=False, use_rel_pos_bias=True).eval()
    assert_same_features(load_encoder(beit.state_dict(), (32, 48)), beit, (32, 48))


# -------------------- several models in one file


def first_or_second(content, **options):
    """Return which of the two models, whose class tokens are 1 and 2, was read."""
    return int(load_encoder(content, 32, **options).cls_token[0, 0, 0])


@pytest.fixture(scope="module")
def states():
    state = vit().state_dict()
    return [state | {"cls_token": torch.full_like(state["cls_token"], number)} for number in (1, 2)]


def test_a_checkpoint_with_an_average(states, caplog):
    first, second = states
    content = {"model": first, "model_ema": second, "epoch": 3}
    assert first_or_second(content) == 1
    assert "holds model and model_ema; took model (weights=model_ema takes the other)" in caplog.text
    assert first_or_second(content, weights="model_ema") == 2
    assert first_or_second(content, weights="ema") == 2
    assert first_or_second({"model_ema": second, "epoch": 3}) == 2
    assert_user_error(lambda: first_or_second(content, weights="emma"), "weights=emma", "expected model or model_ema")


def test_student_and_teacher(states, caplog):
    head, (first, second) = {"head.mlp.0.weight": torch.zeros(2)}, states
    student = named("module.", named("backbone.", first) | head)
    content = {"student": student, "teacher": named("backbone.", second) | head, "loss": {"center": torch.zeros(1)}}
    assert first_or_second(content) == 2
    assert "took teacher (weights=student takes the other)" in caplog.text
    assert "took the model under 'backbone.' and left out the tensors under head." in caplog.text
    assert first_or_second(content, weights="student") == 1


@pytest.mark.parametrize(("query", "key"), [("base_encoder", "momentum_encoder"), ("encoder_q", "encoder_k")])
def test_moco(states, caplog, query, key):
    state = named(f"module.{query}.", states[0]) | named(f"module.{key}.", states[1])
    content = {"state_dict": state | {"module.predictor.0.weight": torch.zeros(2)}}
    assert first_or_second(content) == 1
    assert f"left out the tensors under {key}., predictor. (weights={key} takes another model)" in caplog.text
    assert first_or_second(content, weights=key) == 2
    assert first_or_second(content, weights="ema") == 2


def test_names_that_do_not_tell_which_model(states):
    first, second = states
    content = {"state_dict": named("a.", first) | named("b.", second)}
    assert_user_error(lambda: load_encoder(content, 32), "several models, under a., b.")
    assert first_or_second(content, weights="b") == 2
    assert_user_error(lambda: load_encoder({"x": first, "y": second}, 32), "tensors under x, y")
    assert_user_error(lambda: load_encoder({"a": {"b": first}}, 32), "only tensors under a.b")


# -------------------- wrappers


WRAPPERS = ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model._orig_mod.", "net.backbone."]


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_prefixes_of_a_whole_model_are_stripped(golden, states, prefix, caplog):
    assert first_or_second({"state_dict": named(prefix, states[0])}) == 1
    load_addp({"state_dict": named(prefix, golden)}, **HEADS)
    load_tokenizer(
        named(prefix, {key.removeprefix("vqgan."): golden[key] for key in golden if key.startswith("vqgan.")})
    )
    assert not caplog.text


def test_the_prefix_of_something_else_is_named():
    resnet = dict.fromkeys(["net.conv1.weight", "net.layer1.0.conv1.weight"], torch.zeros(1))
    assert_user_error(lambda: load_encoder(resnet, 32), "under 'net.' this is a ResNet checkpoint")


HARMLESS = {
    "numpy scalar": np.float64(1),
    "numpy array": np.zeros(3),
    "paths": argparse.Namespace(out=pathlib.PurePosixPath("x"), root=pathlib.Path("y")),
    "defaultdict": collections.defaultdict(list, loss=[1.0]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_values_beside_the_weights(tmp_path, states, name):
    torch.save({"model": states[0], "extra": HARMLESS[name]}, tmp_path / "f.pth")
    assert first_or_second(tmp_path / "f.pth") == 1


def test_a_tokenizer_with_quantization_convolutions_is_refused(golden):
    vqgan = {key.removeprefix("vqgan."): value for key, value in golden.items() if key.startswith("vqgan.")}
    for name in ("quant_conv.weight", "post_quant_conv.bias"):
        assert_user_error(lambda name=name: load_tokenizer(vqgan | {name: torch.zeros(1)}), name, "MaskGIT")
