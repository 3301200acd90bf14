"""`addp export`: a checkpoint in another layout, checked by reading it back."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from addp_core.checkpoint import load_addp, save_model, save_published
from addp_core.errors import UserError

log = logging.getLogger("addp")


@dataclass
class Recipe:
    """Keys of `addp export`."""

    model: Annotated[str, "a run of `addp pretrain`, an ADDP file (ours or published), or hf://repository/file"]
    out: Annotated[str, "file to write: .safetensors (ours) or .pth (published)"]
    layout: Annotated[
        Literal["addp", "published", "encoder"], "ours, the authors' (reads in their code), or the pixel encoder alone"
    ] = "addp"
    tokenizer: Annotated[str, "for a model file without one"] = ""
    predictor: Annotated[str, "for a model file without one"] = ""


SUFFIX = {"addp": ".safetensors", "published": ".pth", "encoder": ".safetensors"}


def run(recipe: Recipe) -> None:
    """Write the file and compare what reads back with what was written. UserError where the layout cannot hold the
    model.
    """
    out = Path(recipe.out)
    if out.suffix != SUFFIX[recipe.layout]:
        raise UserError(
            f"out: found {out.name}, expected a name that ends in {SUFFIX[recipe.layout]} for layout={recipe.layout}"
        )
    model = load_addp(recipe.model, tokenizer=recipe.tokenizer or None, predictor=recipe.predictor or None)
    try:
        if recipe.layout == "published":
            save_published(model, out)
        else:
            save_model(model if recipe.layout == "addp" else model.denoiser.encoder, out)
    except ValueError as error:
        raise UserError(f"layout={recipe.layout}: {error}") from error
    if recipe.layout != "encoder":
        again = load_addp(out).state_dict()
        if not all(torch.equal(value, again[key]) for key, value in model.state_dict().items()):
            raise RuntimeError(f"{out}: what reads back differs from what was written")
    log.info("%s: %.1f MB", out, out.stat().st_size / 1e6)
