"""The keys of an image dataset: which images, how they are cropped and how they are loaded."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt
from pydantic import AllowInfNan

from addp_core.base.addresses import CREDENTIALS_FIX, has_credentials
from addp_core.base.errors import UserError
from addp_core.base.paths import DatasetPath, FilePath

Interpolation = Literal["bicubic", "bilinear"]
Resize = Literal["torch", "pillow"]  # what resizes the crops of training
DEFAULT_RESIZE: Resize = "torch"


@dataclass
class DataConfig:
    """Which images to use, how to crop them and how to load them."""

    __shorthand__ = "source"
    source: Annotated[
        DatasetPath,
        "folder of images (flat or nested), ImageNet root (train/<class>/...), root with meta/<split>.txt lists, "
        ".tar file or folder of .tar files, .tar files at an address such as 's3://bucket/train-{000..999}.tar', or "
        "Hugging Face dataset hfds/<name>",
    ] = ""
    split: Annotated[str, "split of the dataset: the folder or list of this name, if there is one"] = "train"
    size: Annotated[int | tuple[int, int], "model input size in pixels: one side, or [height, width]"] = 256
    scale: Annotated[tuple[float, float], "range of the random crop's area, as a fraction of the image's"] = (0.2, 1.0)
    ratio: Annotated[
        tuple[float, float], "range of the random crop's aspect ratio (width / height), relative to that of `size`"
    ] = (0.75, 4 / 3)
    flip: Annotated[bool, "mirror images horizontally with probability 1/2"] = True
    resize: Annotated[
        Resize | None,
        "what resizes training's crops: torch, or pillow, which is slower and takes in pixels just outside of the crop "
        "(default: torch; pillow in a run that was begun before this key existed)",
    ] = None
    max_errors: Annotated[
        float,
        Ge(0),
        AllowInfNan(True),
        "unreadable images to tolerate: a count, or below 1 a fraction of the dataset; .inf: all",
    ] = 0.01
    classes: Annotated[
        FilePath | None, "text file with the names of class 0, 1, ..., one per line (default: the sorted folders)"
    ] = None
    image_key: Annotated[str, "Hugging Face datasets: column of the images"] = "image"
    label_key: Annotated[str, "Hugging Face datasets: column of the labels"] = "label"
    cache: Annotated[Literal["none", "ram"], "ram: decode and downscale all images once, before the first step"] = (
        "none"
    )
    cache_gb: Annotated[
        float, Gt(0), "memory limit of cache=ram in GB, per process; images beyond it are decoded each time"
    ] = 8.0
    workers: Annotated[
        int | None,
        Ge(0),
        "data loading processes per training process; 0: load in the training process "
        "(default: 1 on a CPU, up to 12 with a GPU)",
    ] = None
    prefetch: Annotated[int, Ge(1), "batches that each worker loads ahead"] = 2
    shuffle_block: Annotated[
        int,
        Ge(1),
        "training shuffles blocks of this many neighboring images, which shards at an address send with one request; "
        "1: single images",
    ] = 1
    tries: Annotated[
        int, Ge(1), "shards at an address: how often a request is made before its failure ends the run"
    ] = 5
    timeout: Annotated[float, Gt(0), "shards at an address: seconds of silence after which a request has failed"] = 30.0

    def __post_init__(self) -> None:
        if has_credentials(self.source):
            raise UserError(f"data.source: {CREDENTIALS_FIX}")
        if min(self.hw) < 8:
            raise ValueError(f"size: found {self.size}, expected at least 8 pixels; set size=256 or size=[256,192]")
        for key in ("scale", "ratio"):
            low, high = getattr(self, key)
            if not 0 < low <= high or (key == "scale" and high > 1):
                bounds = "0 < low <= high <= 1" if key == "scale" else "0 < low <= high"
                raise ValueError(f"{key}: found [{low}, {high}], expected {bounds}")

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])
