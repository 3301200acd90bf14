"""The published layouts of ADDP, of MAGE (the token predictor) and of the VQGAN (the tokenizer), and back.

Each conversion maps the names to ours and reads the architecture off the shapes.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.method.addp import ADDP, ADDPConfig, DenoiserConfig
from addp_core.networks.cnn import CnnConfig
from addp_core.networks.decoder import DecoderConfig
from addp_core.networks.encoder import EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.tokenizer import TokenizerConfig, Vocabulary
from addp_core.weights.architectures import PredictorArchitecture, TokenizerArchitecture
from addp_core.weights.assumptions import Hints
from addp_core.weights.files import State, strip_prefix
from addp_core.weights.layouts.shapes import (
    depth_of,
    has_tensors,
    require_tensors,
    square_grid,
)

ENCODER_PREFIXES = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "tokenizer_norm.")
DECODER_PREFIXES = ("token_emb.", "decoder_embed.", "mask_token", "decoder_pos_embed_learned", "decoder_pos_mask_embed",
                    "decoder_pos_token_embed", "decoder_blocks.", "decoder_norm.", "mlm_layer.")  # fmt: skip
ADDP_UNUSED = ("pos_token_embed", "pos_mask_embed", "decoder_pos_embed", "decoder_pred.weight", "decoder_pred.bias")
MAGE_UNUSED = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "patch_embed.proj.weight",
               "patch_embed.proj.bias", "decoder_pred.weight", "decoder_pred.bias",
               "token_emb.position_ids")  # fmt: skip
PREDICTOR_EMBEDDINGS = ("token_emb.word_embeddings.weight", "token_emb.position_embeddings.weight")
VQGAN_PREFIXES = ("encoder.", "decoder.", "quantize.")
VQGAN_CODEBOOK = "quantize.embedding.weight"
PUBLISHED_PREFIXES = {  # ours -> published
    "tokenizer.": "vqgan.",
    "predictor.": "token_predictor.",
    "denoiser.encoder.": "",
    "denoiser.decoder.": "",
}

is_published_addp = has_tensors("decoder_pos_token_embed", "token_emb.weight")
is_mage = has_tensors("token_emb.word_embeddings.weight", "mlm_layer.fc.weight")


def is_vqgan(state: Mapping[str, Any]) -> bool:
    """Check whether a state dict is, or contains, a VQGAN."""
    return any(prefix + VQGAN_CODEBOOK in state for prefix in ("", "vqgan."))


# -------------------- published -> ours


def convert_addp(source: str, state: State, hints: Hints) -> tuple[State, ADDPConfig]:
    """Convert a published ADDP checkpoint."""
    ours = from_published(state)
    encoder, decoder = strip_prefix(ours, "denoiser.encoder."), strip_prefix(ours, "denoiser.decoder.")
    _require_ranks(source, encoder, {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4})
    _require_ranks(source, decoder, {"token_emb.weight": 2})
    patch = encoder["patch_embed.proj.weight"].shape[-1]
    grid = square_grid(source, encoder["pos_embed"].shape[1] - 1)
    width = encoder["cls_token"].shape[-1]
    tokenizer_state = strip_prefix(ours, "tokenizer.")
    tokenizer = _tokenizer_config(source, tokenizer_state) if tokenizer_state else TokenizerConfig()
    if tokenizer_state and patch != tokenizer.stride:
        raise UserError(
            f"{source}: patch_embed.proj.weight is for patches of {patch} pixels, expected {tokenizer.stride}, the "
            "tokenizer's stride"
        )
    predictor_state = strip_prefix(ours, "predictor.")
    predictor = _predictor_config(source, predictor_state, hints) if predictor_state else None
    encoder_heads = hints.heads_for("encoder_heads", width)
    denoiser = DenoiserConfig(
        EncoderConfig(width, depth_of(encoder, "blocks."), encoder_heads, dropout=0.1, tokenizer_norm=True),
        DecoderConfig(depth_of(decoder, "decoder_blocks."), hints.decoder_heads_for("decoder_heads", width)),
    )
    vocabulary = _vocabulary(decoder["token_emb.weight"], tokenizer.codebook if tokenizer_state else None)
    image_size = (grid[0] * patch, grid[1] * patch)
    return ours, ADDPConfig(image_size, tokenizer, vocabulary, predictor, denoiser)


def convert_mage(source: str, state: State, hints: Hints) -> tuple[State, PredictorArchitecture]:
    """Convert a MAGE checkpoint to a token predictor."""
    ours = {key: value for key, value in state.items() if key not in MAGE_UNUSED and not key.startswith("vqgan.")}
    predictor = _predictor_config(source, ours, hints)
    tokens = ours["token_emb.position_embeddings.weight"].shape[0] - 1
    codebook = f"vqgan.{VQGAN_CODEBOOK}"
    codes = None
    if codebook in state:
        _require_ranks(source, state, {codebook: 2})
        codes = len(state[codebook])
    vocabulary = _vocabulary(ours["token_emb.word_embeddings.weight"], codes)
    return ours, PredictorArchitecture(predictor, square_grid(source, tokens), vocabulary)


def convert_vqgan(source: str, state: State, hints: Hints) -> tuple[State, TokenizerArchitecture]:
    """Convert a VQGAN checkpoint, or the VQGAN inside a MAGE checkpoint, to a tokenizer."""
    prefix = "vqgan." if f"vqgan.{VQGAN_CODEBOOK}" in state else ""
    vqgan = strip_prefix(state, prefix)
    ours = {key: value for key, value in vqgan.items() if key.startswith(VQGAN_PREFIXES)}
    _check_no_other_parts(source, vqgan)
    return ours, TokenizerArchitecture(_tokenizer_config(source, ours))


def from_published(state: State) -> State:
    """Rename the tensors of a published ADDP checkpoint to our names.

    The second copy of the tokenizer and the tensors that nothing uses are dropped.
    """
    ours = {}
    for key, value in state.items():
        name = _our_name(key)
        if name is not None:
            ours[name] = value
    if not any(key.startswith("tokenizer.") for key in ours):
        second_copy = strip_prefix(state, "token_predictor.vqgan.")
        ours |= {f"tokenizer.{key}": value for key, value in second_copy.items()}
    return ours


def _our_name(key: str) -> str | None:
    """Return our name of a published tensor, or None for a tensor to drop."""
    if key.startswith("token_predictor.vqgan.") or key in ADDP_UNUSED:
        return None
    if key.startswith("vqgan."):
        return "tokenizer." + key.removeprefix("vqgan.")
    if key.startswith("token_predictor."):
        name = key.removeprefix("token_predictor.")
        return None if name in MAGE_UNUSED else f"predictor.{name}"
    if key.startswith(ENCODER_PREFIXES):
        return f"denoiser.encoder.{key}"
    if key.startswith(DECODER_PREFIXES):
        return f"denoiser.decoder.{key}"
    return key  # loading reports it as unexpected


def encoder_tensors(state: State) -> State:
    """Return the encoder's tensors of a state dict in any layout, under MAE's names, which are our encoder's names."""
    ours = strip_prefix(state, "denoiser.encoder.")
    return ours or {key: value for key, value in state.items() if key.startswith(ENCODER_PREFIXES)} or state


# -------------------- ours -> published


def to_published(model: ADDP) -> State:
    """Return every tensor that the published implementation declares; those that it never uses are zeros.

    Raises ValueError if the model has options that the published implementation lacks.
    """
    if model.config.process.ids_to != "decoder":
        raise ValueError(f"ids_to: found {model.config.process.ids_to!r}; the published layout only supports 'decoder'")
    encoder = model.config.denoiser.encoder
    if isinstance(encoder, CnnConfig):
        raise ValueError(f"arch: found {encoder.arch}; the published layout only has ViTs")
    if not encoder.tokenizer_norm:
        raise ValueError("tokenizer_norm: found false; the published layout only supports true")
    if model.predictor is None:
        raise ValueError(
            "this model has no token predictor, which the published layout contains: load it with predictor=<file>"
        )
    published = {published_name(key): value.detach().to("cpu") for key, value in model.state_dict().items()}
    published |= {f"token_predictor.{key}": value for key, value in published.items() if key.startswith("vqgan.")}
    return published | _unused_tensors(model.config)


def published_name(key: str) -> str:
    """Return the published name of one of our tensors. Raises ValueError if it has none."""
    for ours, published in PUBLISHED_PREFIXES.items():
        if key.startswith(ours):
            return published + key.removeprefix(ours)
    raise ValueError(f"{key}: has no name in the published layout")


def _unused_tensors(config: ADDPConfig) -> State:
    """Return the tensors that the published implementation declares and never uses: zeros, and counting ids."""
    positions, pixels = 1 + config.tokens, 3 * config.tokenizer.stride**2
    unused: State = {}
    assert config.predictor is not None  # checked by `to_published`
    for prefix, names, width in (
        ("", ADDP_UNUSED, config.denoiser.encoder.width),
        ("token_predictor.", MAGE_UNUSED, config.predictor.width),
    ):
        shapes = {
            "cls_token": (1, 1, width),
            "mask_token": (1, 1, width),
            "patch_embed.proj.weight": (width, 3, config.tokenizer.stride, config.tokenizer.stride),
            "patch_embed.proj.bias": (width,),
            "decoder_pred.weight": (pixels, width),
            "decoder_pred.bias": (pixels,),
        }
        unused |= {
            prefix + name: torch.zeros(shapes.get(name, (1, positions, width)))
            for name in names
            if name != "token_emb.position_ids"
        }
    unused["token_predictor.token_emb.position_ids"] = torch.arange(positions)[None]
    return unused


# -------------------- architectures from shapes


def _require_ranks(source: str, state: State, ranks: Mapping[str, int]) -> None:
    """Raise UserError if a tensor is missing, or has another number of dimensions, from which sizes are read."""
    require_tensors(source, state, ranks)
    for name, rank in ranks.items():
        if state[name].ndim != rank:
            raise UserError(f"{source}: {name} has shape {list(state[name].shape)}, expected {rank} dimensions")


def _predictor_config(source: str, state: State, hints: Hints) -> PredictorConfig:
    _require_ranks(source, state, dict.fromkeys(PREDICTOR_EMBEDDINGS, 2))
    width = state["token_emb.word_embeddings.weight"].shape[1]
    return PredictorConfig(
        width,
        depth_of(state, "blocks."),
        hints.heads_for("predictor_heads", width),
        depth_of(state, "decoder_blocks."),
        hints.decoder_heads_for("predictor_decoder_heads", width),
    )


def _check_no_other_parts(source: str, state: State) -> None:
    """Raise UserError if the VQGAN has parts that MaskGIT's, and our tokenizer, lack."""
    unsupported = [key for key in state if ".attn" in key or key.startswith(("quant_conv.", "post_quant_conv."))]
    if unsupported:
        raise UserError(
            f"{source}: a VQGAN with attention or quantization convolutions ({unsupported[0]}); "
            "expected MaskGIT's VQGAN, which has neither"
        )


def _tokenizer_config(source: str, state: State) -> TokenizerConfig:
    _check_no_other_parts(source, state)
    _require_ranks(source, state, {"encoder.conv_in.weight": 4, VQGAN_CODEBOOK: 2})
    width = state["encoder.conv_in.weight"].shape[0]
    levels = 1 + max((int(m[1]) for m in (re.match(r"encoder\.down\.(\d+)\.", key) for key in state) if m), default=0)
    first_convs = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    _require_ranks(source, state, dict.fromkeys(first_convs, 4))
    codebook, dim = state[VQGAN_CODEBOOK].shape
    multipliers = tuple(state[key].shape[0] // width for key in first_convs)
    return TokenizerConfig(width, multipliers, depth_of(state, "encoder.down.0.block."), codebook, dim)


def _vocabulary(embeddings: Tensor, codebook: int | None) -> Vocabulary:
    """Return the vocabulary of Float[V,W] embeddings. If `codebook` is None, assume the 1000 unused slots of published
    files.
    """
    if codebook is None:
        codebook = max(len(embeddings) - Vocabulary.unused - 1, 1)
    unused = len(embeddings) - codebook - 1
    return Vocabulary.with_slots(codebook, unused)
