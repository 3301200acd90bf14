"""The architecture of a backbone as a config of mmseg states it, compared with that of its pretrained file."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from addp_core.base.errors import UserError, did_you_mean
from addp_core.networks.encoder import VIT_SIZES, EncoderArchitecture, EncoderConfig
from addp_core.networks.token_encoder import TokenEncoderArchitecture
from addp_core.weights.encoders import DEFAULT_PATCH_SIZE, encoder_architecture
from addp_core.weights.reading import Weights, read_weights
from seg.keywords import ARCH_SYNONYMS

REQUIRED = ("width", "depth", "heads")
ARCH_KEYS = (*REQUIRED, "layer_scale")
EXPECTED = "expected a size ({}) or dict(width=..., depth=..., heads=..., layer_scale=False)".format(
    ", ".join(VIT_SIZES)
)


def read_arch(arch: Any) -> EncoderConfig:
    """Return the ViT that a backbone's `arch` states. Raises UserError if it states none."""
    if isinstance(arch, str):
        if arch not in VIT_SIZES:
            raise UserError(f"arch: found {arch!r}, {EXPECTED}{did_you_mean(arch, VIT_SIZES)}")
        return EncoderConfig(**VIT_SIZES[arch])
    if not isinstance(arch, Mapping):
        raise UserError(f"arch: found {arch!r}, {EXPECTED}")
    values: dict[str, Any] = {ARCH_SYNONYMS.get(str(key), str(key)): value for key, value in arch.items()}
    for key in values:
        if key not in ARCH_KEYS:
            raise UserError(f"arch: unknown key {key!r}{did_you_mean(key, (*ARCH_KEYS, *ARCH_SYNONYMS))}; {EXPECTED}")
    if missing := [key for key in REQUIRED if key not in values]:
        raise UserError(f"arch: {', '.join(missing)} missing; {EXPECTED}")
    try:
        return EncoderConfig(**values)
    except ValueError as error:
        raise UserError(f"arch: {error}") from error


def line_for(config: EncoderConfig, patch_size: int) -> str:
    """Return what a config has to say about the backbone of this architecture."""
    size = {key: getattr(config, key) for key in REQUIRED}
    names = [name for name, values in VIT_SIZES.items() if values == size]
    scale = ", layer_scale=True" if config.layer_scale else ""
    numbers = ", ".join(f"{key}={value}" for key, value in size.items())
    line = f'arch="{names[0]}"' if names and not scale else f"arch=dict({numbers}{scale})"
    if patch_size != DEFAULT_PATCH_SIZE:
        line += f", patch_size={patch_size}"
    return line + ", tokenizer_norm=True" * config.pre_norm


def demand_arch(init_cfg: Mapping[str, Any] | None, size: tuple[int, int], heads: int | None, wanted: str) -> UserError:
    """Return the error of a backbone without `arch`, with the line to write if its pretrained file can be read."""
    if init_cfg is None:
        return UserError(
            f"arch: not given, {EXPECTED} as in the model's training; with init_cfg=dict(type='Pretrained', "
            "checkpoint=<file>) this message says which"
        )
    found, weights = read_pretrained(init_cfg["checkpoint"], size, heads, wanted)
    weights.settle(("weights", "encoder_heads"), ("encoder_heads",))
    line = line_for(found.encoder, found.patch_size)
    return UserError(f"arch: not given, expected {line}, which is what {weights.source} has")


def token_line(architecture: TokenEncoderArchitecture) -> str:
    """Return what a config has to say about a backbone over token ids of this architecture."""
    size = {key: getattr(architecture.predictor, key) for key in REQUIRED}
    parts = {"arch": size, "tokenizer": asdict(architecture.tokenizer), "vocabulary": asdict(architecture.vocabulary)}
    return ", ".join(
        f"{part}=dict({', '.join(f'{key}={value}' for key, value in values.items())})" for part, values in parts.items()
    )


def check_tokens(stated: TokenEncoderArchitecture, found: TokenEncoderArchitecture, source: str) -> None:
    """Raise UserError if a config states another encoder over token ids than a file has, with the line to write."""
    if token_line(stated) != token_line(found):
        raise UserError(f"arch: found {token_line(stated)}; {source} expects {token_line(found)}")


def read_pretrained(
    source: str, size: tuple[int, int], heads: int | None, wanted: str
) -> tuple[EncoderArchitecture, Weights]:
    """Return the architecture of a checkpoint's encoder, and the checkpoint. Raises UserError if it reads no pixels."""
    given = {} if heads is None else {"encoder_heads": heads}
    weights = read_weights(source, heads=given, image_size=size, wanted=wanted)
    found = None if weights.kind == "predictor" else encoder_architecture(weights)
    if not isinstance(found, EncoderArchitecture):
        raise UserError(f"{source} reads token ids, not pixels; expected an encoder of pixels, or AddpTokenViT")
    return found, weights


def check_arch(stated: EncoderConfig, patch_size: int, found: EncoderArchitecture, weights: Weights) -> None:
    """Raise UserError if a config states another architecture than a file has, with the line to write.

    A file that does not store its number of attention heads has those of the config.
    """
    theirs = found.encoder if weights.stored else replace(found.encoder, heads=stated.heads)
    facts = [(key, getattr(stated, key), getattr(theirs, key)) for key in ARCH_KEYS]
    facts.append(("patch_size", patch_size, found.patch_size))
    facts.append(("tokenizer_norm", stated.tokenizer_norm, stated.tokenizer_norm or theirs.pre_norm))
    differences = [f"{key}={mine} (the file: {other})" for key, mine, other in facts if mine != other]
    if differences:
        expected = line_for(theirs, found.patch_size)
        raise UserError(f"arch: found {', '.join(differences)}; {weights.source} expects {expected}")
