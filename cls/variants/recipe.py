"""The keys of `addp robustness`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from addp_core.base.paths import FilePath
from addp_core.training.precision import PrecisionChoice


@dataclass
class Recipe:
    """Keys of `addp robustness`. At least one dataset is required."""

    model: Annotated[
        str,
        "a run folder of `addp finetune` or `addp linprobe` or its model file, a ViT with its head (MAE, BEiT, timm), "
        "timm:<name>, or a folder for timm's local-dir",
    ]
    out: Annotated[
        str,
        "folder for results.json, robustness.md and robustness.csv, and for cells.json, from which the run continues",
    ]
    checkpoint: Annotated[
        str,
        "model=timm:<name>: a file with its weights, such as timm's last.pth.tar (default: those that timm publishes)",
    ] = ""
    weights: Annotated[
        str, "which weights to read from a file that holds several: `ema`, or their name in it (default: the last ones)"
    ] = ""
    encoder_heads: Annotated[int | None, Ge(1), "attention heads of a ViT whose file does not tell them"] = None
    normalisation: Annotated[
        Literal["imagenet", "half"] | None,
        "mean and std of the images: ImageNet's, or 0.5 (default: the model's own, for files of ViTs ImageNet's)",
    ] = None
    classes: Annotated[
        FilePath, "text file with the names of the model's classes 0, 1, ..., one per line, if its file has none"
    ] = ""
    val: Annotated[
        str, "clean validation images, for comparison: ImageNet root, class folders, .tar file or Hugging Face dataset"
    ] = ""
    imagenet_a: Annotated[str, "folder of ImageNet-A"] = ""
    imagenet_r: Annotated[str, "folder of ImageNet-R"] = ""
    sketch: Annotated[str, "folder of ImageNet-Sketch"] = ""
    imagenet_c: Annotated[str, "folder of ImageNet-C"] = ""
    corrupt: Annotated[str, "instead of imagenet_c: clean images, as for `val`, to corrupt on the fly"] = ""
    corrupt_n: Annotated[int, Ge(0), "number of images of `corrupt` to use, evenly spaced; 0: all"] = 0
    seed: Annotated[int, "seed of the generated corruptions"] = 0
    allow_missing: Annotated[
        bool, "accept an incomplete imagenet_c: average over what is there, and report what is missing"
    ] = False
    split: Annotated[str, "split to use of datasets that have splits"] = "val"
    size: Annotated[int | None, Ge(8), "pixels of the model's images (default: as in training)"] = None
    crop: Annotated[
        float | None,
        Gt(0),
        Le(1),
        "fraction of the shorter side to crop (default: the model's own, else 0.875 up to 224 px and 1 above); the "
        "images of ImageNet-C are already cropped",
    ] = None
    batch: Annotated[int, Ge(1), "images at a time on each process"] = 64
    workers: Annotated[int | None, Ge(0), "data loading workers of each process (default: depends on the machine)"] = (
        None
    )
    max_errors: Annotated[
        float, Ge(0), "unreadable images to tolerate: a count, or below 1 a fraction of a dataset"
    ] = 0.01
    precision: PrecisionChoice = "auto"
