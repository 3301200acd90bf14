"""The layouts that hold the whole ADDP or its encoder: ours and the published one."""

from pathlib import Path

import torch
from torch import nn

from addp_core.method.addp import ADDP
from addp_core.weights.architectures import recipe_heads
from addp_core.weights.encoders import load_encoder
from addp_core.weights.files import State, read_tensors
from addp_core.weights.layouts.published import from_published
from addp_core.weights.loading import load_addp
from addp_core.weights.reading import read_weights
from addp_core.weights.saving import save_model, save_published
from tools.export.compare import given_heads
from tools.export.recipe import Recipe


def export_checkpoint(recipe: Recipe, out: Path) -> None:
    """Write the whole model in our layout or the published one."""
    model = _load_whole(recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    if recipe.layout == "published":
        save_published(model, out)
        _check_equal(out, model, from_published(read_tensors(out)))
    else:
        save_model(model, out)
        _check_equal(out, model, read_weights(out).state)


def export_encoder(recipe: Recipe, out: Path) -> None:
    """Write the encoder alone: ADDP's with its norm on the patches, or that of any other file as it is."""
    file = read_weights(recipe.model, heads=given_heads(recipe), wanted=recipe.weights)
    encoder: nn.Module
    if file.kind == "addp":
        encoder = _load_whole(recipe).denoiser.encoder
    else:
        norm = "tokenizer_norm.weight" in file.state
        encoder = load_encoder(
            recipe.model,
            None,
            encoder_heads=recipe.encoder_heads,
            weights=recipe.weights,
            tokenizer_norm=norm,
            tokenizer=recipe.tokenizer or None,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(encoder, out)
    _check_equal(out, encoder, read_weights(out).state)


def _load_whole(recipe: Recipe) -> ADDP:
    return load_addp(
        recipe.model, tokenizer=recipe.tokenizer or None, predictor=recipe.predictor or None, **recipe_heads(recipe)
    )


def _check_equal(out: Path, model: nn.Module, again: State) -> None:
    """Raise RuntimeError if the tensors read back are not the model's."""
    written = model.state_dict()
    if again.keys() != written.keys() or not all(torch.equal(value, again[key]) for key, value in written.items()):
        raise RuntimeError(f"{out}: the tensors read back differ from those written")
