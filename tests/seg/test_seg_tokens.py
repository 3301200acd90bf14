"""Segmentation over an encoder that reads the ids of a frozen tokenizer: `addp seg` and the backbone in mmseg."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checks import assert_user_error, same_weights
from safetensors.torch import load_file
from toy_segmentation import train_command, user_error
from transfers import write_tiny_mage

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint

from addp_core import load_encoder, load_tokenizer
from addp_core.recipes.cli import main
from seg.launch import build_part
from seg.mmseg_config import import_mmseg
from seg.runner import RunFolder
from seg.token_backbone import AddpTokenViT


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder with a run of `addp predictor` for images of 32 pixels, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tiny_mage(folder, depth=4, side=8)
    return folder


def test_a_segmentor_over_tokens_is_trained_stopped_continued_and_evaluated(
    root, scenes, tmp_path, monkeypatch, capsys
):
    assert main(train_command(scenes, root / "mage", tmp_path / "whole")) == 0

    original = RunFolder.after_train_iter

    def stop(self, runner, batch_idx, *args, **options):
        if runner.iter == 1:
            self.signals.stop = True
        original(self, runner, batch_idx, *args, **options)

    monkeypatch.setattr(RunFolder, "after_train_iter", stop)
    with pytest.raises(SystemExit) as caught:
        main(train_command(scenes, root / "mage", tmp_path / "run"))
    assert caught.value.code == 0
    monkeypatch.setattr(RunFolder, "after_train_iter", original)
    assert main(train_command(scenes, root / "mage", tmp_path / "run")) == 0
    whole, continued = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)

    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("model.safetensors", "model.pth"):  # each alone is enough: it holds the tokenizer
        file = tmp_path / name
        shutil.copy(tmp_path / "run" / name, file)
        arguments = [f"model={file}", f"data={scenes}", f"out={tmp_path / 'scores'}", "data.workers=0"]
        assert main(["seg", "test", *arguments]) == 0
        metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
        assert metrics["aAcc"] == pytest.approx(last["aAcc"], abs=0.011)
    images = scenes / "images" / "validation"
    assert main(["seg", "predict", f"model={file}", f"images={images}", f"out={tmp_path / 'maps'}"]) == 0

    encoder, initial = (load_encoder(source, 32) for source in (tmp_path / "run", root / "mage"))
    assert encoder.kind == "token_encoder"
    assert same_weights(encoder.tokenizer, initial.tokenizer)
    assert not torch.equal(encoder.blocks[0].mlp.fc1.weight, initial.blocks[0].mlp.fc1.weight)


def test_from_scratch_the_tokenizer_keeps_its_weights(root, scenes, tmp_path):
    tokenizer = root / "tokenizer.safetensors"
    settings = ["model=tiny", "init=random", "input=token", f"tokenizer={tokenizer}", "train.steps=2"]
    assert main(train_command(scenes, Path("tiny"), tmp_path / "run", *settings)) == 0
    expected = load_tokenizer(tokenizer).state_dict()
    found = load_file(tmp_path / "run" / "model.safetensors")
    start = "backbone.encoder.tokenizer."
    frozen = {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}
    assert frozen.keys() == {name for name in expected if not name.startswith("decoder.")}
    assert all(torch.equal(value, expected[name]) for name, value in frozen.items())


def node(root: Path, **options) -> dict:
    """Return the config of a backbone over the ids of the tokenizer in `root`."""
    tokenizer = {"width": 32, "multipliers": (1, 1, 1), "blocks": 1, "codebook": 24, "dim": 8}
    arch = {"width": 32, "depth": 4, "heads": 2}
    vocabulary = {"codebook": 24, "unused": 5, "class_slot": 1}
    parts = {"arch": arch, "tokenizer": tokenizer, "vocabulary": vocabulary, "img_size": 32}
    pretrained = {"type": "Pretrained", "checkpoint": str(root / "mage")}
    return {"type": "AddpTokenViT", "init_cfg": pretrained, **parts, **options}


def test_the_backbones_maps_are_the_features_of_classification(root, tmp_path):
    import_mmseg()
    torch.manual_seed(0)
    backbone: AddpTokenViT = build_part(node(root, out_indices=(0, 3), relative="none", frozen_stages=1))
    state = torch.get_rng_state()
    backbone.init_weights()
    assert torch.equal(torch.get_rng_state(), state)
    backbone.eval()
    images = torch.randn(2, 3, 32, 32)
    first, last = load_encoder(root / "mage", 32).forward_maps(images, [0, -1])
    for found, expected in zip(backbone(images), (first, last), strict=True):
        torch.testing.assert_close(found, expected)
    assert [tuple(map_.shape) for map_ in backbone(torch.randn(1, 3, 44, 30))] == [(1, 32, 11, 8)] * 2
    assert backbone.get_layer_depth("token_emb.word_embeddings.weight")[0] == 0
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"layers"}

    torch.save({"state_dict": backbone.state_dict()}, tmp_path / "backbone.pth")
    again = build_part(node(root, out_indices=(0, 3), relative="none", init_cfg=None))
    load_checkpoint(again, str(tmp_path / "backbone.pth"))
    assert same_weights(again, backbone)


def test_random_weights_over_the_pretrained_tokenizer(root):
    import_mmseg()
    backbone: AddpTokenViT = build_part(node(root, init="random", normalisation="half"))
    before = backbone.token_emb.word_embeddings.weight.clone()
    backbone.init_weights()
    assert torch.equal(backbone.token_emb.word_embeddings.weight, before)
    assert same_weights(backbone.tokenizer, load_encoder(root / "mage", 32).tokenizer)
    assert backbone.mean == (0.5,) * 3


@pytest.mark.parametrize("normalisation", ["imagenet", "half"])
def test_a_pretrained_encoder_is_exported_for_mmseg_with_its_tokenizer(root, tmp_path, normalisation):
    shutil.copy(root / "mage" / "model.safetensors", tmp_path / "mage.safetensors")  # without the recipe of its run
    given = [f"tokenizer={root / 'tokenizer.safetensors'}", f"normalisation={normalisation}", "img_size=32"]
    model, out = f"model={tmp_path / 'mage.safetensors'}", tmp_path / "exported"
    assert main(["export", "layout=mmseg", model, f"out={out}", *given]) == 0
    (tmp_path / "mage.safetensors").unlink()
    model = build_part(Config.fromfile(out / "config.py").model)
    model.init_weights()
    expected = load_encoder(root / "mage", 32, attention=model.backbone.attention, normalisation=normalisation)
    images = torch.randn(1, 3, 32, 32)
    model.eval()
    torch.testing.assert_close(model.backbone(images)[-1], expected.forward_maps(images, [-1])[0])


def test_mistakes_in_a_backbones_config_tell_the_line(root):
    import_mmseg()
    arch = "arch=dict(width=32, depth=4, heads=2)"
    tokenizer = "tokenizer=dict(width=32, multipliers=(1, 1, 1), blocks=1, codebook=24, dim=8, groups=32)"
    vocabulary = "vocabulary=dict(codebook=24, unused=5, class_slot=1)"
    line = f"{arch}, {tokenizer}, {vocabulary}"
    assert_user_error(lambda: build_part(node(root, arch=None)), "arch, tokenizer: not given", line)
    assert_user_error(lambda: AddpTokenViT(), "arch, tokenizer: not given, expected both")
    other = build_part(node(root, arch={"width": 16, "depth": 4, "heads": 2}))
    assert_user_error(other.init_weights, "width=16", f"expects {line}")
    wrong = {"codebook": 20, "unused": 5, "class_slot": 1}
    assert_user_error(lambda: build_part(node(root, vocabulary=wrong)), "codebook=20, expected the tokenizer's 24")
    assert_user_error(lambda: build_part(node(root, tokenizer={"wide": 3})), "tokenizer: ", "wide")
    as_pixels = {"type": "AddpViT", "arch": "tiny", "init_cfg": node(root)["init_cfg"]}
    assert_user_error(build_part(as_pixels).init_weights, "reads token ids", "or AddpTokenViT")


MISTAKES = {
    "init=random model=tiny input=token": "input=token: tiny is a size, which has no tokenizer; expected tokenizer=",
    "init=random model= input=token": "model: not given, and the config's size has no name; expected one of tiny",
    "input=pixels": "reads token ids; expected an encoder of pixels (ADDP, MAE, BEiT, ViT)",
    "data.crop=30": "data.crop: found 30, expected a multiple of the model's patch size 4",
    "tokenizer_norm=true": "tokenizer_norm: ",
}


@pytest.mark.parametrize("settings", MISTAKES)
def test_mistakes_end_in_one_line(root, scenes, tmp_path, capsys, settings):
    given = settings.split()
    keys = {setting.split("=")[0] for setting in given}
    arguments = [a for a in train_command(scenes, root / "mage", tmp_path) if a.split("=")[0] not in keys]
    assert MISTAKES[settings] in user_error(capsys, *arguments, *given)
