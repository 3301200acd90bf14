"""Loading the model that a recipe of this package names: ADDP, or MAGE as a generator."""

from typing import Any, Protocol

import torch

from addp_core.base.errors import renaming_keys
from addp_core.method.addp import ADDP
from addp_core.method.mage import MAGE
from addp_core.training.compute import accelerate_model
from addp_core.weights.architectures import recipe_heads
from addp_core.weights.loading import load_addp
from addp_core.weights.mage import load_mage
from addp_core.weights.reading import read_weights

GENERATORS = ("addp", "predictor")  # kinds of checkpoints that generate images


class ModelKeys(Protocol):
    """A recipe with the keys that name a model."""

    model: str
    tokenizer: str
    encoder_heads: int | None
    decoder_heads: int | None


def load_recipe_addp(recipe: ModelKeys, **options: Any) -> ADDP:
    """Load the ADDP model that the recipe names, on the CPU. `options` are those of `load_addp`."""
    heads: dict[str, Any] = recipe_heads(recipe)
    return load_addp(recipe.model, tokenizer=recipe.tokenizer or None, **heads, **options)


def load_generator(recipe: ModelKeys, image_size: tuple[int, int] | None = None) -> ADDP | MAGE:
    """Load the model that the recipe names, on the CPU.

    image_size: (height, width) in pixels; positions are resampled if it differs from the file's.
    """
    if read_weights(recipe.model).kind != "predictor":
        return load_recipe_addp(recipe, image_size=image_size)
    given = {"predictor_heads": recipe.encoder_heads, "predictor_decoder_heads": recipe.decoder_heads}
    heads: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    with renaming_keys({"predictor_heads": "encoder_heads", "predictor_decoder_heads": "decoder_heads"}):
        return load_mage(recipe.model, tokenizer=recipe.tokenizer or None, image_size=image_size, **heads)


def load_for_sampling(
    recipe: ModelKeys, device: torch.device, compile: bool = False, image_size: tuple[int, int] | None = None
) -> ADDP | MAGE:
    """Load the model that the recipe names, frozen, on `device`; ADDP without its token predictor.

    Args:
        compile: compile the denoiser, or MAGE's predictor, and the tokenizer's decoder by torch.compile.
        image_size: as in `load_generator`.
    """
    model = load_generator(recipe, image_size).requires_grad_(False)
    if isinstance(model, ADDP):
        model.predictor = None  # sampling does not use it
    model = model.to(device)
    for part in (model.tokenizer, model.denoiser if isinstance(model, ADDP) else model.predictor):
        accelerate_model(part, compile)
    return model
