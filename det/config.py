"""What the verbs of detection share: the keys of data and detector, and what is written beside its weights."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import EncoderConfig

ANCHOR = 8  # side of a level's anchors over its stride: 32 to 512 pixels on strides 4 to 64


@dataclass
class CocoFiles:
    """Which COCO files."""

    __shorthand__ = "root"
    root: Annotated[
        str,
        "folder with annotations/instances_<split>2017.json and <split>2017/ (or instances_<split>.json and images/); "
        "split: train, val",
    ] = ""
    train_annotations: Annotated[str, "file, where it is not found under root"] = ""
    train_images: Annotated[str, "folder, where it is not found under root"] = ""
    val_annotations: Annotated[str, "file, where it is not found under root"] = ""
    val_images: Annotated[str, "folder, where it is not found under root"] = ""
    max_errors: Annotated[float, Ge(0), "images to do without: a count, or below 1 a share of the set"] = 0.01


@dataclass
class CocoConfig(CocoFiles):
    """Which COCO files, and how their images are shown in training."""

    size: Annotated[int, Ge(16), "pixels: side of the training square, longer side in evaluation"] = 1024
    scale: Annotated[tuple[float, float], "large-scale jitter: range of the image's longer side over size"] = (0.1, 2.0)
    flip: Annotated[bool, "mirror every other image, by chance"] = True
    empty: Annotated[bool, "train on images without objects too"] = True
    workers: Annotated[
        int | None, Ge(0), "loading processes a training process; 0: none (default: 1 on a CPU, with a GPU up to 12)"
    ] = None
    prefetch: Annotated[int, Ge(1), "batches that each worker prepares ahead"] = 2

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale: [{self.scale[0]}, {self.scale[1]}], expected 0 < low <= high")


@dataclass(frozen=True)
class DetectorConfig:
    """The detector around the encoder; the defaults are ViTDet's Mask R-CNN."""

    channels: Annotated[int, Ge(1), "of the pyramid's maps"] = 256
    scales: Annotated[
        tuple[float, ...],
        "sizes of the pyramid's maps over the encoder's map, each of 4, 2, 1, 0.5; one more is pooled",
    ] = (4.0, 2.0, 1.0, 0.5)
    convs: Annotated[int, Ge(1), "channels of the four convolutions of the box head and of the mask head"] = 256
    fc: Annotated[int, Ge(1), "features of the box head's linear layer"] = 1024
    proposals: Annotated[int, Ge(1), "boxes an image that the RPN hands on"] = 1000
    samples: Annotated[int, Ge(4), "of them, those the heads are trained on"] = 512
    score: Annotated[float, Interval(ge=0, lt=1), "detections below it are left out"] = 0.05
    detections: Annotated[int, Ge(1), "an image at most"] = 100

    def __post_init__(self) -> None:
        allowed = (4.0, 2.0, 1.0, 0.5)
        if not self.scales or tuple(self.scales) != tuple(s for s in allowed if s in self.scales):
            raise ValueError(f"scales: found {list(self.scales)}, expected some of [4, 2, 1, 0.5] in this order")
        if any(a != 2 * b for a, b in zip(self.scales, self.scales[1:], strict=False)):
            raise ValueError(f"scales: found {list(self.scales)}, expected each half of the one before")


@dataclass(frozen=True)
class Category:
    """One of COCO's: its id there, which may leave gaps, and its name."""

    id: int
    name: str


@dataclass(frozen=True)
class DetectorFile:
    """Architecture written beside a detector's weights, kind "detector"."""

    engine: Literal["torchvision", "detectron2"]
    encoder: EncoderConfig
    attention: AttentionConfig
    patch_size: int
    size: int
    detector: DetectorConfig
    categories: tuple[Category, ...]
    normalisation: Literal["imagenet", "half"] = "imagenet"


def vitdet_attention() -> AttentionConfig:
    """How ViTDet's blocks attend."""
    return AttentionConfig(window=14, global_blocks=4, relative="decomposed", class_token=False)
