"""The keys with which the verbs of this package name a model, and loading that model."""

from typing import Annotated, Any, Protocol

import torch
from annotated_types import Ge

from addp_core.method.addp import ADDP
from addp_core.training.compute import accelerate_model
from addp_core.weights.architectures import recipe_heads
from addp_core.weights.loading import load_addp

ModelSource = Annotated[
    str, "a run folder of `addp pretrain`, an ADDP file (ours or published), zoo:cifar10, or hf://owner/repository/file"
]
TokenizerSource = Annotated[str, "tokenizer file, for a model file that does not include its tokenizer"]
EncoderHeads = Annotated[
    int | None, Ge(1), "encoder heads of a published file, if not those of published ViTs of its width"
]
DecoderHeads = Annotated[int | None, Ge(1), "decoder heads of a published file, where they are not 16"]


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


def load_for_sampling(recipe: ModelKeys, device: torch.device, **options: Any) -> ADDP:
    """Load the model that the recipe names, frozen, on `device` and without its token predictor."""
    model = load_recipe_model(recipe, **options).requires_grad_(False)
    model.predictor = None  # sampling does not use it
    model = model.to(device)
    accelerate_model(model)
    return model
