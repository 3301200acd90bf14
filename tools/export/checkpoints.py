"""The layouts that hold the whole ADDP or its encoder: ours and the published one."""

from pathlib import Path

import torch

from addp_core.weights.architectures import recipe_heads
from addp_core.weights.files import read_tensors
from addp_core.weights.layouts.published import from_published
from addp_core.weights.loading import load_addp
from addp_core.weights.reading import read_weights
from addp_core.weights.saving import save_model, save_published
from tools.export.recipe import Recipe


def export_checkpoint(recipe: Recipe, out: Path) -> None:
    """Write the whole model in our layout or the published one, or its encoder alone."""
    model = load_addp(
        recipe.model, tokenizer=recipe.tokenizer or None, predictor=recipe.predictor or None, **recipe_heads(recipe)
    )
    part = model.denoiser.encoder if recipe.layout == "encoder" else model
    out.parent.mkdir(parents=True, exist_ok=True)
    save_published(model, out) if recipe.layout == "published" else save_model(part, out)
    again = from_published(read_tensors(out)) if recipe.layout == "published" else read_weights(out).state
    written = part.state_dict()
    if again.keys() != written.keys() or not all(torch.equal(value, again[key]) for key, value in written.items()):
        raise RuntimeError(f"{out}: the tensors read back differ from those written")
