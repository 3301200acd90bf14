"""Detection over the four stages of a CNN, with both engines."""

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from checks import same_weights
from safetensors.torch import load_file
from tiny import random_tensor, tiny_cnn_addp

from addp_core import load_encoder, save_model
from addp_core.networks.cnn import CnnConfig, CnnEncoder
from addp_core.recipes.cli import main
from det.model import load_detector
from det.pyramid import StagePyramid
from det.stage import DetStage

RECIPE = {
    "data": {"size": 48, "scale": [0.5, 1.5], "workers": 0},
    "detector": {"channels": 16, "convs": 8, "fc": 16, "proposals": 20, "samples": 8, "score": 0.001},
    "train": {"steps": 2, "batch": 2, "lr": 1e-3, "log_every": 1, "checkpoint_every": 1},
}
ENGINES = (
    "torchvision",
    pytest.param("detectron2", marks=pytest.mark.skipif(not find_spec("detectron2"), reason="needs detectron2")),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder with a recipe and an ADDP with a CNN."""
    folder = tmp_path_factory.mktemp("stages")
    save_model(tiny_cnn_addp(image_size=(32, 32)), folder / "addp.safetensors")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def train_command(root: Path, coco: Path, out: Path, *settings: str) -> list[str]:
    model = root / "addp.safetensors"
    return ["det", "train", str(root / "recipe.yaml"), f"data={coco}", f"model={model}", f"out={out}", *settings]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_detector_is_trained_stopped_continued_and_evaluated(root, toy_coco, tmp_path, monkeypatch, capsys, engine):
    assert main(train_command(root, toy_coco, tmp_path / "whole", f"engine={engine}")) == 0
    assert "FPN over its stages of strides 4, 8, 16, 32" in capsys.readouterr().err

    original = DetStage.loss

    def stop(self, model, batch, micro_step):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, batch, micro_step)

    monkeypatch.setattr(DetStage, "loss", stop)
    with pytest.raises(SystemExit):
        main(train_command(root, toy_coco, tmp_path / "parts", f"engine={engine}"))
    monkeypatch.setattr(DetStage, "loss", original)
    assert main(train_command(root, toy_coco, tmp_path / "parts", f"engine={engine}")) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())

    detector = load_detector(tmp_path / "whole")
    assert detector.architecture.cnn_encoder == CnnConfig("test_resnet", 16, drop_path=0.1)
    assert main(["det", "eval", f"model={tmp_path / 'whole'}", f"data={toy_coco}", f"out={tmp_path / 'eval'}"]) == 0
    assert "box_AP" in json.loads((tmp_path / "eval" / "figures.json").read_text())

    before, after = load_encoder(root / "addp.safetensors", 48), load_encoder(tmp_path / "whole", 48)
    assert isinstance(after, CnnEncoder)
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}
    assert any(name.endswith("conv1.weight") for name in changed)
    assert not any("running_" in name or "num_batches" in name for name in changed)  # frozen statistics


def test_the_pyramid_reads_every_stage():
    torch.manual_seed(0)
    encoder = CnnEncoder(CnnConfig("test_resnet"), (64, 64))
    pyramid = StagePyramid(encoder, 8).eval()
    maps = pyramid(random_tensor(1, 3, 64, 96))
    assert pyramid.strides == [64 // map_.shape[-2] for map_ in maps.values()] == [4, 8, 16, 32, 64]
    assert {map_.shape[1] for map_ in maps.values()} == {8}
    sum(map_.sum() for map_ in maps.values()).backward()
    assert all(p.grad is not None for p in pyramid.parameters())


def test_random_weights_of_a_model_of_timm(root, toy_coco, tmp_path):
    settings = ["model=test_resnet", "init=random", "train.steps=1", "engine=torchvision"]
    command = train_command(root, toy_coco, tmp_path / "run", *settings)
    command.remove(f"model={root / 'addp.safetensors'}")
    assert main(command) == 0
    assert not same_weights(load_encoder(tmp_path / "run", 48), load_encoder(root / "addp.safetensors", 48))


def test_scales_of_vits_are_refused(root, toy_coco, tmp_path, capsys):
    assert main(train_command(root, toy_coco, tmp_path / "run", "detector.scales=[1,0.5]")) == 2
    message = "detector.scales: found [1.0, 0.5], but the maps of test_resnet have strides 4, 8, 16, 32; leave the key"
    assert message in capsys.readouterr().err
