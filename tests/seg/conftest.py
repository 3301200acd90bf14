"""Fixtures that the tests of segmentation share."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_segmentation import train_command

from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main
from addp_core.weights.saving import save_model
from seg.scenes import find_pairs


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen scenes of 48 x 48 to 48 x 72 pixels; one of the validation images has odd sides."""
    out = tmp_path_factory.mktemp("toy")
    assert main(["toy", f"out={out}", "only=[ade20k]", "scene=48", "ade_train=12", "ade_val=4"]) == 0
    root = out / "ade20k"
    pair = find_pairs(root, "val")[0]
    for path in (pair.image, pair.class_map):
        image = Image.open(path)
        image.crop((0, 0, image.width - 5, image.height - 3)).save(path)
    return root


@pytest.fixture
def scenes_copy(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes that a test may change."""
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a randomly initialized encoder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "model.safetensors"
    save_model(Encoder(EncoderConfig(16, 4, 2), (32, 32), patch_size=8), path)
    return path


@pytest.fixture(scope="session")
def trained_run(scenes: Path, encoder_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(train_command(scenes, encoder_file, out)) == 0
    return out
