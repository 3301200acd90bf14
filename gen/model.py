"""Loading the model that a recipe of this package names."""

from typing import Any, Protocol

import torch

from addp_core.method.addp import ADDP
from addp_core.training.compute import accelerate_model
from addp_core.weights.architectures import recipe_heads
from addp_core.weights.loading import load_addp


class ModelKeys(Protocol):
    """A recipe with the keys that name a model."""

    model: str
    tokenizer: str
    encoder_heads: int | None
    decoder_heads: int | None


def load_recipe_model(recipe: ModelKeys, **options: Any) -> ADDP:
    """Load the model that the recipe names, on the CPU. `options` are those of `load_addp`."""
    heads: dict[str, Any] = recipe_heads(recipe)
    return load_addp(recipe.model, tokenizer=recipe.tokenizer or None, **heads, **options)


def load_for_sampling(recipe: ModelKeys, device: torch.device, compile: bool = False, **options: Any) -> ADDP:
    """Load the model that the recipe names, frozen, on `device` and without its token predictor.

    compile: compile the denoiser and the tokenizer's decoder by torch.compile.
    """
    model = load_recipe_model(recipe, **options).requires_grad_(False)
    model.predictor = None  # sampling does not use it
    model = model.to(device)
    for part in (model.tokenizer, model.denoiser):
        accelerate_model(part, compile)
    return model
