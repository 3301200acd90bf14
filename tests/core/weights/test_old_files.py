"""Model files that an older version wrote give the outputs that it computed from them.

Commit 4243219 wrote `old_files/`: an ADDP of 8 x 12 pixels and a classifier over its encoder, both untrained, the
tokenizer of a short run, and in outputs.safetensors what that version computed for the images below.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from addp_core import load_addp, load_classifier, load_encoder, load_predictor, load_tokenizer

OLD_FILES = Path(__file__).parent / "old_files"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # other CPUs round the last bits of float32 differently

IDS_MASK = torch.arange(24)[None] % 2 == 0  # every other of 4 x 6 tokens is unreliable


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    return load_file(OLD_FILES / "outputs.safetensors")


@pytest.fixture
def images() -> Tensor:
    return torch.linspace(0, 1, 3 * 8 * 12).view(1, 3, 8, 12)


@torch.no_grad()
def test_addp(images, outputs):
    model = load_addp(OLD_FILES / "addp.safetensors")
    ids = outputs["ids"]
    assert torch.equal(model.tokenizer.encode(images), ids)
    torch.testing.assert_close(model.tokenizer.decode(model.tokenizer.lookup(ids)), outputs["decoded"], **CLOSE)
    torch.testing.assert_close(model.predictor(ids, IDS_MASK), outputs["probabilities"], **CLOSE)
    torch.testing.assert_close(model.logits(images, ids, IDS_MASK), outputs["logits"], **CLOSE)


@torch.no_grad()
def test_the_parts_of_addp(images, outputs):
    path, ids = OLD_FILES / "addp.safetensors", outputs["ids"]
    assert torch.equal(load_tokenizer(path).encode(images), ids)
    torch.testing.assert_close(load_predictor(path)(ids, IDS_MASK), outputs["probabilities"], **CLOSE)
    features = load_encoder(path, (8, 12)).forward_features(images)
    torch.testing.assert_close(features, outputs["features"], **CLOSE)


@torch.no_grad()
def test_classifier(images, outputs):
    model = load_classifier(OLD_FILES / "classifier.safetensors")
    assert model.class_names == ("a", "b", "c")
    torch.testing.assert_close(model(images), outputs["scores"], **CLOSE)
    features = load_encoder(OLD_FILES / "classifier.safetensors", (8, 12)).forward_features(images)
    torch.testing.assert_close(features, outputs["features"], **CLOSE)


@torch.no_grad()
def test_tokenizer(outputs):
    tokenizer = load_tokenizer(OLD_FILES / "tokenizer.safetensors")
    assert tokenizer.grid == (8, 8)
    ids = outputs["tokenizer_ids"]
    assert torch.equal(tokenizer.encode(torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)), ids)
    torch.testing.assert_close(tokenizer.decode(tokenizer.lookup(ids)), outputs["tokenizer_decoded"], **CLOSE)
