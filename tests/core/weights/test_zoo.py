"""The models that come with the package: they load offline in every way that a file does."""

import pytest
import torch
from transfers import write_color_images

from addp_core import load_addp, load_encoder, load_mage, sample
from addp_core.recipes.cli import main
from addp_core.weights.files import ZOO

NAMES = sorted(path.stem for path in ZOO.glob("*.safetensors"))
ADDP_NAMES = [name for name in NAMES if not name.endswith("_mage")]


def test_the_zoo_is_not_empty():
    assert {"cifar10", "cifar10_mage", "toy"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_zoo_is_small_and_has_a_card(name):
    assert (ZOO / f"{name}.safetensors").stat().st_size <= 4_000_000
    assert f"## zoo:{name}\n" in (ZOO / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ADDP_NAMES)
def test_addp_generates_and_gives_features(name):
    model = load_addp(f"zoo:{name}")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    height, width = model.config.image_size
    images = sample(model, 2, steps=3, seed=0)
    assert images.shape == (2, 3, height, width)
    assert images.std() > 0.1  # no flat color
    tokens = load_encoder(f"zoo:{name}", img_size=height).forward_features(images)
    assert tokens.shape == (2, 1 + model.config.tokens, model.config.denoiser.encoder.width)


def test_mage_generates_gives_features_and_teaches_addp(tmp_path):
    parts = {"tokenizer": "zoo:cifar10", "predictor": "zoo:cifar10_mage"}
    mage = load_mage(parts["predictor"], tokenizer=parts["tokenizer"])
    assert {parameter.dtype for parameter in mage.parameters()} == {torch.float32}
    images = sample(mage, 2, steps=3)
    assert images.std() > 0.1
    tokens = load_encoder(parts["predictor"], 32, tokenizer=parts["tokenizer"]).forward_features(images)
    assert tokens.shape == (2, 65, 128)
    write_color_images(tmp_path / "images", hw=(32, 32))
    keys = ["data.workers=0", "train.steps=1", "train.batch=2", "train.warmup_steps=0", "train.preview_every=0"]
    keys += [f"{key}={value}" for key, value in parts.items()]
    assert main(["pretrain", "cifar10", f"data={tmp_path / 'images'}", f"out={tmp_path / 'run'}", *keys]) == 0


def test_the_command(tmp_path):
    assert main(["generate", "model=zoo:cifar10", "n=1", "sampling.steps=2", f"out={tmp_path / 'images'}"]) == 0
    assert (tmp_path / "images" / "000000.png").is_file()


def test_an_unknown_name(tmp_path, capsys):
    assert main(["generate", "model=zoo:cifar01", "n=1", f"out={tmp_path / 'images'}"]) == 2
    error = capsys.readouterr().err
    assert "zoo:cifar01: no such model; did you mean 'cifar10'?; the models are cifar10, cifar10_mage, toy" in error
