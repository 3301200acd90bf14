"""The keys that recipes have for the method: the diffusion process, the denoiser, and sampling. Without torch."""

import math
import struct
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Interval

from addp_core.networks.config import (
    CnnConfig,
    DecoderConfig,
    EncoderConfig,
    PredictorConfig,
    TokenizerConfig,
    Vocabulary,
    check_heads,
)

TokenMapping = Literal["weighted", "argmax", "sample"]


TargetKind = Literal["q(z|z_t)", "z_0", "both"]


@dataclass(frozen=True)
class ProcessConfig:
    """The process and the training target; for ablations see Table 5 and App. B of the paper."""

    condition: Annotated[
        Literal["z_t+1", "z_t"],
        "ids from which the noisy image is predicted: those still reliable one step later, or those at t",
    ] = "z_t+1"
    mapping: Annotated[TokenMapping, "f: from a distribution over codes to an embedding (Eq. 5)"] = "weighted"
    ids_to: Annotated[
        Literal["decoder", "encoder+decoder", "none"], "networks that see the reliable ids beside the image"
    ] = "decoder"
    target: Annotated[
        TargetKind, "prediction target: the token predictor's distribution, the true ids, or the mean of both"
    ] = "q(z|z_t)"
    ratios: Annotated[
        Literal["truncnorm", "fixed"],
        "mask ratios: a truncated normal distribution over the cosine schedule, or always `ratio_mean`",
    ] = "truncnorm"
    ratio_mean: Annotated[
        float, Interval(gt=0, le=1), "mode of the truncated normal distribution (0.5 for the paper's fixed ratio)"
    ] = 0.55
    ratio_std: Annotated[float, Interval(gt=0), "standard deviation before truncation"] = 0.25
    ratio_min: Annotated[float, Interval(ge=0, lt=1), "smallest mask ratio (inclusive)"] = 0.5
    ratio_max: Annotated[float, Interval(gt=0, le=1), "largest mask ratio (exclusive)"] = 1.0
    timesteps: Annotated[int, Ge(1), "T: number of steps of the cosine schedule"] = 100
    max_jump: Annotated[int, Ge(1), "the later step lies 1 to this many steps after t"] = 5
    label_smoothing: Annotated[float, Interval(ge=0, lt=1), "label smoothing over the whole vocabulary"] = 0.1
    natural_share: Annotated[
        float,
        Interval(ge=0, le=1),
        "share of the images that keep their own pixels at reliable positions (not the paper's)",
    ] = 0.0
    clean_share: Annotated[
        float, Interval(ge=0, le=1), "share of the images that are decoded from all of their true ids (not the paper's)"
    ] = 0.0

    def __post_init__(self) -> None:
        if self.natural_share + self.clean_share > 1:
            raise ValueError(
                f"clean_share: found {self.clean_share} beside natural_share = {self.natural_share}; "
                "expected a sum up to 1"
            )
        if self.ratio_min >= self.ratio_max:
            raise ValueError(f"ratio_min: found {self.ratio_min}, expected less than ratio_max = {self.ratio_max}")
        if not self.has_ratio():
            raise ValueError(f"timesteps: {self.timesteps} leave no mask ratio in [{self.ratio_min}, {self.ratio_max})")

    def has_ratio(self) -> bool:
        """Check whether `diffusion.mask_ratios` would return any ratio; it computes in single precision."""
        steps = range(self.timesteps + 1)
        ratios = (_single(math.cos(_single(_single(_single(math.pi / 2) * t) / self.timesteps))) for t in steps)
        return any(_single(self.ratio_min) <= ratio < _single(self.ratio_max) for ratio in ratios)


def _single(value: float) -> float:
    """Round to single precision."""
    return struct.unpack("f", struct.pack("f", value))[0]


@dataclass(frozen=True)
class DenoiserConfig:
    """Architecture of the part that ADDP trains; the defaults are those of ViT-B."""

    encoder: EncoderConfig | CnnConfig = field(default_factory=lambda: EncoderConfig(dropout=0.1, tokenizer_norm=True))
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        check_heads("decoder.heads", self.decoder.heads, self.encoder.width)


@dataclass(frozen=True)
class TokenizedImages:
    """Image size in pixels (height, width), the tokenizer, and the ids of both."""

    image_size: tuple[int, int] = (256, 256)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary(TokenizerConfig.codebook))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.tokenizer.grid(self.image_size)

    @property
    def tokens(self) -> int:
        """N, the number of tokens per image."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ADDPConfig(TokenizedImages):
    """The whole model: its images, its parts, and the process."""

    predictor: PredictorConfig | None = field(default_factory=PredictorConfig)  # None: a model for sampling only
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)

    def __post_init__(self) -> None:
        check_ids_to(self.denoiser, self.process)


@dataclass(frozen=True)
class MAGEConfig(TokenizedImages):
    """MAGE as a generator: its images and its network."""

    predictor: PredictorConfig = field(default_factory=PredictorConfig)


def check_ids_to(denoiser: DenoiserConfig, process: ProcessConfig) -> None:
    """Raise ValueError if the process gives ids to an encoder that cannot take them."""
    if process.ids_to == "encoder+decoder" and isinstance(denoiser.encoder, CnnConfig):
        raise ValueError(
            f"process.ids_to: found encoder+decoder, but {denoiser.encoder.arch} takes pixels alone; "
            "expected decoder or none"
        )


Schedule = Literal["cosine", "linear"]


Order = Literal["confidence", "halton"]


SCHEDULE_NAMES: tuple[Schedule, ...] = get_args(Schedule)
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True)
class SampleConfig:
    """Sampling options; the defaults are the paper's (which takes 256 steps with the linear schedule)."""

    steps: Annotated[int, Ge(1), "denoising steps"] = 20
    schedule: Annotated[Schedule, "fraction of tokens still masked after each step"] = "cosine"
    temperature: Annotated[
        float, Ge(0), "temperature of the Gumbel noise on the confidence; it falls to 0 at the last step"
    ] = 6.0
    top_p: Annotated[
        float, Interval(ge=0, le=1), "nucleus from which ids are drawn: 1 is all ids, 0 the most probable one"
    ] = 1.0
    top_k: Annotated[int, Ge(0), "draw ids from this many of the most probable ones; 0: from all"] = 0
    order: Annotated[
        Order,
        "ids that a step keeps: the most confident, or those at well spread positions (which ignores temperature)",
    ] = "confidence"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: found {self.steps}, expected a whole number >= 1")
        if self.schedule not in SCHEDULE_NAMES:
            raise ValueError(f"schedule: found {self.schedule!r}, expected one of {', '.join(SCHEDULE_NAMES)}")
        if self.temperature < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(f"temperature, top_p: found {self.temperature}, {self.top_p}; expected >= 0 and in [0, 1]")
        if self.top_k < 0 or self.order not in ORDERS:
            raise ValueError(
                f"top_k, order: found {self.top_k}, {self.order!r}; expected >= 0 and one of {', '.join(ORDERS)}"
            )
