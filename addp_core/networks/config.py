"""The architectures of the networks: the keys that recipes have for them. Nothing here imports torch before it is
needed, so that a recipe is checked in a fraction of a second.
"""

import functools
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

from annotated_types import Ge, Interval, MultipleOf

from addp_core.base.errors import did_you_mean


def check_heads(key: str, heads: int, width: int) -> None:
    """Raise ValueError, naming `key`, if the number of attention heads does not divide the width."""
    if width % heads:
        raise ValueError(f"{key}: found {heads}, expected a divisor of the width {width}")


@dataclass(frozen=True)
class TokenizerConfig:
    """Architecture of the VQGAN; the defaults are the published one (54.5 M parameters)."""

    width: Annotated[int, Ge(1), "channels at full resolution, a multiple of groups"] = 128
    multipliers: Annotated[
        tuple[int, ...], "width multiplier of each level; every level except the last halves the resolution"
    ] = (1, 1, 2, 2, 4)
    blocks: Annotated[int, Ge(1), "residual blocks per level"] = 2
    codebook: Annotated[int, Ge(2), "number of codes"] = 1024
    dim: Annotated[int, Ge(1), "features per code"] = 256
    # With one channel per group, the decoder can hardly tell dark from bright images; published models have four.
    groups: Annotated[int, Ge(1), "groups of every GroupNorm; width / 4 works well for narrow models"] = 32

    def __post_init__(self) -> None:
        if self.width % self.groups:
            raise ValueError(f"width: found {self.width}, expected a multiple of groups = {self.groups}")
        object.__setattr__(self, "multipliers", tuple(self.multipliers))  # from any kind of sequence
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers: found {self.multipliers}, expected one whole number >= 1 for each level")

    @property
    def stride(self) -> int:
        """Pixels per token, along each side."""
        return 2 ** (len(self.multipliers) - 1)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of tokens of an image (height, width).

        Raises ValueError if the stride does not divide the image size.
        """
        height, width = image_size
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"image size {height} x {width}: expected multiples of the tokenizer's stride {self.stride}"
            )
        return height // self.stride, width // self.stride


@dataclass(frozen=True)
class Vocabulary:
    """The ids of the transformers: the codebook's, unused slots (MaskGIT's 1000 classes), and last the mask id."""

    codebook: int
    unused: int = 1000
    class_slot: int = 76  # the unused slot that stands first in the sequence: id 1100 in published checkpoints

    def __post_init__(self) -> None:
        if not 0 <= self.class_slot < self.unused:
            raise ValueError(f"class_slot: found {self.class_slot}, expected one of the {self.unused} unused slots")

    @classmethod
    def with_slots(cls, codebook: int, unused: int) -> "Vocabulary":
        """Return a vocabulary with `unused` slots and the published class slot, or the last slot if there are fewer."""
        return cls(codebook, unused, min(cls.class_slot, unused - 1))

    @property
    def size(self) -> int:
        """V, the number of ids."""
        return self.codebook + self.unused + 1

    @property
    def class_id(self) -> int:
        """The id of the class slot."""
        return self.codebook + self.class_slot

    @property
    def mask_id(self) -> int:
        """The id of masked tokens."""
        return self.size - 1


@dataclass(frozen=True)
class PredictorConfig:
    """Architecture of MAGE; the defaults are those of MAGE ViT-B."""

    width: Annotated[int, Ge(1), "features per token"] = 768
    depth: Annotated[int, Ge(1), "encoder blocks"] = 12
    heads: Annotated[int, Ge(1), "attention heads of the encoder; width/64 in published checkpoints"] = 12
    decoder_depth: Annotated[int, Ge(1), "decoder blocks"] = 8
    decoder_heads: Annotated[int, Ge(1), "attention heads of the decoder"] = 16
    dropout: Annotated[float, Interval(ge=0, lt=1), "dropout in embeddings, attention and MLP"] = 0.1

    def __post_init__(self) -> None:
        check_heads("heads", self.heads, self.width)
        check_heads("decoder_heads", self.decoder_heads, self.width)


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of the ViT; the defaults are those of ViT-B."""

    width: Annotated[int, Ge(1), "features per token"] = 768
    depth: Annotated[int, Ge(1), "number of blocks"] = 12
    heads: Annotated[int, Ge(1), "attention heads"] = 12
    dropout: Annotated[float, Interval(ge=0, lt=1), "dropout in attention and MLP"] = 0.0
    drop_path: Annotated[
        float, Interval(ge=0, lt=1), "stochastic depth of the last block; it grows linearly from 0"
    ] = 0.0
    tokenizer_norm: Annotated[
        bool, "LayerNorm on the embedded patches: on in pretraining, off by default in transfer"
    ] = False
    input_dropout: Annotated[float, Interval(ge=0, lt=1), "dropout after `tokenizer_norm`, if that is on"] = 0.1
    layer_scale: Annotated[bool, "learned scales on the branches of each block (BEiT has them, ADDP does not)"] = False
    pre_norm: Annotated[
        bool, "`tokenizer_norm` belongs to the ViT itself (CLIP), so transfer keeps it (it drops ADDP's)"
    ] = False

    def __post_init__(self) -> None:
        check_heads("heads", self.heads, self.width)


class ViTSize(TypedDict):
    """The keys of `EncoderConfig` in which the named sizes differ."""

    width: int
    depth: int
    heads: int


VIT_SIZES: dict[str, ViTSize] = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
}


SIZES_HELP = ", ".join(f"{name} ({size['width']} wide)" for name, size in VIT_SIZES.items())


@dataclass(frozen=True)
class AttentionConfig:
    """What each block attends to; the defaults are those of a plain ViT."""

    window: Annotated[int, Ge(0), "side of the square attention windows, in patches; 0: global attention"] = 0
    global_blocks: Annotated[
        int, Ge(0), "number of evenly spaced blocks with global attention (the last block is one of them)"
    ] = 4
    relative: Annotated[
        Literal["none", "decomposed", "table"],
        "relative positions: none, one term per axis (ViTDet), or one bias per offset (BEiT)",
    ] = "none"
    class_token: Annotated[bool, "keep the class token in attention; must be false with windows"] = True

    def __post_init__(self) -> None:
        if self.window and self.class_token:
            raise ValueError("class_token: found true, expected false where window > 0")

    def windows(self, depth: int) -> list[int]:
        """Return the window of each of `depth` blocks; 0 for the last block of each of `global_blocks` groups."""
        global_indices = {round(depth * (i + 1) / self.global_blocks) - 1 for i in range(self.global_blocks)}
        return [0 if i in global_indices else self.window for i in range(depth)]


PLAIN_ATTENTION = AttentionConfig()


STAGES = 4  # feature maps that detectors and segmentors read


OUTPUT_STRIDES = (8, 16, 32)  # those that timm can dilate a CNN to


@dataclass(frozen=True)
class CnnConfig:
    """Architecture of a CNN of timm with the width that pretraining's decoder has over it."""

    arch: Annotated[str, "in place of the ViT: a CNN of timm, such as resnet50 or convnext_tiny"]
    width: Annotated[int, Ge(1), "features per token in the decoder"] = 768
    drop_path: Annotated[
        float, Interval(ge=0, lt=1), "stochastic depth of the last block; it grows linearly from 0"
    ] = 0.0

    def __post_init__(self) -> None:
        cnn_stages(self.arch)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the four stages' maps."""
        return tuple(channels for _, channels in cnn_stages(self.arch))

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the four stages' maps in pixels."""
        return tuple(stride for stride, _ in cnn_stages(self.arch))


@functools.cache
def cnn_stages(arch: str) -> tuple[tuple[int, int], ...]:
    """Return stride and channels of the last four maps of a CNN of timm.

    Raises ValueError if timm has no such model, or the model is no CNN with stochastic depth and stages that can be
    dilated.
    """
    import timm  # takes seconds
    import torch

    if not timm.is_model(arch):
        hint = did_you_mean(arch, timm.list_models())
        raise ValueError(f"arch: found {arch!r}, expected a CNN of timm, such as resnet50{hint}")
    try:
        with torch.device("meta"):
            body: Any = timm.create_model(arch, num_classes=0, output_stride=OUTPUT_STRIDES[-1], drop_path_rate=0.0)
        body.forward_intermediates  # noqa: B018 (which timm cannot read stage by stage lacks it)
        stages = [(info["reduction"], info["num_chs"]) for info in body.feature_info][-STAGES:]
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"arch: found {arch!r}, which is no CNN of timm that can be dilated and has stochastic depth; expected one "
            "such as resnet50, convnext_tiny, regnety_032 or efficientnet_b0"
        ) from error
    return tuple(stages)


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture of the token decoder; its width is the encoder's."""

    depth: Annotated[int, Ge(1), "number of blocks"] = 8
    heads: Annotated[int, Ge(1), "attention heads"] = 16
    dropout: Annotated[float, Interval(ge=0, lt=1), "dropout in attention and MLP"] = 0.1


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Architecture of MAE's decoder of pixels; the defaults are the published ones."""

    width: Annotated[int, Ge(4), MultipleOf(4), "features per token"] = 512
    depth: Annotated[int, Ge(1), "number of blocks"] = 8
    heads: Annotated[int, Ge(1), "attention heads"] = 16

    def __post_init__(self) -> None:
        check_heads("heads", self.heads, self.width)


@dataclass(frozen=True)
class MaeConfig:
    """Architecture of MAE; the defaults are those of MAE ViT-B."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    patch_size: Annotated[int, Ge(1), "side of a patch in pixels"] = 16
    decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)

    def __post_init__(self) -> None:
        if self.encoder.width % 4:
            raise ValueError(
                f"encoder.width: found {self.encoder.width}, expected a multiple of 4 for sines and cosines of two axes"
            )
        if self.encoder.tokenizer_norm:
            raise ValueError("encoder.tokenizer_norm: found true, expected false: MAE's encoder has no such norm")


Pooling = Literal["avg", "token"]  # the mean of the patch tokens, or the class token


FeatureNorm = Literal["none", "layer", "pretrained"]


HeadNorm = Literal["layer", "batch", "none"]


Normalisation = Literal["imagenet", "half"]


Input = Literal["pixels", "token"]


InputChoice = Literal["auto"] | Input
