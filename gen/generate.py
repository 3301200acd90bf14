"""`addp generate`: images to PNG. Image i depends on the seed and on i alone, so that processes can share the work and
a start over continues where the last one stopped.
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import PartialState
from annotated_types import Ge, Gt
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from addp_core.checkpoint import load_addp
from addp_core.config import dump, load
from addp_core.errors import UserError
from addp_core.sampler import SampleConfig, sample

log = logging.getLogger("addp")


@dataclass
class Recipe:
    """Keys of `addp generate`."""

    model: Annotated[str, "a run of `addp pretrain`, an ADDP file (ours or published), or hf://repository/file"]
    out: Annotated[str, "folder for 000000.png, 000001.png, ... and grid.png"]
    n: Annotated[int, Ge(1), "number of images"] = 64
    seed: Annotated[int, "image i depends on this and on i alone"] = 0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    batch: Annotated[int, Gt(0), "images at a time on each process"] = 16
    grid: Annotated[int, Ge(0), "how many of the first images grid.png shows; 0 for none"] = 64
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "arithmetic of the networks"] = "fp32"
    tokenizer: Annotated[str, "for a model file without one"] = ""
    encoder_heads: Annotated[int | None, "of a published file whose heads are not width/64"] = None
    decoder_heads: Annotated[int | None, "of a published file whose decoder heads are not 16"] = None


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Keys that change no image: a folder may be continued with others.
FREE_KEYS = ("out", "n", "batch", "grid")


def run(recipe: Recipe) -> None:
    """Write the images that are not there yet, then the grid. UserError where the folder holds images of other
    settings.
    """
    state = PartialState()
    out = Path(recipe.out)
    if state.is_main_process:
        claim_folder(out, recipe)
    heads = {
        key: getattr(recipe, key) for key in ("encoder_heads", "decoder_heads") if getattr(recipe, key) is not None
    }
    model = load_addp(recipe.model, tokenizer=recipe.tokenizer or None, **heads).requires_grad_(False)
    model.predictor = None  # generation does without it
    model = model.to(state.device)
    state.wait_for_everyone()

    # Whole batches that always hold the same images: a matrix product's rounding may depend on how many rows it has.
    todo = [
        b
        for b in range(-(-recipe.n // recipe.batch))
        if any(not image_path(out, i).exists() for i in numbers(recipe, b))
    ]
    mine = todo[state.process_index :: state.num_processes]
    done = recipe.n - sum(len(numbers(recipe, b)) for b in todo)
    if done:
        log.info("%d of %d images are there already", done, recipe.n)
    with tqdm(total=sum(len(numbers(recipe, b)) for b in mine), unit="img", disable=not state.is_main_process) as bar:
        for b in mine:
            with torch.autocast(state.device.type, DTYPES.get(recipe.precision), enabled=recipe.precision in DTYPES):
                images = sample(
                    model,
                    recipe.batch,
                    **vars(recipe.sampling),
                    seed=recipe.seed,
                    first=b * recipe.batch,
                    batch=recipe.batch,
                )
            for i, image in zip(numbers(recipe, b), images, strict=False):
                write_png(image, image_path(out, i))
            bar.update(len(numbers(recipe, b)))
    state.wait_for_everyone()
    if state.is_main_process and recipe.grid:
        write_grid(out, min(recipe.n, recipe.grid))
    if state.is_main_process:
        log.info("%d images in %s", recipe.n, out)


def numbers(recipe: Recipe, batch: int) -> range:
    """Numbers of the wanted images in this batch."""
    return range(batch * recipe.batch, min((batch + 1) * recipe.batch, recipe.n))


def image_path(out: Path, i: int) -> Path:
    return out / f"{i:06d}.png"


def claim_folder(out: Path, recipe: Recipe) -> None:
    """Make the folder and keep the recipe in it; UserError where it cannot be written or belongs to other settings."""
    note = out / "recipe.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if note.exists():
            before, now = vars(load(Recipe, note)), vars(recipe)
            changed = [key for key in now if key not in FREE_KEYS and before[key] != now[key]]
            if changed:
                found = ", ".join(f"{key}={before[key]}" for key in changed)
                raise UserError(f"{out}: holds images made with {found}; expected the same settings, or another out=")
        note.write_text(dump(recipe), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"out: {out} cannot be written ({error.strerror}); expected a folder you may write to"
        ) from error


def write_png(image: Tensor, path: Path) -> None:
    """Float[3,H,W] in [0,1] -> PNG, under a temporary name first: a file that is there is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        to_pil_image(image.float().cpu()).save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); finished images are kept, start again to continue"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_grid(out: Path, n: int) -> None:
    """grid.png of the first n images."""
    images = torch.stack([pil_to_tensor(Image.open(image_path(out, i))) for i in range(n)])
    write_png(make_grid(images / 255, nrow=max(int(n**0.5), 1), pad_value=1.0), out / "grid.png")
