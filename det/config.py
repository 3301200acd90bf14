"""The keys that the verbs of detection share, and the architecture stored beside a detector's weights."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

from annotated_types import Ge, Interval

from addp_core.base.paths import DatasetPath
from addp_core.networks.attention import PLAIN_ATTENTION, AttentionConfig
from addp_core.networks.cnn import CnnConfig, CnnEncoder
from addp_core.networks.encoder import Encoder, EncoderConfig, TransformerEncoder
from addp_core.networks.token_encoder import TokenEncoderArchitecture
from addp_core.weights.architectures import Normalisation

ANCHOR_SCALE = 8  # side of a level's anchors divided by its stride: 32 to 512 pixels for strides 4 to 64

EngineName = Literal["torchvision", "detectron2"]
EngineChoice = Literal["auto", "detectron2", "torchvision"]
MaskChoice = Literal["auto"] | bool
Interpolation = Literal["bicubic", "bilinear"]
DetEncoder = TransformerEncoder | CnnEncoder


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


@dataclass(frozen=True)
class Category:
    """One category of a COCO file: its id there (ids may have gaps) and its name."""

    id: int
    name: str


def distinct_names(categories: Sequence[Category]) -> tuple[str, ...]:
    """Return the names of categories; the id is added to a name that several of them have."""
    counts = Counter(category.name for category in categories)
    return tuple(c.name if counts[c.name] == 1 else f"{c.name} (id {c.id})" for c in categories)


@dataclass(frozen=True)
class DetectorArchitecture:
    """The architecture written beside a detector's weights (kind "detector")."""

    engine: EngineName
    encoder: EncoderConfig
    attention: AttentionConfig
    patch_size: int
    size: int
    detector: DetectorConfig
    categories: tuple[Category, ...]
    normalisation: Normalisation = "imagenet"
    interpolation: Interpolation = "bicubic"
    token_encoder: TokenEncoderArchitecture | None = None  # of an encoder over token ids, with its tokenizer
    cnn_encoder: CnnConfig | None = None  # of a CNN, for which `encoder` and `attention` mean nothing

    @property
    def masks(self) -> bool:
        """Whether the detector predicts masks. "auto" stands in the files of older versions, all of which did."""
        return self.detector.masks is not False

    def build_encoder(self) -> DetEncoder:
        """Build the encoder, with random weights, for images of any size."""
        if self.cnn_encoder is not None:
            return CnnEncoder(self.cnn_encoder, (self.size, self.size))
        if self.token_encoder is not None:
            return self.token_encoder.build(dynamic=True)
        return Encoder(self.encoder, (self.size, self.size), self.patch_size, self.attention, dynamic=True)


class EncoderFields(TypedDict):
    """What `DetectorArchitecture` stores about the encoder."""

    encoder: EncoderConfig
    attention: AttentionConfig
    patch_size: int
    token_encoder: TokenEncoderArchitecture | None
    cnn_encoder: CnnConfig | None


def describe_encoder(encoder: DetEncoder) -> EncoderFields:
    """Return what `DetectorArchitecture` stores about an encoder."""
    if isinstance(encoder, CnnEncoder):
        return EncoderFields(
            encoder=EncoderConfig(),
            attention=PLAIN_ATTENTION,
            patch_size=encoder.patch_size,
            token_encoder=None,
            cnn_encoder=encoder.config,
        )
    architecture = encoder.architecture
    tokens = architecture if isinstance(architecture, TokenEncoderArchitecture) else None
    return EncoderFields(
        encoder=encoder.config,
        attention=encoder.attention,
        patch_size=encoder.patch_size,
        token_encoder=tokens,
        cnn_encoder=None,
    )


def padded_size(size: int, patch: int) -> int:
    """Return the side of the squares to which images of at most `size` pixels are padded: a multiple of the patch."""
    return size + -size % patch


def vitdet_attention() -> AttentionConfig:
    """Return the attention of ViTDet's blocks: windows, four global blocks and relative positions."""
    return AttentionConfig(window=14, global_blocks=4, relative="decomposed", class_token=False)
