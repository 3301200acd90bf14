"""Reading and writing weights: every layout, every round trip, every way a file can be wrong."""

import argparse
import dataclasses
import errno
import json
import os
import pickle

import pytest
import torch
from golden_weights import HEADS, SPEC, golden_state
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny_addp

from addp_core import load_addp, load_encoder, load_predictor, load_tokenizer, sample, save_model, save_published
from addp_core.base.errors import UserError
from addp_core.weights.checkpoint import MODEL_FILE, describe, read_weights
from addp_core.weights.layouts import to_published


@pytest.fixture(scope="module")
def golden():
    return golden_state()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def fails(function, *parts):
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# -------------------- round trips


def test_ours_round_trips(tmp_path):
    model = tiny_addp(target="both", ids_to="encoder+decoder")
    save_model(model, tmp_path / "m.safetensors")
    again = load_addp(tmp_path / "m.safetensors")
    assert same(model, again)
    assert again.config == model.config
    assert not again.training
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_published_round_trips_through_ours(tmp_path, golden):
    model = load_addp({"model": golden}, **HEADS)
    save_model(model, tmp_path / "m.safetensors")
    save_published(load_addp(tmp_path / "m.safetensors"), tmp_path / "p.pth")
    again = load_addp(tmp_path / "p.pth")  # heads come along: no overrides needed
    assert same(model, again)

    written = torch.load(tmp_path / "p.pth", weights_only=True)["model"]
    assert set(SPEC["shapes"]) <= set(written)
    assert all(list(written[name].shape) == shape for name, shape in SPEC["shapes"].items())
    extra = set(written) - set(SPEC["shapes"])
    assert {e for e in extra if not e.startswith("token_predictor.vqgan.")} == {
        "token_predictor.token_emb.position_ids"
    }
    unused = [n for n in SPEC["shapes"] if not torch.equal(written[n], golden[n])]
    assert all(
        "decoder_pred" in n or "pos" in n or "patch_embed" in n or "cls_token" in n or "mask_token" in n for n in unused
    )


def test_parts_round_trip(tmp_path):
    model = tiny_addp()
    save_model(model.tokenizer, tmp_path / "t.safetensors")
    save_model(model.predictor, tmp_path / "p.safetensors", grid=model.config.grid)
    save_model(model.denoiser.encoder, tmp_path / "e.safetensors")
    assert same(load_tokenizer(tmp_path / "t.safetensors"), model.tokenizer)
    assert load_tokenizer(tmp_path / "t.safetensors").grid == (4, 6)
    assert same(load_predictor(tmp_path / "p.safetensors"), model.predictor)
    encoder = load_encoder(tmp_path / "e.safetensors", img_size=(8, 12), tokenizer_norm=True)
    assert same(encoder, model.denoiser.encoder)


def test_parts_are_found_within_whole_models_and_run_folders(tmp_path):
    model = tiny_addp()
    save_model(model, tmp_path / MODEL_FILE)
    assert same(load_tokenizer(tmp_path), model.tokenizer)
    assert same(load_predictor(tmp_path), model.predictor)
    assert same(load_addp(tmp_path), model)
    assert same(load_addp(str(tmp_path), tokenizer=tmp_path, predictor=tmp_path), model)


def test_published_training_file_with_everything_around_the_model(tmp_path, golden):
    """Optimizer, scaler, epoch, an argparse.Namespace, the tokenizer twice, DDP's prefix."""
    twice = golden | {"token_predictor." + k: v for k, v in golden.items() if k.startswith("vqgan.")}
    content = {
        "model": {"module." + k: v for k, v in twice.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 1599,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="addp_vit_base_patch16", blr=1e-4),
    }
    torch.save(content, tmp_path / "checkpoint-1599.pth")
    assert same(load_addp(tmp_path / "checkpoint-1599.pth", **HEADS), load_addp({"model": golden}, **HEADS))


@pytest.mark.parametrize("keep", ["vqgan.", "token_predictor.vqgan."])
def test_tokenizer_wherever_it_lies(golden, keep):
    vqgan = {k.removeprefix("vqgan."): v for k, v in golden.items() if k.startswith("vqgan.")}
    rest = {k: v for k, v in golden.items() if not k.startswith("vqgan.")}
    model = load_addp({"model": rest | {keep + k: v for k, v in vqgan.items()}}, **HEADS)
    assert same(model, load_addp({"model": golden}, **HEADS))
    for form in ({"state_dict": vqgan}, vqgan, {"model": {"vqgan." + k: v for k, v in vqgan.items()}}):
        assert same(load_tokenizer(form), model.tokenizer)
    assert same(load_addp({"model": rest}, tokenizer=vqgan, **HEADS), model)


def test_predictor_from_a_mage_file(golden):
    mage = {k.removeprefix("token_predictor."): v for k, v in golden.items() if k.startswith("token_predictor.")}
    heads = {k: v for k, v in HEADS.items() if k.startswith("predictor")}
    model = load_addp({"model": golden}, **HEADS)
    assert same(load_predictor({"model": mage}, **heads), model.predictor)
    with_vqgan = mage | {k: v for k, v in golden.items() if k.startswith("vqgan.")}
    assert same(load_predictor({"model": with_vqgan}, **heads), model.predictor)
    without = {k: v for k, v in golden.items() if not k.startswith("token_predictor.")}
    assert same(load_addp({"model": without}, predictor={"model": mage}, **HEADS), model)
    assert load_addp({"model": without}, **HEADS).predictor is None


def test_head_defaults_are_width_over_64_and_16(golden):
    config = load_addp({"model": golden}).config
    assert (config.denoiser.encoder.heads, config.denoiser.decoder.heads) == (1, 16)
    assert (config.predictor.heads, config.predictor.decoder_heads) == (1, 16)


# -------------------- sizes and ViT files


def test_positions_are_resampled_to_other_sizes(golden):
    model = load_addp({"model": golden}, image_size=(128, 192), **HEADS)
    assert model.config.grid == (8, 12)
    assert sample(model, 1, steps=2).shape == (1, 3, 128, 192)
    images = torch.rand(1, 3, 128, 192)
    assert torch.isfinite(model(images)["loss"])
    same_size = load_addp({"model": golden}, image_size=(256, 256), **HEADS)
    assert same(same_size, load_addp({"model": golden}, **HEADS))


def test_resampling_keeps_the_class_position_and_smooth_maps():
    model = tiny_addp(image_size=(16, 16))
    ramp = torch.linspace(-1, 1, 8)
    with torch.no_grad():
        model.denoiser.encoder.pos_embed[0, 1:, 0] = (ramp[:, None] + ramp[None]).flatten()
    encoder = load_encoder(to_published(model), img_size=(32, 24), encoder_heads=2)
    assert encoder.grid == (16, 12)
    assert torch.equal(encoder.pos_embed[0, 0], model.denoiser.encoder.pos_embed[0, 0])
    field = encoder.pos_embed[0, 1:, 0].view(16, 12)
    assert (field.diff(dim=0)[2:-2] > 0).all()
    assert (field.diff(dim=1)[:, 2:-2] > 0).all()


@pytest.mark.parametrize("kind", ["mae", "timm"])
def test_plain_vits(tmp_path, kind):
    """The encoder equals the ViT that wrote the file: timm's own, and a MAE file with its decoder around it."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=5).eval()
    state = vit.state_dict()
    if kind == "mae":
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
        decoder = {"mask_token": (1, 1, 8), "decoder_pos_embed": (1, 17, 8), "decoder_pred.weight": (192, 8)}
        state = {"model": state | {name: torch.zeros(shape) for name, shape in decoder.items()}}
    torch.save(state, tmp_path / "vit.pth")
    encoder = load_encoder(tmp_path / "vit.pth", img_size=32)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), vit.forward_features(images), atol=1e-5, rtol=1e-4)


def test_vits_with_parts_we_have_no_place_for_are_refused(tmp_path):
    state = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1, init_values=0.1, reg_tokens=2
    ).state_dict()
    fails(lambda: load_encoder(state, img_size=32), "reg_token", "no place for")


def test_encoder_options(golden):
    kept = load_encoder({"model": golden}, 256, encoder_heads=4, tokenizer_norm=True, drop_path=0.2)
    assert torch.equal(kept.tokenizer_norm.weight, golden["tokenizer_norm.weight"])
    assert kept.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    vit = {k: v for k, v in golden.items() if k.startswith(("blocks", "cls", "pos_embed", "patch", "norm"))}
    fails(lambda: load_encoder(vit, encoder_heads=4, tokenizer_norm=True), "tokenizer_norm", "has none")


# -------------------- wrong input


def test_other_methods_are_recognised(tmp_path, golden):
    mage = {
        "model": {k.removeprefix("token_predictor."): v for k, v in golden.items() if k.startswith("token_predictor.")}
    }
    vqgan = {k.removeprefix("vqgan."): v for k, v in golden.items() if k.startswith("vqgan.")}
    fails(lambda: load_addp(mage), "this is a MAGE checkpoint: pass it as predictor=")
    fails(lambda: load_addp(vqgan), "this is a VQGAN checkpoint: pass it as tokenizer=")
    fails(lambda: load_predictor(vqgan), "VQGAN", "expected a MAGE checkpoint")
    fails(lambda: load_encoder(vqgan), "VQGAN", "pixel encoder")
    fails(lambda: load_addp({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}), "ResNet")
    fails(lambda: load_addp({"a.weight": torch.zeros(1)}), "unknown content (1 entries such as a.weight)")
    assert "MAE" in describe(dict.fromkeys(["mask_token", "decoder_pred.weight", "blocks.0.attn.qkv.weight"]))
    taming = vqgan | {"quant_conv.weight": torch.zeros(1), "encoder.down.0.attn.0.q.weight": torch.zeros(1)}
    save_file(taming, tmp_path / "t.safetensors")
    fails(lambda: load_tokenizer({"state_dict": {**vqgan, "encoder.mid.attn_1.q.weight": torch.zeros(1)}}), "attention")


def test_every_wrong_tensor_is_named(golden):
    broken = dict(golden)
    del broken["blocks.1.norm1.bias"], broken["mlm_layer.ln.weight"]
    broken["surplus.weight"] = torch.zeros(2)
    broken["norm.weight"] = torch.zeros(65)
    fails(
        lambda: load_addp({"model": broken}, **HEADS),
        "2 missing: denoiser.encoder.blocks.1.norm1.bias, denoiser.decoder.mlm_layer.ln.weight",
        "1 unexpected: surplus.weight",
        "1 mis-shaped: denoiser.encoder.norm.weight (found (65,), expected (64,))",
    )


def test_no_tokenizer_anywhere(golden):
    fails(
        lambda: load_addp({"model": {k: v for k, v in golden.items() if "vqgan" not in k}}, **HEADS),
        "no tokenizer",
        "tokenizer=<VQGAN file>",
    )


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "bare pickle"])
def test_hostile_pickles_are_refused_unexecuted(tmp_path, golden, form):
    path, trap = tmp_path / "evil.pth", tmp_path / "trap"
    content = {"model": {"blocks.0.attn.qkv.weight": torch.zeros(1)}, "args": Hostile(str(trap))}
    if form == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(str(trap)), protocol=2))
    for load in (load_addp, load_encoder, load_tokenizer, load_predictor):
        fails(lambda load=load: load(path), str(path), "refused, unpickling it could run code", "mkdir")
    assert not trap.exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_files(tmp_path, name, content):
    path = tmp_path / name
    if content is None:  # cut off in the middle
        (save_file if name.endswith("tensors") else torch.save)({"a": torch.zeros(1000)}, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    fails(lambda: load_addp(path), str(path))


def test_a_download_page_in_place_of_a_file(tmp_path):
    (tmp_path / "vqgan.ckpt").write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    fails(lambda: load_tokenizer(tmp_path / "vqgan.ckpt"), "not a checkpoint", "<!DOCTYPE html", "fetch it again")


def test_parts_with_another_codebook(golden):
    model, other = tiny_addp(), tiny_addp()
    fails(
        lambda: load_addp({"model": golden}, tokenizer=model_file(model), **HEADS), "it has 24 codes", "predicts 1024"
    )
    assert same(load_addp(model_file(model), tokenizer=model_file(other)), model)


def model_file(model):
    """The published layout with its architecture, as a dictionary."""
    text = json.dumps({"kind": "addp", "architecture": dataclasses.asdict(model.config)})
    return {"model": to_published(model), "addp": text}


def test_stated_heads_win_over_stored_ones():
    content = model_file(tiny_addp())
    model = load_addp(content, encoder_heads=4, predictor_decoder_heads=8)
    assert (model.config.denoiser.encoder.heads, model.config.predictor.decoder_heads) == (4, 8)
    assert load_encoder(content, (8, 12), encoder_heads=8).config.heads == 8
    fails(lambda: load_addp(content, encoder_heads=5), "heads: found 5", "width 16")


def test_predictors_of_another_grid_are_resampled():
    model = load_addp(model_file(tiny_addp(image_size=(8, 8))), predictor=model_file(tiny_addp()))
    assert model.predictor.tokens == 16
    assert torch.isfinite(model(torch.rand(1, 3, 8, 8))["loss"])


def test_our_own_state_dict(golden):
    model = load_addp({"model": golden}, **HEADS)
    assert same(load_addp(model.state_dict(), **HEADS), model)
    fails(lambda: load_addp(tiny_addp(ids_to="none").state_dict()), "save it with save_model")


def test_a_model_without_its_predictor_is_saved_without(tmp_path):
    model = tiny_addp()
    model.predictor = None
    save_model(model, tmp_path / "m.safetensors")
    assert load_addp(tmp_path / "m.safetensors").predictor is None


def test_a_tokenizer_inside_a_mage_file(golden):
    mage = {
        k.removeprefix("token_predictor."): v for k, v in golden.items() if k.startswith(("token_predictor.", "vqgan."))
    }
    assert same(load_tokenizer({"model": mage}), load_addp({"model": golden}, **HEADS).tokenizer)


def test_missing_files_name_the_nearest(tmp_path):
    (tmp_path / "addp-vit-base-16.pth").touch()
    fails(lambda: load_addp(tmp_path / "addp-vit-base16.pth"), "no such file", "did you mean 'addp-vit-base-16.pth'")
    fails(lambda: load_addp(tmp_path), "without model.safetensors", "start its command again")
    fails(lambda: load_addp("hf://oops"), "expected hf://owner/repository/file")


def test_files_without_tensors(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    fails(lambda: load_addp(tmp_path / "list.pth"), "found a list")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    fails(lambda: load_addp(tmp_path / "empty.pth"), "no tensors in it (entries: epoch)")


def test_architecture_of_another_version(tmp_path):
    text = json.dumps({"kind": "addp", "architecture": {"image_size": "big"}})
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"addp": text})
    fails(lambda: load_addp(tmp_path / "m.safetensors"), "does not fit this version")


def test_weights_of_something_else(tmp_path):
    text = json.dumps({"kind": "depth", "architecture": {}})
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"addp": text})
    fails(lambda: load_encoder(tmp_path / "m.safetensors", 64), "the weights of 'depth'", "expected one of addp")


def test_misspelt_overrides(golden):
    with pytest.raises(TypeError, match="encoder_head'; did you mean 'encoder_heads'"):
        load_addp({"model": golden}, encoder_head=4)


def test_what_the_published_layout_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="only knows 'decoder'"):
        save_published(tiny_addp(ids_to="none"), tmp_path / "p.pth")
    model = tiny_addp()
    model.predictor = None
    with pytest.raises(ValueError, match="no token predictor"):
        save_published(model, tmp_path / "p.pth")
    assert not any(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_model(tiny_addp(seed=1), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tiny_addp(seed=2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_reading_tells_kind_and_architecture(golden):
    weights = read_weights({"model": golden}, **HEADS)
    assert weights.kind == "addp"
    assert weights.architecture.image_size == (256, 256)
    assert weights.architecture.tokenizer.multipliers == (1, 1, 2, 2, 4)
    assert weights.architecture.vocabulary.size == 2025
