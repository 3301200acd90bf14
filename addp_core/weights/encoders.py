"""`load_encoder`: the encoder for recognition, detection and segmentation, from any file that has one."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import timm

from addp_core.base.errors import UserError, renaming_keys
from addp_core.method.addp import ADDPConfig
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.cnn import CnnArchitecture, CnnConfig, CnnEncoder
from addp_core.networks.config import Input as Input
from addp_core.networks.config import InputChoice as InputChoice
from addp_core.networks.encoder import VIT_SIZES, Encoder, EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.networks.tokenizer import TokenizerConfig, Vocabulary
from addp_core.weights.architectures import (
    NORMALISATION,
    EncoderArchitecture,
    Normalisation,
    PredictorArchitecture,
    TokenEncoderArchitecture,
    check_stored_heads,
    with_own_norm,
)
from addp_core.weights.assumptions import settle
from addp_core.weights.files import Source, State, strip_prefix
from addp_core.weights.fitting import AnyArchitecture, AnyEncoder, fill, fit_encoder_state
from addp_core.weights.layouts.vit import trained_on
from addp_core.weights.mage import check_tokenizer_of_mage, read_tokenizer_of_mage
from addp_core.weights.reading import Weights, as_user_error, describe_kind, read_part, read_weights

DEFAULT_PATCH_SIZE = 16  # of an encoder that is built by its size
DEFAULT_CNN_SIZE = 224  # pixels, of a CNN that is built by its name

INPUTS: dict[Input, str] = {"pixels": "pixels", "token": "token ids"}
EXPECTED_INPUT = {
    "pixels": "an encoder of pixels (ADDP, MAE, BEiT, ViT)",
    "token": "a MAGE checkpoint, or with init=random an ADDP checkpoint, or a size and tokenizer=<VQGAN file>",
}


def load_encoder(
    source: Source,
    img_size: int | tuple[int, int] | None = 224,
    *,
    encoder_heads: int | None = None,
    weights: str = "",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    tokenizer_norm: bool = False,
    attention: AttentionConfig | None = None,
    dynamic: bool = False,
    init: Literal["pretrained", "random"] = "pretrained",
    patch_size: int | None = None,
    tokenizer: Source | None = None,
    input: InputChoice = "auto",
    normalisation: Normalisation = "imagenet",
    stages: bool = False,
) -> AnyEncoder:
    """Load an encoder in eval mode, float32, on the CPU. Its final norm, which transfer does not use, is frozen.

    Args:
        source: any ADDP file, a fine-tuned classifier, or a MAE-, BEiT- or timm-style ViT; with `tokenizer` (or if the
            file contains one, or its run of `addp predictor` names one) also a MAGE file, whose encoder reads token
            ids. With init="random" also a size (tiny, small, base or large) or a CNN of timm, such as resnet50.
        img_size: pixels, a side or (height, width); positions are resampled bicubically. None for the file's own size.
        encoder_heads: number of attention heads, if the file does not tell it. The default is that of published
            ViTs of the same width; other widths demand it.
        weights: the name of the model to read, if a checkpoint holds several: an entry (model, model_ema, teacher) or
            part of a prefix (base_encoder, momentum_encoder); "ema" for the average, whatever its name.
        dropout, drop_path: rates in training.
        tokenizer_norm: keep ADDP's input norm. Published transfers drop it; a ViT's own norm is always kept.
        attention, dynamic: see `Encoder`. The default is the file's attention. Relative positions that the file lacks
            start at zero, those of other sizes are resampled.
        init: "random" takes only the architecture from the file and draws the weights from torch's global generator; a
            tokenizer keeps its weights.
        patch_size: pixels, if `source` is a size (default 16).
        tokenizer: the VQGAN of a MAGE file, or of an encoder over token ids that is built by its size.
        input: "pixels" or "token", to demand what the encoder reads; "auto": what the file's encoder reads, and token
            ids for a size with a `tokenizer`. With init="random", "token" also takes an ADDP file: blocks like those of
            its encoder, over the ids of its tokenizer (the paper's Table 1).
        normalisation: of the images that the encoder will get; a tokenizer needs it undone.
        stages: the caller reads the four stages of a CNN, for which `attention` means nothing; otherwise a CNN is
            refused where `attention` is set.

    Raises:
        UserError: if the file has no encoder, or the arguments do not fit it.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    vqgan = None if tokenizer is None else read_part(tokenizer, "tokenizer")
    if input == "pixels" and vqgan is not None:
        raise UserError(f"tokenizer={vqgan.source}: found input=pixels too; leave one of the two out")
    is_name = isinstance(source, str) and not Path(source).exists()
    if is_name and (source in VIT_SIZES or timm.is_model(str(source))):
        name = str(source)
        state, architecture = _architecture_of_name(name, size, patch_size, vqgan, init, input)
    else:
        name, state, architecture = _read_encoder(source, size, encoder_heads, weights, vqgan, init)
        if input == "token" and init == "random" and isinstance(architecture, EncoderArchitecture):
            state, architecture = _architecture_of_tokens(source, weights, architecture)
    _check_input(name, architecture, input, patch_size)
    lacks_norm = init == "pretrained" and "tokenizer_norm.weight" not in state
    if tokenizer_norm and (lacks_norm or isinstance(architecture, TokenEncoderArchitecture)):
        raise UserError(f"tokenizer_norm: {name} has none; expected an ADDP checkpoint, or tokenizer_norm=false")
    if isinstance(architecture, CnnArchitecture):
        attention = None if stages else attention
        _check_cnn_options(name, architecture, encoder_heads, dropout, tokenizer_norm, attention)
    try:
        size = architecture.image_size if size is None else (size[0], size[1])
        rates = (dropout, drop_path)
        encoder = _build_encoder(architecture, size, *rates, tokenizer_norm, attention, dynamic, normalisation)
    except ValueError as error:
        raise UserError(f"img_size={img_size}: {error}") from error
    encoder.norm.requires_grad_(False)
    return _fill_encoder(encoder, name, state, architecture, init)


def _fill_encoder(encoder: AnyEncoder, name: str, state: State, architecture: AnyArchitecture, init: str) -> AnyEncoder:
    """Copy the tensors of a file into an encoder, in eval mode: all of them, or only those of its tokenizer.

    Raises UserError if they do not fit.
    """
    if init == "random":
        if isinstance(encoder, TokenEncoder):
            fill(encoder.tokenizer, strip_prefix(state, "tokenizer."), name)
        return encoder.eval()
    if not isinstance(encoder, CnnEncoder) and not isinstance(architecture, CnnArchitecture):
        trained = "cls_token" in state if isinstance(encoder, Encoder) else architecture.attention.class_token
        if encoder.attention.class_token and not trained:
            raise UserError(f"attention: {name} was trained without a class token; expected class_token=false")
    return fill(encoder, fit_encoder_state(state, architecture, encoder), name)


def _architecture_of_name(
    name: str,
    image_size: tuple[int, int] | None,
    patch_size: int | None,
    vqgan: Weights | None,
    init: str,
    wanted: InputChoice,
) -> tuple[State, AnyArchitecture]:
    """Return the architecture of a size in `VIT_SIZES`, with the tensors of its tokenizer if it has one, or of a CNN.

    Raises UserError if an encoder cannot be built from the name and these arguments alone.
    """
    if name not in VIT_SIZES:
        if vqgan is not None:
            raise UserError(f"tokenizer={vqgan.source}: {name} is a CNN of timm, which reads pixels; leave the key out")
        return {}, _cnn_architecture(name, image_size, init)
    if init != "random":
        width = VIT_SIZES[name]["width"]
        raise UserError(
            f"{name}: a size, which has no weights ({width} wide); expected init=random with it, or a checkpoint "
            "(what a recipe of this name has trained is in its run folder)"
        )
    if image_size is None:
        raise UserError(f"img_size: found none, and the size {name} has no images; expected pixels")
    if wanted == "token" and vqgan is None:
        raise UserError(f"input=token: {name} is a size, which has no tokenizer; expected tokenizer=<VQGAN file>")
    return _architecture_of_size(name, image_size, patch_size or DEFAULT_PATCH_SIZE, vqgan)


def _check_input(name: str, architecture: AnyArchitecture, wanted: InputChoice, patch_size: int | None) -> None:
    """Raise UserError if an encoder reads something else than is wanted, or patches of another size."""
    found: Input = "token" if isinstance(architecture, TokenEncoderArchitecture) else "pixels"
    if wanted not in ("auto", found):
        raise UserError(f"input={wanted}: {name} reads {INPUTS[found]}; expected {EXPECTED_INPUT[wanted]}")
    if patch_size not in (None, architecture.patch_size):
        raise UserError(f"patch_size: found {patch_size}, but {name} has {architecture.patch_size}; leave the key out")


def _cnn_architecture(arch: str, size: tuple[int, int] | None, init: str) -> CnnArchitecture:
    """Return the architecture of a model of timm. Raises UserError if it is no CNN, or init does not say random."""
    try:
        config = CnnConfig(arch)
    except ValueError as error:
        raise UserError(str(error).removeprefix("arch: ").replace("found ", "", 1)) from error
    if init != "random":
        raise UserError(f"{arch}: a model of timm, without weights here; expected init=random with it, or a checkpoint")
    return CnnArchitecture(config, size or (DEFAULT_CNN_SIZE, DEFAULT_CNN_SIZE))


def _check_cnn_options(
    name: str,
    architecture: CnnArchitecture,
    heads: int | None,
    dropout: float,
    tokenizer_norm: bool,
    attention: AttentionConfig | None,
) -> None:
    """Raise UserError if an option of ViTs is set for a CNN."""
    arch = architecture.encoder.arch
    if attention is not None:
        raise UserError(
            f"attention: {name} is a {arch}, which has neither windows nor relative positions; expected a ViT"
        )
    for key, value in (("encoder_heads", heads), ("dropout", dropout), ("tokenizer_norm", tokenizer_norm)):
        if value:
            raise UserError(f"{key}: found {value}, but {name} is a {arch}, which has none; leave the key out")


def _architecture_of_size(
    size_name: str, image_size: tuple[int, int], patch_size: int, vqgan: Weights | None
) -> tuple[State, AnyArchitecture]:
    """Return the architecture of a size in `VIT_SIZES`, and the tensors of its tokenizer if it reads token ids."""
    if vqgan is None:
        return {}, EncoderArchitecture(EncoderConfig(**VIT_SIZES[size_name]), image_size, patch_size)
    codes: TokenizerConfig = vqgan.architecture.tokenizer
    predictor = PredictorConfig(**VIT_SIZES[size_name])
    architecture = TokenEncoderArchitecture(predictor, Vocabulary(codes.codebook), codes, image_size)
    return _encoding_part(vqgan.state), architecture


def _architecture_of_tokens(
    source: Source, wanted: str, pixels: EncoderArchitecture
) -> tuple[State, TokenEncoderArchitecture | EncoderArchitecture]:
    """Return blocks like those of a pixel encoder over the ids of the tokenizer in the same file, and its tensors.

    If the file has no tokenizer, the pixel encoder is returned as it is.
    """
    weights = read_weights(source, wanted=wanted)
    if weights.kind != "addp":
        return {}, pixels
    config: ADDPConfig = weights.architecture
    shape = pixels.encoder
    predictor = PredictorConfig(shape.width, shape.depth, shape.heads, decoder_heads=shape.heads)
    architecture = TokenEncoderArchitecture(predictor, config.vocabulary, config.tokenizer, pixels.image_size)
    return _encoding_part(weights.part("tokenizer.")), architecture


def _read_encoder(
    source: Source, size: tuple[int, int] | None, heads: int | None, wanted: str, vqgan: Weights | None, init: str
) -> tuple[str, State, AnyArchitecture]:
    """Return (name for errors, tensors, architecture) of the encoder in any file that has one.

    Says what was assumed. Raises UserError if the heads are not known or, unless init is "random", the grid.
    """
    given = {} if heads is None else {"encoder_heads": heads}
    weights = read_weights(source, heads=given, image_size=size, wanted=wanted, encoder_only=True)
    if weights.kind == "predictor":
        return _read_mage_encoder(source, weights, heads, wanted, vqgan)
    if vqgan is not None:
        raise UserError(f"tokenizer={vqgan.source}: {weights.source} is no MAGE checkpoint; leave the key out")
    needed = ("encoder_heads", "img_size") if init == "pretrained" else ("encoder_heads",)
    weights.settle(("weights", "images", *needed), needed)
    if weights.kind == "classifier":
        settle(weights.source, trained_on(weights.architecture.mean, weights.architecture.std), ("images",))
    prefix = {"addp": "denoiser.encoder.", "classifier": "encoder."}.get(weights.kind, "")
    return weights.source, weights.part(prefix), encoder_architecture(weights)


def encoder_architecture(weights: Weights) -> AnyArchitecture:
    """Return the architecture of the encoder in a file.

    Raises UserError if it has none, or is a MAGE file, whose encoder needs a VQGAN.
    """
    if weights.kind == "addp":
        config: ADDPConfig = weights.architecture
        if isinstance(config.denoiser.encoder, CnnConfig):
            return CnnArchitecture(config.denoiser.encoder, config.image_size)
        return EncoderArchitecture(config.denoiser.encoder, config.image_size, config.tokenizer.stride)
    if weights.kind == "classifier":
        architecture: AnyArchitecture = weights.architecture.encoder
        return with_own_norm(architecture) if isinstance(architecture, EncoderArchitecture) else architecture
    if weights.kind in ("encoder", "token_encoder", "cnn_encoder"):
        return weights.architecture
    raise UserError(
        f"{weights.source}: {describe_kind(weights)}; expected a checkpoint with an encoder (ADDP, MAE, BEiT, MAGE or "
        "ViT with a pixel encoder)"
    )


def _read_mage_encoder(
    source: Source, weights: Weights, heads: int | None, wanted: str, vqgan: Weights | None
) -> tuple[str, State, TokenEncoderArchitecture]:
    """Return MAGE's encoder with `vqgan` as its tokenizer.

    If that is None, it is the one in MAGE's own file, or the one that the recipe of its run names, which is then said.
    """
    vqgan = vqgan or read_tokenizer_of_mage(source, weights.source, wanted)
    with renaming_keys({"predictor_heads": "encoder_heads"}):
        assumed = ("weights",) if heads is not None else ("weights", "predictor_heads")
        weights.settle(assumed, assumed)
    mage: PredictorArchitecture = weights.architecture
    if heads is not None and weights.stored:
        with renaming_keys({"predictor_heads": "encoder_heads"}):
            check_stored_heads(weights.source, mage, {"predictor_heads": heads})
    elif heads is not None:
        with as_user_error(weights.source):
            mage = replace(mage, predictor=replace(mage.predictor, heads=heads))
    codes: TokenizerConfig = vqgan.architecture.tokenizer
    check_tokenizer_of_mage(mage, weights.source, vqgan)
    size = (mage.grid[0] * codes.stride, mage.grid[1] * codes.stride)
    encoder_names = ("token_emb.", "blocks.", "norm.")
    state = {key: value for key, value in weights.state.items() if key.startswith(encoder_names)}
    state |= _encoding_part(vqgan.state)
    return weights.source, state, TokenEncoderArchitecture(mage.predictor, mage.vocabulary, codes, size)


def _encoding_part(state: State) -> State:
    """Return the tensors of a tokenizer, without its decoder, under the names that they have in a token encoder."""
    return {f"tokenizer.{key}": value for key, value in state.items() if not key.startswith("decoder.")}


def _build_encoder(
    architecture: AnyArchitecture,
    size: tuple[int, int],
    dropout: float,
    drop_path: float,
    tokenizer_norm: bool,
    attention: AttentionConfig | None,
    dynamic: bool,
    normalisation: Normalisation,
) -> AnyEncoder:
    """Build the encoder of a file for another size and other rates. Raises ValueError if the size does not fit."""
    if isinstance(architecture, CnnArchitecture):
        return CnnEncoder(replace(architecture.encoder, drop_path=drop_path), size)
    attention = attention or architecture.attention
    if isinstance(architecture, TokenEncoderArchitecture):
        predictor = replace(architecture.predictor, dropout=dropout)
        ids = (architecture.vocabulary, architecture.tokenizer)
        return TokenEncoder(
            predictor, *ids, size, drop_path, *NORMALISATION[normalisation], attention=attention, dynamic=dynamic
        )
    config = replace(
        architecture.encoder,
        dropout=dropout,
        drop_path=drop_path,
        tokenizer_norm=tokenizer_norm or architecture.encoder.pre_norm,
        input_dropout=dropout,
    )
    return Encoder(config, size, architecture.patch_size, attention, dynamic)
