"""The folder of images that `addp generate` and `addp inpaint` write, and reading it back for `addp evaluate`.

<out>/recipe.yaml    the settings of all images in the folder
<out>/weights.txt    `addp generate`: fingerprint of the model that made the images
<out>/000000.png     image 0, image 1, ...
<out>/grid.png       a grid of images
"""

import contextlib
import os
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.launch import rank
from addp_core.base.paths import RECIPE_FILE
from addp_core.data.images import write_png
from addp_core.data.sources import ImageFiles, ImageSource, open_source
from addp_core.recipes.config import dump, load
from addp_core.training.run_folder import check_out, claim_out

FINGERPRINT_FILE = "weights.txt"
NUMBERED = re.compile(r"\d{6,}\.png")
GRID, INPUT, MASK = "grid.png", "input.png", "mask.png"  # beside the numbered images; the last two of `addp inpaint`


@contextlib.contextmanager
def claim_folder(out: Path, recipe: Any, may_change: Set[str] = frozenset(), weights: str = "") -> Iterator[None]:
    """Create the folder, hold its lock and write into it what its images are made from.

    All processes call this; rank 0 acts. The arguments are those of `check_folder`.

    Raises:
        UserError: if the folder cannot be written, another process works in it, or as `check_folder` does.
    """
    with claim_out(out, recipe, _image_names(out)):
        if rank() == 0:
            check_folder(out, recipe, may_change, weights)
            try:
                write_atomically(out / RECIPE_FILE, dump(recipe).encode())
                if weights:
                    write_atomically(out / FINGERPRINT_FILE, weights.encode())
            except OSError as error:
                raise UserError(
                    f"out: {out} cannot be written ({error.strerror}); expected a folder that you may write to"
                ) from error
        yield


def check_folder(out: Path, recipe: Any, may_change: Set[str] = frozenset(), weights: str = "") -> None:
    """Check that the images in a folder, if there are any, are those that a recipe makes.

    Args:
        out: the folder, which need not exist.
        recipe: the recipe of the verb that writes the images.
        may_change: keys that may differ from those of the run that created the folder.
        weights: fingerprint of the model; "" if any will do.

    Raises:
        UserError: if it holds images made with other settings or weights, or nobody knows how, or another verb's run.
    """
    names = _image_names(out)
    check_out(out, recipe, names)
    if not names:
        return
    before, now = vars(load(type(recipe), out / RECIPE_FILE)), vars(recipe)
    if changed := [f"{key}={before[key]}" for key in now if key not in may_change and before[key] != now[key]]:
        raise UserError(
            f"{out}: holds images made with {', '.join(changed)}; expected the same settings, or another out="
        )
    path = out / FINGERPRINT_FILE
    if weights and (not path.exists() or path.read_text(encoding="ascii") != weights):
        raise UserError(f"{out}: holds images made with other weights; expected the same model, or another out=")


def _image_names(out: Path) -> list[str]:
    """Return the names of the images in a folder that this package's verbs may have written."""
    names = sorted(os.listdir(out)) if out.is_dir() else []
    return [name for name in names if NUMBERED.fullmatch(name) or name in (GRID, INPUT, MASK)]


def image_path(out: Path, number: int) -> Path:
    """Return the path of image `number` in the folder."""
    return out / f"{number:06d}.png"


def write_image(image: Tensor, path: Path) -> None:
    """Write Float[3,H,W] in [0,1] as PNG."""
    write_png(to_pil_image(image.float().cpu()), path)


def write_grid(out: Path, n: int) -> None:
    """Write grid.png, a grid of the first `n` images of the folder."""
    images = torch.stack([pil_to_tensor(Image.open(image_path(out, i))) for i in range(n)])
    write_image(make_grid(images / 255, nrow=max(int(n**0.5), 1), pad_value=1.0), out / GRID)


def is_generated(folder: Path) -> bool:
    """Check whether `addp generate` wrote this folder."""
    return (folder / FINGERPRINT_FILE).exists()


def open_images(folder: Path, n: int | None = None) -> ImageSource:
    """Open the images of a folder. In a folder of `addp generate`, these are the first `n` numbered images (None: all),
    without the grid.

    Raises UserError, with the key data.source, if there are none.
    """
    if is_generated(folder):
        names = sorted(path.name for path in folder.glob("[0-9]*.png"))
        if not names:
            raise UserError(f"data.source: {folder} is empty: `addp generate` has not written an image there yet")
        return ImageFiles(folder, names if n is None else [image_path(folder, i).name for i in range(n)])
    return open_source(str(folder))
