"""What all figures share: images in rows, titles and captions, colors of features, PNG files."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace

log = logging.getLogger("addp")

IMAGE_INCHES = 1.25  # width of an image in a figure
WIDTH_TO_GAP = 16  # width of an image over that of the gap beside it
SHEET_COLUMN, SHEET_COLUMNS = 1100, 2  # of a contact sheet: the width of a column in pixels, and their number
UNRELIABLE_GRAY = 0.88
SHOWN_RANGE = (0.02, 0.98)  # quantiles of a principal component that become the darkest and the brightest color


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    log.info("%s", path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an error of the disk name the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"out: {path} cannot be written ({error.strerror})") from error


def draw_image_grid(
    rows: Sequence[Sequence[Tensor]], column_titles: Sequence[str], row_labels: Sequence[str], title: str, caption: str
) -> Figure:
    """Draw images, Float[3,H,W], in a grid with titles above the columns and labels before the rows."""
    height, width = rows[0][0].shape[-2:]
    gap = max(width // WIDTH_TO_GAP, 1)
    images = torch.stack([image.clamp(0, 1).cpu() for row in rows for image in row])
    # One pair of axes for all images: with one for each image, matplotlib would take seconds for the layout.
    tiled = make_grid(images, nrow=len(column_titles), padding=gap, pad_value=1.0).permute(1, 2, 0).numpy()
    figure_height = IMAGE_INCHES * height / width * len(rows) + 1.3
    figure = Figure((IMAGE_INCHES * len(column_titles) + 1, figure_height), layout="constrained")
    axis = figure.subplots()
    axis.imshow(tiled, interpolation="nearest")
    x_ticks = [gap + width / 2 + i * (width + gap) for i in range(len(column_titles))]
    y_ticks = [gap + height / 2 + i * (height + gap) for i in range(len(rows))]
    axis.set_xticks(x_ticks, column_titles, fontsize=8)
    axis.set_yticks(y_ticks, row_labels, fontsize=8, rotation=90, va="center")
    axis.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False, left=False)
    axis.spines[:].set_visible(False)
    add_title_and_caption(figure, title, caption)
    return figure


def add_title_and_caption(figure: Figure, title: str, caption: str) -> None:
    """Write the title above the figure and the caption below it."""
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.supxlabel(caption, fontsize=8, wrap=True)


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Return up to `limit` of the numbers 0 to `count` - 1, evenly spaced, with both ends."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(limit, count))})


def upsample_tokens(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """[C,h,w] -> Float[C,H,W], in which each token is a square of one color."""
    return F.interpolate(tokens[None].float(), hw, mode="nearest")[0]


def gray_out(image: Tensor, mask: Tensor) -> Tensor:
    """Return an image, Float[3,H,W], with gray in place of the unreliable tokens. mask: Bool[1,h,w]."""
    return torch.where(upsample_tokens(mask, (image.shape[-2], image.shape[-1])) > 0, UNRELIABLE_GRAY, image)


def write_contact_sheet(paths: Sequence[Path], path: Path) -> None:
    """Write one PNG file with all of these figures, one below the other in columns of about the same height.

    All are scaled by one factor, at which the widest fills its column, so that their texts have one size.
    """
    pictures = []
    for each in paths:
        with Image.open(each) as file:
            pictures.append(file.convert("RGB"))
    factor = SHEET_COLUMN / max(picture.width for picture in pictures)
    pictures = [each.resize((round(each.width * factor), round(each.height * factor))) for each in pictures]
    columns: list[list[Image.Image]] = [[] for _ in range(min(SHEET_COLUMNS, len(pictures)))]
    heights = [0] * len(columns)
    for picture in pictures:
        shortest = heights.index(min(heights))
        columns[shortest].append(picture)
        heights[shortest] += picture.height
    sheet = Image.new("RGB", (SHEET_COLUMN * len(columns), max(heights)), "white")
    for number, column in enumerate(columns):
        top = 0
        for picture in column:
            sheet.paste(picture, (SHEET_COLUMN * number + (SHEET_COLUMN - picture.width) // 2, top))
            top += picture.height
    with _naming(path), atomic_replace(path) as temporary:
        sheet.save(temporary, "png")
    log.info("%s", path)


def heat_colors(values: Tensor) -> Tensor:
    """Map Float[B,H,W] in [0,1] to colors from violet over red to yellow, Float[B,3,H,W]."""
    return torch.from_numpy(colormaps["plasma"](values.cpu().numpy())[..., :3]).float().permute(0, 3, 1, 2)


def principal_colors(features: Tensor) -> Tensor:
    """Map features, Float[...,D], to their first three principal components as red, green and blue, Float[...,3]."""
    flat = features.flatten(0, -2).float()
    flat = flat - flat.mean(0)
    _, _, components = torch.linalg.svd(flat, full_matrices=False)
    projected = flat @ components[:3].T
    projected = F.pad(projected, (0, 3 - projected.shape[1]))
    low, high = torch.quantile(projected, torch.tensor(SHOWN_RANGE, device=projected.device), dim=0)
    return ((projected - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).view(*features.shape[:-1], 3)
