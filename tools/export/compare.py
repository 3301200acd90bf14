"""The model that is exported as a classifier or encoder, and the comparison of the export's outputs with its own."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.base.rng import generator
from addp_core.networks.classifier import Classifier
from addp_core.weights.encoders import load_encoder
from addp_core.weights.files import MODEL_FILE
from addp_core.weights.loading import load_classifier
from addp_core.weights.reading import read_weights
from tools.export.recipe import Recipe

log = logging.getLogger("addp")

TOLERANCE = 1e-4  # for the largest difference of two outputs, relative to the largest output


def load_exported(recipe: Recipe) -> Classifier:
    """Load the classifier in the file, or the encoder as a classifier without a head (`num_classes` 0)."""
    if read_weights(recipe.model).kind == "classifier":
        if recipe.tokenizer_norm:
            raise UserError(
                f"tokenizer_norm: {recipe.model} is a classifier with a fixed architecture; leave the key out"
            )
        return load_classifier(recipe.model, recipe.img_size)
    encoder = load_encoder(
        recipe.model,
        recipe.img_size or 224,
        encoder_heads=recipe.encoder_heads,
        tokenizer_norm=recipe.tokenizer_norm,
        tokenizer=recipe.tokenizer or None,
    )
    return Classifier(encoder, 0).eval()


def random_images(model: Classifier, batch: int) -> Tensor:
    """Return random images Float[batch,3,H,W] of the model's size, distributed like normalized ones."""
    return torch.randn(batch, 3, *model.encoder.image_size, generator=generator("export", batch))


def check_equal(out: Path, name: str, expected: Tensor, found: Tensor) -> None:
    """Remove the export and raise RuntimeError if two outputs differ by more than rounding."""
    difference = (found - expected).abs().max().item()
    relative = difference / max(expected.abs().max().item(), 1e-12)
    if not relative <= TOLERANCE:
        for path in out.iterdir() if out.is_dir() else [out]:
            if path.name in (MODEL_FILE, "config.json", out.name):
                path.unlink()
        raise RuntimeError(
            f"{out}: its {name} differ from PyTorch's by {difference:.3g} ({relative:.2g} of the largest); removed"
        )
    log.info("%s differ from PyTorch's by at most %.2g (%.1g of the largest)", name, difference, relative)
