"""Detection over an encoder that reads the ids of a frozen tokenizer, with both engines."""

import json
import os
import shutil
import signal
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from checks import same_weights
from safetensors.torch import load_file
from transfers import write_tiny_mage

from addp_core import load_encoder, load_tokenizer, save_model
from addp_core.networks.attention import PLAIN_ATTENTION
from addp_core.networks.tokenizer import Tokenizer
from addp_core.recipes.cli import main
from addp_core.recipes.config import load
from det import train as det_train
from det.model import load_detector
from det.stage import DetStage

RECIPE = {
    "data": {"size": 48, "scale": [0.5, 1.5], "workers": 0},
    "attention": {"window": 5, "global_blocks": 1, "relative": "decomposed", "class_token": False},
    "detector": {
        "channels": 16,
        "scales": [1, 0.5],
        "convs": 8,
        "fc": 16,
        "proposals": 20,
        "samples": 8,
        "score": 0.001,
    },
    "train": {"steps": 2, "batch": 2, "lr": 1e-3, "layer_decay": 0.8, "log_every": 1, "checkpoint_every": 1},
}
PLAIN = "attention={window: 0, global_blocks: 4, relative: none, class_token: true}"
ENGINES = (
    "torchvision",
    pytest.param("detectron2", marks=pytest.mark.skipif(not find_spec("detectron2"), reason="needs detectron2")),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder with a recipe, a run of `addp predictor` and its tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tiny_mage(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def train_command(root: Path, coco: Path, out: Path, *settings: str) -> list[str]:
    return [
        "det",
        "train",
        str(root / "recipe.yaml"),
        f"data={coco}",
        f"model={root / 'mage'}",
        f"out={out}",
        *settings,
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_detector_over_tokens_is_trained_stopped_continued_and_evaluated(
    root, toy_coco, tmp_path, monkeypatch, capsys, engine
):
    command = train_command(root, toy_coco, tmp_path / "whole", f"engine={engine}")
    assert main(command) == 0

    original = DetStage.loss

    def stop(self, model, batch, micro_step):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, batch, micro_step)

    monkeypatch.setattr(DetStage, "loss", stop)
    command = [*command[:-2], f"out={tmp_path / 'run'}", f"engine={engine}"]
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 0
    monkeypatch.setattr(DetStage, "loss", original)
    assert main(command) == 0
    whole, continued = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)

    file = tmp_path / "moved.safetensors"  # the file alone is enough: it holds the tokenizer
    shutil.copy(tmp_path / "run" / "model.safetensors", file)
    capsys.readouterr()
    assert main(["det", "eval", f"model={file}", f"data={toy_coco}", "json=true"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert metrics["box_AP"] == pytest.approx(last["box_AP"])
    assert main(["det", "predict", f"model={file}", f"images={toy_coco / 'val2017'}", f"out={tmp_path / 'drawn'}"]) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 3

    encoder = load_encoder(file, 48)
    assert encoder.kind == "token_encoder"
    assert same_weights(encoder.tokenizer, load_encoder(root / "mage", 48).tokenizer)
    initial = load_encoder(root / "mage", 48)
    assert not torch.equal(encoder.blocks[0].mlp.fc1.weight, initial.blocks[0].mlp.fc1.weight)


def build(root: Path, *settings: str):
    """Return the encoder that `addp det train` starts from, in evaluation mode."""
    recipe = load(det_train.Recipe, root / "recipe.yaml", [f"model={root / 'mage'}", "out=x", *settings])
    return det_train.build_encoder(recipe).eval()


def test_features_in_detection_are_those_in_classification_where_attention_is_plain(root):
    images = torch.randn(2, 3, 48, 48)
    found = build(root, PLAIN)
    assert found.attention == PLAIN_ATTENTION
    expected = load_encoder(root / "mage", 48)
    torch.testing.assert_close(found.forward_features(images), expected.forward_features(images))
    half = build(root, PLAIN, "normalisation=half")
    pixels = torch.rand(2, 3, 48, 48)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (expected.mean, expected.std))
    ids = expected.tokenize((pixels - mean) / std)
    assert torch.equal(half.tokenize((pixels - 0.5) / 0.5), ids)


def test_from_scratch_only_the_tokenizer_is_trained(root, tmp_path):
    tokenizer = root / "tokenizer.safetensors"
    settings = ["model=tiny", "init=random", "input=token", f"tokenizer={tokenizer}"]
    encoder = build(root, *settings)
    assert encoder.config.width == 192
    assert torch.equal(encoder.tokenizer.quantize.embedding.weight, load_tokenizer(tokenizer).quantize.embedding.weight)
    assert same_weights(encoder, build(root, *settings))
    assert not same_weights(encoder, build(root, *settings, "train.seed=1"))


@pytest.mark.parametrize("engine", ENGINES)
def test_images_whose_size_is_no_multiple_of_the_stride_are_padded(root, toy_coco, tmp_path, engine):
    settings = [f"engine={engine}", "data.size=46", "train.steps=1"]
    assert main(train_command(root, toy_coco, tmp_path, *settings)) == 0
    model = load_detector(tmp_path)
    assert (model.architecture.size, model.architecture.token_encoder.grid) == (46, (12, 12))
    (found,) = model.detect([torch.randint(256, (3, 30, 40), dtype=torch.uint8)])
    assert found.boxes[:, 2].max() <= 40
    assert found.boxes[:, 3].max() <= 30


MISTAKES = {
    "init=random model=tiny input=token": "input=token: tiny is a size, which has no tokenizer; expected tokenizer=",
    "input=pixels": "reads token ids; expected an encoder of pixels (ADDP, MAE, BEiT, ViT)",
    "tokenizer={root}/other.safetensors": "it has 20 codes, but the model predicts 24",
    "tokenizer={root}/drawn.safetensors": "mage/model.safetensors was trained on another tokenizer; expected that one",
    "patch_size=16": "patch_size: found 16, but {root}/mage/model.safetensors has 4; leave the key out",
    "tokenizer_norm=true": "tokenizer_norm: {root}/mage/model.safetensors has none",
}


@pytest.mark.parametrize("settings", MISTAKES)
def test_mistakes_end_in_one_line(root, toy_coco, tmp_path, capsys, settings):
    config = load_tokenizer(root / "tokenizer.safetensors").config
    save_model(Tokenizer(replace(config, codebook=20)), root / "other.safetensors")
    save_model(Tokenizer(config), root / "drawn.safetensors")
    arguments = settings.format(root=root).split()
    assert main(train_command(root, toy_coco, tmp_path, *arguments)) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert MISTAKES[settings].format(root=root) in errors[-1]
