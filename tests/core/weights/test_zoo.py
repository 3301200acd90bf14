"""The models that come with the package: they load offline in every way that a file does."""

import pytest
import torch

from addp_core import load_addp, load_encoder, sample
from addp_core.recipes.cli import main
from addp_core.weights.files import ZOO

NAMES = sorted(path.stem for path in ZOO.glob("*.safetensors"))


def test_the_zoo_is_not_empty():
    assert {"cifar10", "toy"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_zoo_is_small_generates_and_gives_features(name):
    assert (ZOO / f"{name}.safetensors").stat().st_size <= 4_000_000
    model = load_addp(f"zoo:{name}")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    height, width = model.config.image_size
    images = sample(model, 2, steps=3, seed=0)
    assert images.shape == (2, 3, height, width)
    assert images.std() > 0.1  # no flat color
    tokens = load_encoder(f"zoo:{name}", img_size=height).forward_features(images)
    assert tokens.shape == (2, 1 + model.config.tokens, model.config.denoiser.encoder.width)


def test_the_command(tmp_path):
    assert main(["generate", "model=zoo:cifar10", "n=1", "sampling.steps=2", f"out={tmp_path / 'images'}"]) == 0
    assert (tmp_path / "images" / "000000.png").is_file()


def test_an_unknown_name(tmp_path, capsys):
    assert main(["generate", "model=zoo:cifar01", "n=1", f"out={tmp_path / 'images'}"]) == 2
    assert "zoo:cifar01: no such model; did you mean 'cifar10'?; the models are cifar10, toy" in capsys.readouterr().err
