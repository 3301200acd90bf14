"""The model that is exported as a classifier or encoder, and the comparison of the export's outputs with its own."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.base.rng import generator
from addp_core.networks.classifier import Classifier, finetuning_norm
from addp_core.weights.architectures import NORMALISATION
from addp_core.weights.encoders import load_encoder
from addp_core.weights.loading import load_classifier
from addp_core.weights.reading import read_weights
from tools.export.recipe import Recipe

log = logging.getLogger("addp")

FIXED_KEYS = (  # of a detector or segmentor
    "img_size",
    "normalisation",
    "tokenizer_norm",
    "weights",
    "encoder_heads",
    "tokenizer",
)
TOLERANCE = 1e-4  # for the largest difference of two outputs, relative to the largest output


def load_exported(recipe: Recipe) -> Classifier:
    """Load the classifier in the file, or the encoder as a classifier without a head (`num_classes` 0).

    Images have the size that the recipe sets, otherwise the file's own.
    """
    if read_weights(recipe.model, "classifier", given_heads(recipe), wanted=recipe.weights).kind == "classifier":
        refuse_keys(recipe, ("tokenizer_norm", "tokenizer"), "classifier")
        return load_classifier(
            recipe.model,
            recipe.img_size,
            encoder_heads=recipe.encoder_heads,
            normalisation=recipe.normalisation,
            weights=recipe.weights,
        )
    encoder = load_encoder(
        recipe.model,
        recipe.img_size,
        encoder_heads=recipe.encoder_heads,
        weights=recipe.weights,
        tokenizer_norm=recipe.tokenizer_norm,
        tokenizer=recipe.tokenizer or None,
    )
    mean, std = NORMALISATION[recipe.normalisation or "imagenet"]
    log.info(
        "%s: an encoder for images of %d x %d px%s",
        *(recipe.model, *encoder.image_size, "" if recipe.img_size else ", its own size (img_size sets another)"),
    )
    return Classifier(encoder, 0, norm=finetuning_norm(encoder), mean=mean, std=std).eval()


def refuse_keys(recipe: Recipe, keys: Iterable[str], kind: str) -> None:
    """Raise UserError if the recipe sets one of these keys, which mean nothing for a model of this kind."""
    for key in keys:
        if getattr(recipe, key):
            raise UserError(f"{key}: {recipe.model} is a {kind} with a fixed architecture; leave the key out")


def given_heads(recipe: Recipe) -> dict[str, int]:
    """Return the heads of the encoder, if the recipe sets them, as `read_weights` takes them."""
    return {} if recipe.encoder_heads is None else {"encoder_heads": recipe.encoder_heads}


def random_images(model: Classifier, batch: int) -> Tensor:
    """Return random images Float[batch,3,H,W] of the model's size, distributed like normalized ones."""
    return torch.randn(batch, 3, *model.encoder.image_size, generator=generator("export", batch))


@contextmanager
def removed_on_failure(*files: Path) -> Iterator[None]:
    """Remove the files of an export if its comparison, which is made in the block, fails."""
    try:
        yield
    except (RuntimeError, UserError):
        for file in files:
            file.unlink(missing_ok=True)
        raise


def check_equal(out: Path, name: str, expected: Tensor, found: Tensor) -> None:
    """Raise RuntimeError if two outputs differ by more than rounding; see `removed_on_failure`."""
    difference = (found - expected).abs().max().item()
    relative = difference / max(expected.abs().max().item(), 1e-12)
    if not relative <= TOLERANCE:
        raise RuntimeError(
            f"{out}: its {name} differ from PyTorch's by {difference:.3g} ({relative:.2g} of the largest); removed"
        )
    log.info("%s differ from PyTorch's by at most %.2g (%.1g of the largest)", name, difference, relative)
