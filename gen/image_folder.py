"""The folder of images that `addp generate` and `addp inpaint` write, and reading it back for `addp evaluate`.

<out>/recipe.yaml    the settings of all images in the folder
<out>/weights.txt    `addp generate`: fingerprint of the model that made the images
<out>/000000.png     image 0, image 1, ...
<out>/grid.png       a grid of images
"""

from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.paths import RECIPE_FILE
from addp_core.data.images import write_png
from addp_core.data.sources import ImageFiles, ImageSource, open_source
from addp_core.recipes.config import dump, load
from addp_core.weights.fingerprint import fingerprint

FINGERPRINT_FILE = "weights.txt"


def claim_folder(out: Path, recipe: Any, may_change: Set[str] = frozenset()) -> None:
    """Create the folder and write the recipe into it.

    Args:
        out: the folder.
        recipe: the recipe of the verb that writes the images.
        may_change: keys that may differ from those of the run that created the folder.

    Raises:
        UserError: if the folder cannot be written, or holds images made with other settings.
    """
    path = out / RECIPE_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before, now = vars(load(type(recipe), path)), vars(recipe)
            changed = [f"{key}={before[key]}" for key in now if key not in may_change and before[key] != now[key]]
            if changed:
                raise UserError(
                    f"{out}: holds images made with {', '.join(changed)}; expected the same settings, or another out="
                )
        write_atomically(path, dump(recipe).encode())
    except OSError as error:
        raise UserError(
            f"out: {out} cannot be written ({error.strerror}); expected a folder that you may write to"
        ) from error


def claim_weights(out: Path, model: nn.Module) -> None:
    """Write the fingerprint of the weights. Raises UserError if the folder's images come from other weights."""
    path, digest = out / FINGERPRINT_FILE, fingerprint(model)
    if path.exists() and path.read_text(encoding="ascii") != digest:
        raise UserError(f"{out}: holds images made with other weights; expected the same model, or another out=")
    write_atomically(path, digest.encode())


def image_path(out: Path, number: int) -> Path:
    """Return the path of image `number` in the folder."""
    return out / f"{number:06d}.png"


def write_image(image: Tensor, path: Path) -> None:
    """Write Float[3,H,W] in [0,1] as PNG."""
    write_png(to_pil_image(image.float().cpu()), path)


def write_grid(out: Path, n: int) -> None:
    """Write grid.png, a grid of the first `n` images of the folder."""
    images = torch.stack([pil_to_tensor(Image.open(image_path(out, i))) for i in range(n)])
    write_image(make_grid(images / 255, nrow=max(int(n**0.5), 1), pad_value=1.0), out / "grid.png")


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
