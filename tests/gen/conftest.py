"""What the tests of gen/ share."""

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from evaluation import HW, noise, photographs, write_images
from tiny import tiny_addp

from addp_core import load_encoder, save_model
from addp_core.networks.classifier import Classifier
from addp_core.recipes.cli import main


@pytest.fixture
def expect_user_error(capsys) -> Callable[..., None]:
    """Run a command that must exit with 2; the last line on stderr must contain all `parts`."""

    def check(arguments: list[str], *parts: str) -> None:
        capsys.readouterr()
        assert main(arguments) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(part in line for part in parts), line

    return check


@pytest.fixture
def offline(monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> Path:
    """Folders of images, the file of a small generator (`model`) and that of a small classifier (`classifier`)."""
    root = tmp_path_factory.mktemp("sets")
    write_images(root / "a", photographs(10, 1))
    write_images(root / "b", photographs(8, 2))
    write_images(root / "noise", noise(6))
    save_model(tiny_addp(HW), root / "model.safetensors")
    torch.manual_seed(0)
    classifier = Classifier(load_encoder("tiny", HW, init="random", patch_size=8), classes=3)
    torch.nn.init.normal_(classifier.get_parameter("head.weight"), std=0.5)
    save_model(classifier, root / "classifier.safetensors")
    return root
