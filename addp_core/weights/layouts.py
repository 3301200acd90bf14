"""Foreign layouts of weights -> our names, and back: published ADDP, MAGE and VQGAN files, MAE-, BEiT- and timm-style
ViTs.

One function maps each layout and reads the architecture off the shapes; the rest of the project knows our names alone.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from addp_core.base.errors import UserError
from addp_core.method.addp import ADDP, ADDPConfig, DenoiserConfig
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.classifier import Classifier
from addp_core.networks.decoder import DecoderConfig
from addp_core.networks.encoder import EncoderConfig
from addp_core.networks.layers import PLAIN
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.networks.tokenizer import TokenizerConfig, Vocabulary

HEAD_WIDTH = 64  # of every published ViT: heads = width / 64
DECODER_HEADS = 16  # of every published decoder

State = dict[str, Tensor]


# -------------------- architectures, as they are written beside our weights


@dataclass(frozen=True)
class TokenizerFile:
    """Architecture written beside a tokenizer's weights."""

    tokenizer: TokenizerConfig
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class PredictorFile:
    """Architecture written beside a token predictor's weights."""

    predictor: PredictorConfig
    grid: tuple[int, int]
    vocabulary: Vocabulary
    trained_on: str = ""  # fingerprint of the tokenizer whose ids it knows; empty where that is not known


@dataclass(frozen=True)
class EncoderFile:
    """Architecture written beside an encoder's weights."""

    encoder: EncoderConfig
    image_size: tuple[int, int]
    patch_size: int
    attention: AttentionConfig = PLAIN

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size)


@dataclass(frozen=True)
class TokenEncoderFile:
    """Architecture written beside the weights of an encoder over token ids, its tokenizer among them."""

    predictor: PredictorConfig
    vocabulary: Vocabulary
    tokenizer: TokenizerConfig
    image_size: tuple[int, int]

    @property
    def patch_size(self) -> int:
        """Pixels a token spans, per side."""
        return self.tokenizer.stride

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.tokenizer.grid(self.image_size)


@dataclass(frozen=True)
class ClassifierFile:
    """Architecture written beside a classifier's weights, and what its images and answers are."""

    encoder: EncoderFile | TokenEncoderFile
    classes: int
    pooling: str
    norm: str
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float | None = None  # share of the shorter side that validation cropped, where a recipe said it


ARCHITECTURES: dict[str, type] = {
    "addp": ADDPConfig,
    "tokenizer": TokenizerFile,
    "predictor": PredictorFile,
    "encoder": EncoderFile,
    "token_encoder": TokenEncoderFile,
    "classifier": ClassifierFile,
}


def with_heads(architecture: Any, heads: Mapping[str, int]) -> Any:
    """An architecture with the numbers of heads that a caller states: encoder_heads, decoder_heads, predictor_heads,
    predictor_decoder_heads; those it has no place for are left out.
    """
    stated = {key: value for key, value in heads.items() if value is not None}
    if isinstance(architecture, ADDPConfig):
        denoiser = DenoiserConfig(
            _replace(architecture.denoiser.encoder, heads=stated.get("encoder_heads")),
            _replace(architecture.denoiser.decoder, heads=stated.get("decoder_heads")),
        )
        architecture = replace(architecture, denoiser=denoiser)
    if isinstance(architecture, EncoderFile):
        return replace(architecture, encoder=_replace(architecture.encoder, heads=stated.get("encoder_heads")))
    if getattr(architecture, "predictor", None) is None:
        return architecture
    own = {"heads": stated.get("predictor_heads"), "decoder_heads": stated.get("predictor_decoder_heads")}
    return replace(architecture, predictor=_replace(architecture.predictor, **own))


def _replace(config: Any, **values: int | None) -> Any:
    return replace(config, **{key: value for key, value in values.items() if value is not None})


# -------------------- published layouts -> ours

_ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "tokenizer_norm.")
_DECODER = ("token_emb.", "decoder_embed.", "mask_token", "decoder_pos_embed_learned", "decoder_pos_mask_embed",
            "decoder_pos_token_embed", "decoder_blocks.", "decoder_norm.", "mlm_layer.")  # fmt: skip
_ADDP_UNUSED = ("pos_token_embed", "pos_mask_embed", "decoder_pos_embed", "decoder_pred.weight", "decoder_pred.bias")
_MAGE_UNUSED = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "patch_embed.proj.weight",
                "patch_embed.proj.bias", "decoder_pred.weight", "decoder_pred.bias",
                "token_emb.position_ids")  # fmt: skip
_VQGAN_PARTS = ("encoder.", "decoder.", "quantize.")


def published_addp_names(state: State) -> State:
    """Published ADDP names -> ours. The second copy of the tokenizer and tensors that nothing uses are left out."""
    ours = {}
    for key, value in state.items():
        if key.startswith("token_predictor.vqgan.") or key in _ADDP_UNUSED:
            continue
        if key.startswith("vqgan."):
            ours["tokenizer." + key.removeprefix("vqgan.")] = value
        elif key.startswith("token_predictor."):
            if key.removeprefix("token_predictor.") not in _MAGE_UNUSED:
                ours["predictor." + key.removeprefix("token_predictor.")] = value
        elif key.startswith(_ENCODER):
            ours["denoiser.encoder." + key] = value
        elif key.startswith(_DECODER):
            ours["denoiser.decoder." + key] = value
        else:
            ours[key] = value  # reported as unexpected
    if not any(key.startswith("tokenizer.") for key in ours):
        second = strip(state, "token_predictor.vqgan.")
        ours |= {"tokenizer." + key: value for key, value in second.items()}
    return ours


def encoder_names(state: State) -> State:
    """The encoder's tensors of a state dict of unknown layout, under MAE's names, which are ours within the encoder."""
    inner = strip(state, "denoiser.encoder.")
    return inner or {key: value for key, value in state.items() if key.startswith(_ENCODER)} or state


def _published_name(key: str) -> str:
    for ours, published in (
        ("tokenizer.", "vqgan."),
        ("predictor.", "token_predictor."),
        ("denoiser.encoder.", ""),
        ("denoiser.decoder.", ""),
    ):
        if key.startswith(ours):
            return published + key.removeprefix(ours)
    raise ValueError(f"{key}: no name in the published layout")


def to_published(model: ADDP) -> State:
    """Every tensor that the published implementation declares; those that it never uses are zeros.

    ValueError for options that it does not have.
    """
    if model.config.process.ids_to != "decoder":
        raise ValueError(f"ids_to: found {model.config.process.ids_to!r}; the published layout only knows 'decoder'")
    if not model.config.denoiser.encoder.tokenizer_norm:
        raise ValueError("tokenizer_norm: found false; the published layout only knows true")
    if model.predictor is None:
        raise ValueError(
            "this model has no token predictor, which the published layout contains: load it with predictor=<file>"
        )
    published = {_published_name(key): value.detach().to("cpu") for key, value in model.state_dict().items()}
    published |= {"token_predictor." + key: value for key, value in published.items() if key.startswith("vqgan.")}
    return published | _unused_published(model.config)


def to_timm(model: Classifier) -> tuple[State, dict[str, Any]]:
    """A classifier (or with 0 classes an encoder with a new norm) as timm's `VisionTransformer`: its tensors, and the
    arguments that build it. ValueError for what timm's plain ViT does not have.
    """
    encoder = model.encoder
    if isinstance(encoder, TokenEncoder):
        raise ValueError("timm's ViTs read pixels, and this encoder tokens; layout=onnx takes it")
    if encoder.attention != PLAIN:
        raise ValueError("timm's plain ViT has neither windows nor relative positions; layout=onnx takes them")
    config, state = encoder.config, {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    arguments = {
        "img_size": list(encoder.image_size),
        "patch_size": encoder.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "global_pool": model.pooling,
        "fc_norm": True,
        "pre_norm": config.tokenizer_norm,
        "num_classes": model.num_classes,
    }
    if config.layer_scale:
        arguments["init_values"] = 1.0
    if model.norm == "batch":  # a fixed scale and shift, which the head takes over
        arguments["final_norm"] = False
        _fold_norm(state, model.fc_norm)
    named = {key.removeprefix("encoder."): value for key, value in state.items()}
    named = {key: value for key, value in named.items() if not key.startswith("norm.")}
    if config.tokenizer_norm:
        named["pos_embed"][:, 1:] += named.pop("patch_embed.proj.bias")  # timm has no such bias before a norm
        named = {re.sub(r"^tokenizer_norm\.", "norm_pre.", key): value for key, value in named.items()}
    return named, arguments


def _fold_norm(state: State, norm: nn.BatchNorm1d) -> None:
    """Move a batch norm without affine parameters into the head behind it."""
    mean, scale = state.pop("fc_norm.running_mean"), (state.pop("fc_norm.running_var") + norm.eps).rsqrt()
    state.pop("fc_norm.num_batches_tracked")
    state["head.weight"] = state["head.weight"] * scale
    state["head.bias"] = state["head.bias"] - state["head.weight"] @ mean


def _unused_published(config: ADDPConfig) -> State:
    """Tensors that the published implementation declares and never uses, as zeros (`position_ids` counts up)."""
    positions, pixels = 1 + config.tokens, 3 * config.tokenizer.stride**2
    unused = {}
    for prefix, names, width in (
        ("", _ADDP_UNUSED, config.denoiser.encoder.width),
        ("token_predictor.", _MAGE_UNUSED, config.predictor.width),
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


def _convert_addp(where: str, state: State, overrides: Mapping[str, int]) -> tuple[State, ADDPConfig]:
    ours = published_addp_names(state)
    encoder, decoder = strip(ours, "denoiser.encoder."), strip(ours, "denoiser.decoder.")
    _require(where, encoder, ("cls_token", "pos_embed", "patch_embed.proj.weight"))
    tokens, patch = encoder["pos_embed"].shape[1] - 1, encoder["patch_embed.proj.weight"].shape[-1]
    grid = _square_grid(where, tokens)
    width = encoder["cls_token"].shape[-1]
    tokenizer_state = strip(ours, "tokenizer.")
    tokenizer = _tokenizer_config(where, tokenizer_state) if tokenizer_state else TokenizerConfig()
    predictor_state = strip(ours, "predictor.")
    predictor = _predictor_config(where, predictor_state, overrides) if predictor_state else None
    heads = overrides.get("encoder_heads", _usual_heads(width))
    denoiser = DenoiserConfig(
        EncoderConfig(width, _depth(encoder, "blocks."), heads, dropout=0.1, tokenizer_norm=True),
        DecoderConfig(_depth(decoder, "decoder_blocks."), overrides.get("decoder_heads", DECODER_HEADS)),
    )
    vocabulary = _make_vocabulary(decoder["token_emb.weight"], tokenizer.codebook if tokenizer_state else None)
    image_size = (grid[0] * patch, grid[1] * patch)
    return ours, ADDPConfig(image_size, tokenizer, vocabulary, predictor, denoiser)


def _convert_ours(where: str, state: State, overrides: Mapping[str, int]) -> tuple[State, ADDPConfig]:
    """Our own names without the architecture that our files carry: read as a published checkpoint's."""
    if "denoiser.pos_token_embed" in state or "denoiser.decoder.decoder_pos_token_embed" not in state:
        raise UserError(f"{where}: tensors alone do not tell this model's process.ids_to; save it with save_model")
    return _convert_addp(where, {_published_name(key): value for key, value in state.items()}, overrides)


def _convert_mage(where: str, state: State, overrides: Mapping[str, int]) -> tuple[State, PredictorFile]:
    ours = {key: value for key, value in state.items() if key not in _MAGE_UNUSED and not key.startswith("vqgan.")}
    tokens = ours["token_emb.position_embeddings.weight"].shape[0] - 1
    vqgan = state.get("vqgan.quantize.embedding.weight")
    vocabulary = _make_vocabulary(ours["token_emb.word_embeddings.weight"], None if vqgan is None else len(vqgan))
    return ours, PredictorFile(_predictor_config(where, ours, overrides), _square_grid(where, tokens), vocabulary)


def _convert_vqgan(where: str, state: State, overrides: Mapping[str, int]) -> tuple[State, TokenizerFile]:
    prefix = "vqgan." if "vqgan.quantize.embedding.weight" in state else ""
    ours = {key: value for key, value in strip(state, prefix).items() if key.startswith(_VQGAN_PARTS)}
    return ours, TokenizerFile(_tokenizer_config(where, ours))


def _convert_vit(where: str, state: State, overrides: Mapping[str, int]) -> tuple[State, EncoderFile]:
    """MAE, BEiT and timm ViTs: the encoder's tensors; decoders, heads and pooling norms are left out."""
    named = _vit_names(state)
    ours = {key: value for key, value in named.items() if key.startswith(_ENCODER)}
    ignored = ("decoder_", "mask_token", "head.", "lm_head.", "fc_norm.", "head_drop.")
    strange = [key for key in named if key not in ours and not key.startswith(ignored)]
    if strange:
        raise UserError(f"{where}: a ViT with tensors that this encoder has no place for: {', '.join(strange)}")
    _require(where, ours, ("cls_token", "patch_embed.proj.weight"))
    width, patch = ours["cls_token"].shape[-1], ours["patch_embed.proj.weight"].shape[-1]
    depth, table = _depth(ours, "blocks."), ours.get(f"blocks.0.{_TABLE}")
    if "pos_embed" in ours:
        tokens = ours["pos_embed"].shape[1] - 1
        if not _is_square(tokens) and _is_square(tokens + 1):  # the class token of DeiT III has no position
            tokens, ours["pos_embed"] = tokens + 1, functional.pad(ours["pos_embed"], (0, 0, 1, 0))
        grid = _square_grid(where, tokens)
    elif table is not None:
        grid = _table_grid(where, table)
        ours["pos_embed"] = torch.zeros(1, 1 + grid[0] * grid[1], width)
    else:
        raise UserError(f"{where}: a ViT without positions; expected pos_embed or relative_position_bias_table")
    # average-pooling ViTs have fc_norm in place of the final norm, CLIP's no bias on the patches
    absent = {"norm.weight": torch.ones, "norm.bias": torch.zeros, "patch_embed.proj.bias": torch.zeros}
    ours = {key: value(width) for key, value in absent.items()} | ours
    heads = _usual_heads(width) if table is None else table.shape[1]
    config = EncoderConfig(
        width,
        depth,
        overrides.get("encoder_heads", heads),
        tokenizer_norm="tokenizer_norm.weight" in ours,
        layer_scale="blocks.0.ls1.gamma" in ours,
        pre_norm="norm_pre.weight" in state,
    )
    attention = PLAIN if table is None else AttentionConfig(relative="table")
    return ours, EncoderFile(config, (grid[0] * patch, grid[1] * patch), patch, attention)


_TABLE = "relative.relative_position_bias_table"  # within a block


def _vit_names(state: State) -> State:
    """A ViT's tensors under timm's names for the plain ViT and, where it has none, ours: BEiT's biases, scales and
    tables, CLIP's norm in front.
    """
    named: State = {}
    for key, value in state.items():
        if key.endswith(("relative_position_index", ".k_bias", ".v_bias")):
            continue
        block, _, rest = key.rpartition(".attn.")
        if rest == "q_bias":  # keys have no bias: it would shift all scores of a query alike
            named[f"{block}.attn.qkv.bias"] = torch.cat([value, torch.zeros_like(value), state[f"{block}.attn.v_bias"]])
        elif rest == "relative_position_bias_table":
            named[f"{block}.{_TABLE}"] = value
        elif key.startswith("norm_pre."):
            named[f"tokenizer_norm.{key.removeprefix('norm_pre.')}"] = value
        else:
            named[re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key)] = value
    shared = named.pop("rel_pos_bias.relative_position_bias_table", None)
    for key in [f"blocks.{i}.{_TABLE}" for i in range(_depth(state, "blocks."))] if shared is not None else []:
        named[key] = named[key] + shared if key in named else shared.clone()
    return named


def _table_grid(where: str, table: Tensor) -> tuple[int, int]:
    """Rows and columns behind a table of biases Float[entries,heads], three entries of which are a class token's."""
    side = math.isqrt(len(table) - 3)
    if side * side != len(table) - 3 or side % 2 == 0:
        raise UserError(f"{where}: {len(table)} relative biases are no square grid's; expected (2 side - 1)^2 + 3")
    return (side + 1) // 2, (side + 1) // 2


def _predictor_config(where: str, state: State, overrides: Mapping[str, int]) -> PredictorConfig:
    _require(where, state, ("token_emb.word_embeddings.weight", "token_emb.position_embeddings.weight"))
    width = state["token_emb.word_embeddings.weight"].shape[1]
    return PredictorConfig(
        width,
        _depth(state, "blocks."),
        overrides.get("predictor_heads", _usual_heads(width)),
        _depth(state, "decoder_blocks."),
        overrides.get("predictor_decoder_heads", DECODER_HEADS),
    )


def _tokenizer_config(where: str, state: State) -> TokenizerConfig:
    foreign = [key for key in state if ".attn" in key or "quant_conv" in key]
    if foreign:
        raise UserError(
            f"{where}: a VQGAN with attention or quantization convolutions ({foreign[0]}); "
            "expected MaskGIT's, with neither"
        )
    _require(where, state, ("encoder.conv_in.weight", "quantize.embedding.weight"))
    width = state["encoder.conv_in.weight"].shape[0]
    levels = 1 + max((int(m[1]) for m in (re.match(r"encoder\.down\.(\d+)\.", key) for key in state) if m), default=0)
    first = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    _require(where, state, first)
    codebook, dim = state["quantize.embedding.weight"].shape
    multipliers = tuple(state[key].shape[0] // width for key in first)
    return TokenizerConfig(width, multipliers, _depth(state, "encoder.down.0.block."), codebook, dim)


def _make_vocabulary(embeddings: Tensor, codebook: int | None) -> Vocabulary:
    """Vocabulary of Float[V,W] embeddings; without a codebook's size, published files' 1000 unused slots."""
    if codebook is None:
        codebook = max(len(embeddings) - Vocabulary.unused - 1, 1)
    unused = len(embeddings) - codebook - 1
    return Vocabulary.with_slots(codebook, unused)


def _depth(state: Iterable[str], prefix: str) -> int:
    return 1 + max((int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix)), default=-1)


def _usual_heads(width: int) -> int:
    return max(width // HEAD_WIDTH, 1)


def _square_grid(where: str, tokens: int) -> tuple[int, int]:
    if not _is_square(tokens):
        raise UserError(f"{where}: {tokens} positions are no square grid; expected one that stores its image size")
    return math.isqrt(tokens), math.isqrt(tokens)


def _is_square(tokens: int) -> bool:
    return math.isqrt(tokens) ** 2 == tokens


def _require(where: str, state: Mapping[str, Any], keys: Iterable[str]) -> None:
    missing = [key for key in keys if key not in state]
    if missing:
        raise UserError(f"{where}: missing tensors: {', '.join(missing)}")


def strip(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# -------------------- recognising layouts


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda state: all(key in state for key in keys)


is_published_addp = _has("decoder_pos_token_embed", "token_emb.weight")
_is_mage = _has("token_emb.word_embeddings.weight", "mlm_layer.fc.weight")


def _is_vqgan(state: Mapping[str, Any]) -> bool:
    return any(prefix + "quantize.embedding.weight" in state for prefix in ("", "vqgan."))


LAYOUTS = (
    ("addp", is_published_addp, _convert_addp),
    ("addp", _has("denoiser.encoder.cls_token", "denoiser.decoder.token_emb.weight"), _convert_ours),
    ("predictor", _is_mage, _convert_mage),
    ("tokenizer", _is_vqgan, _convert_vqgan),
    ("encoder", _has("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"), _convert_vit),
)
_LOOKS = (
    (is_published_addp, "an ADDP checkpoint"),
    (_is_mage, "a MAGE checkpoint: pass it as predictor="),
    (_is_vqgan, "a VQGAN checkpoint: pass it as tokenizer="),
    (_has("mask_token", "decoder_pred.weight", "blocks.0.attn.qkv.weight"), "a MAE checkpoint: load_encoder reads it"),
    (_has("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"), "a plain ViT checkpoint: load_encoder reads it"),
    (_has("conv1.weight", "layer1.0.conv1.weight"), "a ResNet checkpoint"),
    (
        lambda state: any("diffusion_model" in key or key.startswith("first_stage_model") for key in state),
        "a latent diffusion checkpoint",
    ),
    (
        lambda state: any(key.startswith(("backbone.", "roi_heads.", "decode_head.")) for key in state),
        "a detector's or segmenter's checkpoint",
    ),
)


def describe(state: Mapping[str, Any]) -> str:
    """What a state dict looks like, in words: 'this is a MAGE checkpoint: pass it as predictor='."""
    for recognise, words in _LOOKS:
        if recognise(state):
            return f"this is {words}"
    names = ", ".join(list(state)[:4])
    return f"unknown content ({len(state)} entries such as {names})" if state else "there are no tensors in it"
