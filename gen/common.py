"""What the verbs of this room share: the keys that name a model, loading it for sampling, and writing images."""

from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.data.images import ImageError, Picture, image_errors, write_png
from addp_core.method.addp import ADDP
from addp_core.recipes.config import dump, load
from addp_core.training.compute import accelerate_model
from addp_core.weights.checkpoint import load_addp, stated_heads

REPORT = "evaluation.json"  # in the folder of `addp evaluate`

ModelSource = Annotated[
    str, "a run of `addp pretrain`, an ADDP file (ours or published), or hf://owner/repository/file"
]
TokenizerSource = Annotated[str, "for a model file without one"]
EncoderHeads = Annotated[int | None, Ge(1), "of a published file whose heads are not width/64"]
DecoderHeads = Annotated[int | None, Ge(1), "of a published file whose decoder heads are not 16"]


def load_named(recipe: Any, **options: Any) -> ADDP:
    """The model that a recipe names with the keys model, tokenizer and heads, on the CPU."""
    return load_addp(recipe.model, tokenizer=recipe.tokenizer or None, **stated_heads(recipe), **options)


def load_sampler(recipe: Any, device: torch.device, **options: Any) -> ADDP:
    """The same, ready to sample on `device`, without its predictor."""
    model = load_named(recipe, **options).requires_grad_(False)
    model.predictor = None  # generation does without it
    model = model.to(device)
    accelerate_model(model)
    return model


def claim_folder(out: Path, recipe: Any, free: set[str] = frozenset()) -> None:
    """Make the folder and keep the recipe in it; UserError where it cannot be written or belongs to other settings.

    free: keys that may differ from those the folder was begun with.
    """
    note = out / "recipe.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if note.exists():
            before, now = vars(load(type(recipe), note)), vars(recipe)
            changed = [f"{key}={before[key]}" for key in now if key not in free and before[key] != now[key]]
            if changed:
                found = ", ".join(changed)
                raise UserError(f"{out}: holds images made with {found}; expected the same settings, or another out=")
        write_atomically(note, dump(recipe).encode())
    except OSError as error:
        raise UserError(
            f"out: {out} cannot be written ({error.strerror}); expected a folder you may write to"
        ) from error


def read_picture(path: str, key: str) -> Picture:
    """The image file at `path`; UserError, with the recipe's key, where it is none. Decoding may yet fail."""
    try:
        with image_errors():
            return Picture(Path(path).expanduser().read_bytes())
    except ImageError as error:
        raise UserError(f"{key}: {path}: {error}; expected an image file") from error


def image_path(out: Path, i: int) -> Path:
    return out / f"{i:06d}.png"


def write_image(image: Tensor, path: Path) -> None:
    """Float[3,H,W] in [0,1] -> PNG."""
    write_png(to_pil_image(image.float().cpu()), path)
