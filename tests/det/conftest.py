"""Fixtures that the tests of detection share."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from coco_files import HEIGHT, WIDTH
from PIL import Image

from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main
from addp_core.weights.saving import save_model
from det.coco import CocoDataset


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., CocoDataset]:
    """Return a function that writes a COCO file and its two images to tmp_path and opens it as a dataset."""

    def make(content: dict | list | str, **options) -> CocoDataset:
        for i in range(2):
            Image.new("RGB", (WIDTH, HEIGHT), (i, 100, 200)).save(tmp_path / f"{i}.png")
        path = tmp_path / "a.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return CocoDataset(path, tmp_path, **options)

    return make


@pytest.fixture(scope="session")
def toy_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a toy COCO dataset with 8 training and 3 validation images."""
    out = tmp_path_factory.mktemp("toy")
    assert main(["toy", f"out={out}", "only=[coco]", "coco_train=8", "coco_val=3", "scene=48"]) == 0
    return out / "coco"


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of an encoder with four blocks and 8-pixel patches."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(0)
    save_model(Encoder(EncoderConfig(32, 4, 2), (32, 32), 8), path)
    return path
