"""The architectures that our files store as JSON beside their weights, one class per kind of model.

The names of the fields are keys in files: they stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)

from addp_core.base.errors import UserError
from addp_core.method.addp import ADDPConfig
from addp_core.networks.classifier import FeatureNorm, HeadNorm, Pooling
from addp_core.networks.cnn import CnnArchitecture, CnnConfig
from addp_core.networks.config import Normalisation as Normalisation
from addp_core.networks.encoder import EncoderArchitecture as EncoderArchitecture
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.token_encoder import TokenEncoderArchitecture as TokenEncoderArchitecture
from addp_core.networks.tokenizer import TokenizerConfig, Vocabulary
from addp_core.weights.files import first_line
from addp_core.weights.stated import STATED_KIND, Stated

NORMALISATION: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    # values of the key `normalisation`: mean and std of images in [0,1]
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "half": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
}
HEAD_KEYS = ("encoder_heads", "decoder_heads", "predictor_heads", "predictor_decoder_heads")


@dataclass(frozen=True)
class TokenizerArchitecture:
    """Architecture of a tokenizer."""

    tokenizer: TokenizerConfig
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class PredictorArchitecture:
    """Architecture of a token predictor."""

    predictor: PredictorConfig
    grid: tuple[int, int]
    vocabulary: Vocabulary
    trained_on: str = ""  # fingerprint of the tokenizer it was trained with; empty if unknown


@dataclass(frozen=True)
class ClassifierArchitecture:
    """Architecture of a classifier, the names of its classes, and how its images are normalized and cropped."""

    encoder: EncoderArchitecture | TokenEncoderArchitecture | CnnArchitecture
    classes: int
    pooling: Pooling
    norm: HeadNorm
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float | None = None  # share of the shorter side that validation crops, if a recipe set it
    feature_norm: FeatureNorm = "none"  # of linear probing, before the batch norm


ARCHITECTURES: dict[str, type] = {
    "addp": ADDPConfig,
    "tokenizer": TokenizerArchitecture,
    "predictor": PredictorArchitecture,
    "encoder": EncoderArchitecture,
    "token_encoder": TokenEncoderArchitecture,
    "cnn_encoder": CnnArchitecture,
    "classifier": ClassifierArchitecture,
    STATED_KIND: Stated,
}


def parse_architecture(source: str, description: Any) -> tuple[str, Any]:
    """Return (kind, architecture) from the JSON that one of our files stores.

    Raises UserError if the kind is unknown or the architecture was written by an incompatible version.
    """
    kind = description.get("kind") if isinstance(description, dict) else None
    if isinstance(kind, str) and kind not in ARCHITECTURES:
        raise UserError(f"{source}: holds the weights of {kind!r}; expected one of {', '.join(ARCHITECTURES)}")
    try:
        return str(kind), TypeAdapter(ARCHITECTURES[str(kind)]).validate_python(description["architecture"])
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{source}: its description of the architecture does not fit this version ({first_line(error)})"
        ) from error


def recipe_heads(recipe: Any) -> dict[str, Any]:
    """Return the numbers of attention heads that a recipe sets, as keyword arguments of `load_addp`."""
    return {key: getattr(recipe, key) for key in HEAD_KEYS if getattr(recipe, key, None) is not None}


def with_own_norm(architecture: Any) -> Any:
    """Return the architecture of an encoder that a transfer has trained: the norm that it had then is its own."""
    if not isinstance(architecture, EncoderArchitecture):
        return architecture  # of another input, without such a norm
    return replace(architecture, encoder=replace(architecture.encoder, pre_norm=architecture.encoder.tokenizer_norm))


def check_stored_heads(source: str, architecture: Any, given: Mapping[str, int | None]) -> None:
    """Raise UserError if the caller gives a number of heads that differs from the one that the file stores.

    given: by the keys of `HEAD_KEYS`; None and numbers for parts that the architecture lacks are ignored.
    """
    for key, heads in _stored_heads(architecture).items():
        if given.get(key) not in (None, heads):
            raise UserError(f"{key}={given[key]}: {source} stores {heads} attention heads; leave the key out")


def _stored_heads(architecture: Any) -> dict[str, int]:
    """Return the numbers of heads in an architecture, by the keys of `HEAD_KEYS`."""
    heads: dict[str, int] = {}
    if isinstance(architecture, ClassifierArchitecture):
        return _stored_heads(architecture.encoder)
    if isinstance(architecture, EncoderArchitecture):
        return {"encoder_heads": architecture.encoder.heads}
    if isinstance(architecture, TokenEncoderArchitecture):
        return {"encoder_heads": architecture.predictor.heads}
    if isinstance(architecture, ADDPConfig):
        denoiser = architecture.denoiser
        heads = {"decoder_heads": denoiser.decoder.heads}
        if not isinstance(denoiser.encoder, CnnConfig):
            heads["encoder_heads"] = denoiser.encoder.heads
    if (predictor := getattr(architecture, "predictor", None)) is not None:
        heads |= {"predictor_heads": predictor.heads, "predictor_decoder_heads": predictor.decoder_heads}
    return heads
