"""`addp inpaint`: fill a part of a picture, n times (App. E of the paper). Variation i depends on seed and i alone.

Inpainting: mask=<file> or box=[left,top,right,bottom] says what is filled. Uncropping: outside=true fills all but that.
Outpainting: extend=[left,top,right,bottom] adds so many pixels to the sides and fills them. They may be combined.
The picture may have any size that is a multiple of the model's patches; pixels that are not filled come back unchanged.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError, eval_transform
from addp_core.method.addp import ADDPConfig
from addp_core.method.sampler import SampleConfig, inpaint
from addp_core.training.compute import Precision, arithmetic
from addp_core.training.engine import process_state
from gen.common import (
    DecoderHeads,
    EncoderHeads,
    ModelSource,
    TokenizerSource,
    claim_folder,
    image_path,
    load_named,
    load_sampler,
    read_picture,
    write_image,
)

log = logging.getLogger("addp")

Box = tuple[int, int, int, int]
GREY = 0.5  # of the hole in input.png
FAR = 4  # times as many tokens as in training: positions are stretched too far for good pictures


@dataclass
class Recipe:
    """Keys of `addp inpaint`."""

    model: ModelSource
    image: Annotated[str, "the picture"]
    out: Annotated[str, "folder for 000000.png, ..., input.png (the hole grey), mask.png and grid.png"]
    mask: Annotated[str, "picture of the same size: white (or transparent) is filled, black is kept"] = ""
    box: Annotated[Box | None, "left, top, right, bottom in pixels of the picture: filled, with the mask"] = None
    outside: Annotated[bool, "fill what lies outside of mask and box instead"] = False
    extend: Annotated[
        tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)], Annotated[int, Ge(0)], Annotated[int, Ge(0)]],
        "pixels to add at the left, top, right and bottom, and to fill; counted after `size`",
    ] = (0, 0, 0, 0)
    size: Annotated[
        int | tuple[int, int] | None,
        "crop centrally and resize to this first: one side, or [height, width]; null: as it is",
    ] = None
    n: Annotated[int, Ge(1), "variations"] = 4
    seed: Annotated[int, "variation i depends on this and on i alone"] = 0
    blend: Annotated[int, Ge(0), "pixels inside the hole over which its seam is evened out"] = 8
    sampling: SampleConfig = field(default_factory=SampleConfig)
    precision: Precision = "fp32"
    tokenizer: TokenizerSource = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None


def run(recipe: Recipe) -> None:
    """Write the variations, what they started from, and a grid of all. UserError for what does not fit together."""
    image, hole = canvas(recipe)
    hw = (image.shape[1], image.shape[2])
    check_size(hw, load_named(recipe).config)
    out, device = Path(recipe.out), process_state().device
    claim_folder(out, recipe, free={"n"})
    model = load_sampler(recipe, device, image_size=hw)
    if not hole.any():
        log.warning("inpaint: there is no hole; what comes out is the picture")
    found = []
    for i in tqdm(range(recipe.n), unit="img"):
        with arithmetic(recipe.precision, device):
            found += inpaint(
                model,
                image[None].to(device),
                hole[None].to(device),
                **vars(recipe.sampling),
                seed=recipe.seed,
                blend=recipe.blend,
                first=i,
            ).cpu()
        write_image(found[-1], image_path(out, i))
    before = torch.where(hole, GREY, image)
    write_image(before, out / "input.png")
    write_image(hole.float().expand(3, -1, -1), out / "mask.png")
    write_image(make_grid([before, *found], nrow=recipe.n + 1, pad_value=1.0), out / "grid.png")
    log.info("%d variations in %s, %.0f %% of the picture filled", recipe.n, out, 100 * hole.float().mean())


def canvas(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The picture Float[3,H,W] in [0,1], with room at the sides where wanted, and Bool[H,W] what is to be filled."""
    if not (recipe.mask or recipe.box or any(recipe.extend)):
        raise UserError("mask, box, extend: expected at least one of them: what is to be filled?")
    picture = read_picture(recipe.image, "image")
    try:
        whole = picture.image()
    except ImageError as error:
        raise UserError(f"image: {recipe.image}: {error}; expected an image file") from error
    hole = hole_in(recipe, whole.size)
    if recipe.size is None:
        image = torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 255
    else:
        crop = eval_transform(recipe.size)
        image = crop(whole)
        bounds = crop.box(whole.width, whole.height)
        hole = hole.resize(crop.hw[::-1], Image.Resampling.NEAREST, box=bounds)
    left, top, right, bottom = recipe.extend
    hole = torch.from_numpy(np.array(hole)) > 0
    sides = (left, right, top, bottom)
    return F.pad(image, sides, value=GREY), F.pad(hole, sides, value=True)


def hole_in(recipe: Recipe, size: tuple[int, int]) -> Image.Image:
    """What mask and box say, as a black (kept) and white image of `size` (width, height)."""
    hole = np.zeros(size[::-1], dtype=np.uint8)
    if recipe.mask:
        try:
            mask = read_picture(recipe.mask, "mask").image().convert("L")
        except ImageError as error:
            raise UserError(f"mask: {recipe.mask}: {error}; expected an image file") from error
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
                f"box: {list(recipe.box)}; expected [left,top,right,bottom] within the image, "
                f"0 to {size[0]} across and 0 to {size[1]} down"
            )
        hole[top:bottom, left:right] = 255
    return Image.fromarray(255 - hole if recipe.outside and (recipe.mask or recipe.box) else hole)


def check_size(hw: tuple[int, int], config: ADDPConfig) -> None:
    """UserError where the patches of the model do not tile the picture; a warning where it is far too large."""
    stride = config.tokenizer.stride
    if hw[0] % stride or hw[1] % stride:
        fit = [max(round(side / stride), 1) * stride for side in hw]
        raise UserError(
            f"image: {hw[1]} x {hw[0]} pixels, those of extend included; expected multiples of {stride}, such as "
            f"{fit[1]} x {fit[0]}; set size=[height,width] to resize it first"
        )
    tokens = hw[0] * hw[1] // stride**2
    if tokens > FAR * config.tokens:
        log.warning("inpaint: %d tokens, where the model was trained on %d; try size=", tokens, config.tokens)
