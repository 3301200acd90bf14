"""The keys of the verbs of detection."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from addp_core.base.paths import DatasetPath
from addp_core.networks.config import SIZES_HELP, AttentionConfig
from addp_core.training.config import TrainConfig
from addp_core.training.precision import PrecisionChoice
from addp_core.training.submission import LaunchChoice, SlurmConfig
from addp_core.weights.config import EncoderKeys

EngineChoice = Literal["auto", "detectron2", "torchvision"]


MaskChoice = Literal["auto"] | bool


Interpolation = Literal["bicubic", "bilinear"]


@dataclass
class CocoFiles:
    """Keys that locate a COCO dataset."""

    __shorthand__ = "root"
    root: Annotated[
        DatasetPath,
        "dataset folder with annotations/instances_<split>2017.json and <split>2017/ (or instances_<split>.json and "
        "images/), where <split> is train or val",
    ] = ""
    train_annotations: Annotated[DatasetPath, "annotation file, if it is not found under root"] = ""
    train_images: Annotated[DatasetPath, "image folder, if it is not found under root"] = ""
    val_annotations: Annotated[DatasetPath, "annotation file, if it is not found under root"] = ""
    val_images: Annotated[DatasetPath, "image folder, if it is not found under root"] = ""
    max_errors: Annotated[
        float, Ge(0), "unreadable or missing images to tolerate: a number, or below 1 a share of the dataset"
    ] = 0.01


@dataclass
class CocoConfig(CocoFiles):
    """Keys that locate a COCO dataset and say how its images are augmented and loaded for training."""

    size: Annotated[int, Ge(16), "side of the square training image in pixels; longer side in evaluation"] = 1024
    scale: Annotated[
        tuple[float, float], "large-scale jitter: range of the image's longer side, as a multiple of size"
    ] = (0.1, 2.0)
    flip: Annotated[bool, "flip images horizontally with probability 1/2"] = True
    interpolation: Annotated[
        Interpolation, "how images are resized, in training and in evaluation; ViTDet's is bilinear"
    ] = "bicubic"
    empty: Annotated[bool, "train on images without objects too"] = True
    workers: Annotated[
        int | None,
        Ge(0),
        "data-loading processes per training process; 0 loads in the training process (default: 1 on a CPU, up to 12 "
        "with a GPU)",
    ] = None
    prefetch: Annotated[int, Ge(1), "batches that each worker prepares ahead"] = 2

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale: [{self.scale[0]}, {self.scale[1]}], expected 0 < low <= high")


@dataclass(frozen=True)
class DetectorConfig:
    """Keys of the detector around the encoder; the defaults are ViTDet's Mask R-CNN."""

    masks: Annotated[
        MaskChoice,
        "predict masks too (Mask R-CNN), or boxes alone (Faster R-CNN over the same pyramid); auto: masks, unless no "
        "training object has one",
    ] = "auto"
    channels: Annotated[int, Ge(1), "channels of the feature pyramid's maps"] = 256
    scales: Annotated[
        tuple[float, ...],
        "sizes of the pyramid's maps relative to the encoder's map, chosen from 4, 2, 1, 0.5; one more level is pooled",
    ] = (4.0, 2.0, 1.0, 0.5)
    convs: Annotated[int, Ge(1), "channels of the four convolutions of the box head and of the mask head"] = 256
    fc: Annotated[int, Ge(1), "features of the box head's linear layer"] = 1024
    proposals: Annotated[int, Ge(1), "proposals per image that the RPN passes to the heads"] = 1000
    samples: Annotated[int, Ge(4), "proposals per image that the heads are trained on"] = 512
    score: Annotated[float, Interval(ge=0, lt=1), "minimum score of a detection"] = 0.05
    detections: Annotated[int, Ge(1), "maximum number of detections per image"] = 100

    def __post_init__(self) -> None:
        allowed = (4.0, 2.0, 1.0, 0.5)
        if not self.scales or tuple(self.scales) != tuple(s for s in allowed if s in self.scales):
            raise ValueError(f"scales: found {list(self.scales)}, expected some of [4, 2, 1, 0.5] in this order")
        if any(a != 2 * b for a, b in zip(self.scales, self.scales[1:], strict=False)):
            raise ValueError(f"scales: found {list(self.scales)}, expected each to be half of the one before")


def vitdet_attention() -> AttentionConfig:
    """Return the attention of ViTDet's blocks: windows, four global blocks and relative positions."""
    return AttentionConfig(window=14, global_blocks=4, relative="decomposed", class_token=False)


@dataclass(kw_only=True)
class TrainRecipe(EncoderKeys):
    """Keys of `addp det train`."""

    out: Annotated[str, "run folder"]
    engine: Annotated[EngineChoice, "auto: detectron2 if it is installed, else torchvision"] = "auto"
    data: CocoConfig = field(default_factory=CocoConfig)
    drop_path: Annotated[
        float, Interval(ge=0, lt=1), "stochastic depth rate of the last block; earlier blocks have less, the first 0"
    ] = 0.1
    attention: AttentionConfig = field(default_factory=vitdet_attention)
    checkpointing: Annotated[bool, "activation checkpointing in the encoder: less memory, more computation"] = False
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    launch: LaunchChoice = "local"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        if self.train.compile:  # proposals, matching and sampling depend on the data: dozens of graphs, and no gain
            raise ValueError("train.compile: found true, expected false: a detector breaks into dozens of small graphs")


@dataclass
class EvalRecipe:
    """Keys of `addp det eval`."""

    model: Annotated[str, "run of `addp det train`, or its model file"]
    data: CocoFiles = field(default_factory=CocoFiles)
    split: Annotated[Literal["val", "train"], "split of the dataset to evaluate"] = "val"
    per_class: Annotated[bool, "report the average precision of each category too"] = False
    out: Annotated[str, "folder for figures.json and results.json; empty: write no files"] = ""
    precision: PrecisionChoice = "auto"
    json: Annotated[bool, "print JSON instead of a table"] = False


@dataclass
class PredictRecipe:
    """Keys of `addp det predict`."""

    model: Annotated[str, "run of `addp det train`, or its model file"]
    images: Annotated[str, "folder of images, flat or nested"]
    out: Annotated[str, "folder for the drawn images and the JSON files"]
    score: Annotated[
        float, Interval(ge=0, le=1), "minimum score of the detections that are drawn; the JSON holds all detections"
    ] = 0.5
    precision: PrecisionChoice = "auto"
    most: Annotated[int, Ge(1), "maximum number of detections drawn per image, highest score first"] = 100


@dataclass
class CostRecipe:
    """Keys of `addp det cost`."""

    model: Annotated[str, f"{SIZES_HELP}, or a checkpoint whose architecture is used"] = "base"
    engine: Annotated[EngineChoice, "as in `addp det train`"] = "torchvision"
    size: Annotated[int, Ge(16), "side of the square training image in pixels"] = 1024
    batch: Annotated[int, Ge(1), "images per step"] = 1
    objects: Annotated[int, Ge(1), "objects per image"] = 7
    warmup: Annotated[int, Ge(0), "steps before the timed ones"] = 1
    steps: Annotated[int, Ge(1), "timed steps"] = 3
    checkpointing: Annotated[Literal["both", "on", "off"], "activation checkpointing to measure"] = "both"
    attention: AttentionConfig = field(default_factory=vitdet_attention)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    precision: PrecisionChoice = "auto"
    json: Annotated[bool, "print JSON instead of text"] = False
