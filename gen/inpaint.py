"""`addp inpaint`: fill a part of an image, in `n` variations (App. E).

Inpainting: mask=<file> or box=[left,top,right,bottom] selects the part to fill. Uncropping: outside=true fills
everything else instead. Outpainting: extend=[left,top,right,bottom] adds pixels at the sides and fills them. All three
can be combined.

The image may have any size that is a multiple of the model's patches. Pixels outside the hole come back unchanged.
Variation i depends on the seed and on i alone.
"""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.base.paths import expand_home
from addp_core.data.images import ImageError, LazyImage, eval_transform, wrap_image_errors
from addp_core.method.addp import ADDP
from addp_core.method.config import TokenizedImages
from addp_core.method.mage import MAGE
from addp_core.method.sampler import inpaint
from addp_core.training.compute import autocast
from addp_core.training.processes import process_state
from gen.image_folder import GRID, INPUT, MASK, check_folder, claim_folder, image_path, write_image
from gen.model import load_for_sampling, load_generator
from gen.recipe import InpaintRecipe as Recipe

log = logging.getLogger("addp")

GRAY = 0.5  # color of the hole in input.png
MAY_CHANGE = frozenset({"out", "n"})  # keys that change no variation
TOKEN_WARNING_FACTOR = 4  # times the tokens of training, above which positions are stretched too far for good images


def run(recipe: Recipe) -> None:
    """Write the variations, the input, the mask and a grid of all. Raises UserError if the keys do not fit together."""
    image, hole = open_canvas(recipe)
    hw = (image.shape[1], image.shape[2])
    check_size(hw, load_generator(recipe).config)
    check_inputs_stay(recipe)
    check_folder(Path(recipe.out), recipe, MAY_CHANGE)
    model = load_for_sampling(recipe, process_state().device, image_size=hw)
    if not hole.any():
        log.warning("inpaint: the hole is empty; all variations will be equal to the image")
    with claim_folder(Path(recipe.out), recipe, MAY_CHANGE):
        write_variations(recipe, model, image, hole)


def write_variations(recipe: Recipe, model: ADDP | MAGE, image: Tensor, hole: Tensor) -> None:
    """Fill the hole, Bool[H,W], of an image, Float[3,H,W], and write what comes out."""
    out, device = Path(recipe.out), process_state().device
    variations: list[Tensor] = []
    for i, path in enumerate(tqdm(variation_paths(recipe), unit="img")):
        with autocast(recipe.precision, device):
            variations += inpaint(
                model,
                image[None].to(device),
                hole[None].to(device),
                **vars(recipe.sampling),
                seed=recipe.seed,
                blend=recipe.blend,
                first=i,
            ).cpu()
        write_image(variations[-1], path)
    masked = torch.where(hole, GRAY, image)
    write_image(masked, out / INPUT)
    write_image(hole.float().expand(3, -1, -1), out / MASK)
    write_image(make_grid([masked, *variations], nrow=recipe.n + 1, pad_value=1.0), out / GRID)
    log.info("%d variations in %s, %.0f %% of the image filled", recipe.n, out, 100 * hole.float().mean())


def check_inputs_stay(recipe: Recipe) -> None:
    """Raise UserError if `image` or `mask` is a file that this would write."""
    out = Path(recipe.out)
    written = {path.resolve() for path in [*(out / name for name in (INPUT, MASK, GRID)), *variation_paths(recipe)]}
    for key in ("image", "mask"):
        path = getattr(recipe, key)
        if path and expand_home(path).resolve() in written:
            raise UserError(f"{key}: {path} would be overwritten in out={recipe.out}; expected another out")


def variation_paths(recipe: Recipe) -> list[Path]:
    return [image_path(Path(recipe.out), i) for i in range(recipe.n)]


def open_canvas(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the image, Float[3,H,W] in [0,1], resized and extended as the recipe says, and the hole, Bool[H,W]."""
    if not (recipe.mask or recipe.box or any(recipe.extend)):
        raise UserError("mask, box, extend: expected at least one of them, to select the part to fill")
    original = read_image(recipe.image, "image")
    hole_image = draw_hole(recipe, original.size)
    if recipe.size is None:
        image = torch.from_numpy(np.array(original)).permute(2, 0, 1) / 255
        hole = torch.from_numpy(np.array(hole_image)) > 0
    else:
        crop = eval_transform(recipe.size)
        image = crop(original)
        bounds = crop.box(original.width, original.height)
        check_crop_keeps_hole(recipe, np.array(hole_image) > 0, bounds)
        hole = shrink_hole(np.array(hole_image) > 0, bounds, crop.hw)
    left, top, right, bottom = recipe.extend
    sides = (left, right, top, bottom)
    return F.pad(image, sides, value=GRAY), F.pad(hole, sides, value=True)


def shrink_hole(hole: np.ndarray, bounds: tuple[float, float, float, float], hw: tuple[int, int]) -> Tensor:
    """Return Bool[h,w]: the pixels of the resized part within `bounds` that touch the hole, however thin it is.

    hole: Bool[H,W] of the original image. bounds: left, top, right, bottom.
    """
    left, top, right, bottom = bounds
    part = hole[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]
    return F.adaptive_max_pool2d(torch.from_numpy(part)[None].float(), hw)[0] > 0


def check_crop_keeps_hole(recipe: Recipe, hole: np.ndarray, bounds: tuple[float, float, float, float]) -> None:
    """Raise UserError if `size` crops away the whole of mask and box, and warn if it crops away a part.

    hole: Bool[H,W] of the original image. bounds: left, top, right, bottom of what `size` keeps.
    """
    left, top, right, bottom = bounds
    kept = hole[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)].sum()
    if recipe.outside or kept == hole.sum():  # uncropping fills what is left of the surroundings
        return
    part = f"the central part that size= keeps, {left:.0f} to {right:.0f} across and {top:.0f} to {bottom:.0f} down"
    if not kept:
        raise UserError(
            f"mask, box: what they select lies outside {part}; expected a part to fill inside of it, or an image that "
            "was cropped before"
        )
    log.warning("inpaint: %.0f %% of the hole lies outside %s, and is not filled", 100 * (1 - kept / hole.sum()), part)


def draw_hole(recipe: Recipe, size: tuple[int, int]) -> Image.Image:
    """Draw mask and box as a black (kept) and white (filled) image of `size` (width, height)."""
    hole = np.zeros(size[::-1], dtype=np.uint8)
    if recipe.mask:
        mask = read_image(recipe.mask, "mask").convert("L")
        if mask.size != size:
            raise UserError(
                f"mask: {recipe.mask} has {mask.width} x {mask.height} pixels, the image {size[0]} x {size[1]}; "
                "expected the same size"
            )
        hole[np.array(mask) >= 128] = 255
    if recipe.box:
        left, top, right, bottom = recipe.box
        if not (0 <= left <= right <= size[0] and 0 <= top <= bottom <= size[1]):
            raise UserError(
                f"box: found {list(recipe.box)}, expected [left,top,right,bottom] within the image, "
                f"0 to {size[0]} across and 0 to {size[1]} down"
            )
        hole[top:bottom, left:right] = 255
    return Image.fromarray(255 - hole if recipe.outside and (recipe.mask or recipe.box) else hole)


def read_image(path: str, key: str) -> Image.Image:
    """Read an image file as RGB. Raises UserError, which names the recipe's key, if it is not an image."""
    try:
        with wrap_image_errors():
            return LazyImage(expand_home(path).read_bytes()).decode()
    except ImageError as error:
        raise UserError(f"{key}: {path}: {error}; expected an image file") from error


def check_size(hw: tuple[int, int], config: TokenizedImages) -> None:
    """Raise UserError if the model's patches do not tile the image, and warn if the image is far too large."""
    stride = config.tokenizer.stride
    if hw[0] % stride or hw[1] % stride:
        height, width = (max(round(side / stride), 1) * stride for side in hw)
        raise UserError(
            f"image: found {hw[1]} x {hw[0]} pixels (with extend), expected multiples of {stride}, such as "
            f"{width} x {height}; set size=[height,width] to resize it first"
        )
    tokens = hw[0] * hw[1] // stride**2
    if tokens > TOKEN_WARNING_FACTOR * config.tokens:
        log.warning(
            "inpaint: the image has %d tokens, but the model was trained on %d; set size= to shrink the image",
            tokens,
            config.tokens,
        )
