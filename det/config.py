"""The keys that the verbs of detection share, and the architecture stored beside a detector's weights."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from addp_core.networks.attention import PLAIN_ATTENTION, AttentionConfig
from addp_core.networks.cnn import CnnConfig, CnnEncoder
from addp_core.networks.encoder import Encoder, EncoderConfig, TransformerEncoder
from addp_core.networks.token_encoder import TokenEncoderArchitecture
from addp_core.weights.architectures import Normalisation
from det.recipe import CocoConfig as CocoConfig
from det.recipe import CocoFiles as CocoFiles
from det.recipe import DetectorConfig as DetectorConfig
from det.recipe import EngineChoice as EngineChoice
from det.recipe import Interpolation as Interpolation
from det.recipe import MaskChoice as MaskChoice
from det.recipe import vitdet_attention as vitdet_attention

ANCHOR_SCALE = 8  # side of a level's anchors divided by its stride: 32 to 512 pixels for strides 4 to 64

EngineName = Literal["torchvision", "detectron2"]
DetEncoder = TransformerEncoder | CnnEncoder


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
