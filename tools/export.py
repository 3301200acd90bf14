"""`addp export`: a checkpoint in another layout, checked by reading it back."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from addp_core.checkpoint import load_addp, read_tensors, read_weights, save_model, save_published, stated_heads
from addp_core.errors import UserError
from addp_core.layouts import published_addp_names

log = logging.getLogger("addp")


@dataclass
class Recipe:
    """Keys of `addp export`."""

    model: Annotated[str, "a run of `addp pretrain`, an ADDP file (ours or published), or hf://owner/repository/file"]
    out: Annotated[str, "file to write: .safetensors (ours) or .pth (published)"]
    layout: Annotated[
        Literal["addp", "published", "encoder"], "ours, the authors' (reads in their code), or the pixel encoder alone"
    ] = "addp"
    tokenizer: Annotated[str, "for a model file without one"] = ""
    predictor: Annotated[str, "for a model file without one"] = ""
    encoder_heads: Annotated[int | None, Ge(1), "of a published file whose heads are not width/64"] = None
    decoder_heads: Annotated[int | None, Ge(1), "of a published file whose decoder heads are not 16"] = None
    predictor_heads: Annotated[int | None, Ge(1), "of a published file whose heads are not width/64"] = None
    predictor_decoder_heads: Annotated[int | None, Ge(1), "of a published file whose decoder heads are not 16"] = None


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
    model = load_addp(
        recipe.model, tokenizer=recipe.tokenizer or None, predictor=recipe.predictor or None, **stated_heads(recipe)
    )
    part = model.denoiser.encoder if recipe.layout == "encoder" else model
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_published(model, out) if recipe.layout == "published" else save_model(part, out)
    except ValueError as error:
        raise UserError(f"layout={recipe.layout}: {error}") from error
    except OSError as error:
        raise UserError(
            f"out: {out} cannot be written ({error.strerror or error}); expected room and permission"
        ) from error
    again = published_addp_names(read_tensors(out)) if recipe.layout == "published" else read_weights(out).state
    written = part.state_dict()
    if again.keys() != written.keys() or not all(torch.equal(value, again[key]) for key, value in written.items()):
        raise RuntimeError(f"{out}: what reads back differs from what was written")
    log.info("%s: %.1f MB", out, out.stat().st_size / 1e6)
