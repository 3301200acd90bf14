"""Settings of an image dataset: which images, how they are cropped and how they are loaded."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass
class DataConfig:
    """Which images, how they are cropped and how they are loaded."""

    __shorthand__ = "source"
    source: Annotated[
        str,
        "folder of images (flat or nested), ImageNet root (train/<class>/...), root with meta/<split>.txt lists, "
        ".tar file or folder of them, or hub set hfds/<name>",
    ] = ""
    split: Annotated[str, "part of the set: a folder or list of this name where there is one"] = "train"
    size: Annotated[int | tuple[int, int], "pixels of the model's images: one side, or [height, width]"] = 256
    scale: Annotated[tuple[float, float], "range of a random crop's share of the image's area"] = (0.2, 1.0)
    ratio: Annotated[tuple[float, float], "range of a crop's width / height, as a multiple of the size's"] = (
        0.75,
        4 / 3,
    )
    flip: Annotated[bool, "mirror every other image, by chance"] = True
    max_errors: Annotated[float, Ge(0), "unreadable images to tolerate: a count, or below 1 a share of the set"] = 0.01
    classes: Annotated[str | None, "file that names class 0, 1, ... a line each (default: sorted folders)"] = None
    image_key: Annotated[str, "hub sets: column of the images"] = "image"
    label_key: Annotated[str, "hub sets: column of the labels"] = "label"
    cache: Annotated[Literal["none", "ram"], "ram: decode and downscale all images once, at the start"] = "none"
    cache_gb: Annotated[float, Gt(0), "memory for cache=ram, per process; what does not fit is decoded each time"] = 8.0
    workers: Annotated[
        int | None, Ge(0), "loading processes a training process; 0: none (default: 1 on a CPU, with a GPU up to 12)"
    ] = None
    prefetch: Annotated[int, Ge(1), "batches that each worker prepares ahead"] = 2

    def __post_init__(self) -> None:
        if min(self.hw) < 8:
            raise ValueError(f"size: {self.size}, expected at least 8 pixels; set size=256 or size=[256,192]")
        for key, low in (("scale", 0.0), ("ratio", 0.0)):
            first, last = getattr(self, key)
            if not low < first <= last or (key == "scale" and last > 1):
                bounds = "0 < low <= high <= 1" if key == "scale" else "0 < low <= high"
                raise ValueError(f"{key}: [{first}, {last}], expected {bounds}")

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
