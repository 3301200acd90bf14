"""Building models from files: `load_addp`, `load_tokenizer`, `load_predictor`, `load_classifier`.

`load_encoder` has a module of its own, encoders.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from addp_core.base.errors import UserError, did_you_mean
from addp_core.method.addp import ADDP, ADDPConfig
from addp_core.method.diffusion import ProcessConfig
from addp_core.networks.classifier import Classifier
from addp_core.networks.predictor import TokenPredictor
from addp_core.networks.tokenizer import Tokenizer
from addp_core.weights.architectures import (
    HEAD_KEYS,
    NORMALISATION,
    ClassifierArchitecture,
    PredictorArchitecture,
)
from addp_core.weights.files import Source
from addp_core.weights.fitting import AnyEncoder, fill, fit_encoder_state, replace_part, resample_state
from addp_core.weights.reading import Weights, describe_kind, read_part, read_weights

PREDICTOR_HEADS = ("predictor_heads", "predictor_decoder_heads")


def load_addp(
    source: Source,
    *,
    tokenizer: Source | None = None,
    predictor: Source | None = None,
    image_size: tuple[int, int] | None = None,
    process: ProcessConfig | None = None,
    **heads: int,
) -> ADDP:
    """Load an ADDP model in eval mode, float32, on the CPU.

    Args:
        source: a path, a run folder, "hf://owner/repository[/file]" or a state dict, in the published layout or ours.
        tokenizer, predictor: sources for files that lack those parts. Without a predictor the model can generate but
            not be trained.
        image_size: (height, width) in pixels; positions are resampled if it differs from the file's.
        process: replaces the diffusion process that the file stores.
        heads: encoder_heads, decoder_heads, predictor_heads, predictor_decoder_heads, for files that do not store them;
            the default for published files is that of published ViTs of the same width, and 16 for decoders; an
            encoder of another width demands encoder_heads.

    Raises:
        UserError: if the file cannot be read or does not fit; names every missing, unexpected or mis-shaped tensor.
    """
    _check_keywords(heads, HEAD_KEYS, "load_addp")
    weights = read_weights(source, heads=heads)
    if weights.kind != "addp":
        raise UserError(f"{weights.source}: {describe_kind(weights)}; expected an ADDP checkpoint")
    weights.settle(("weights", *HEAD_KEYS), ("encoder_heads",), fixed=("weights",))
    config: ADDPConfig = weights.architecture
    state = dict(weights.state)
    if tokenizer is not None:
        part = read_part(tokenizer, "tokenizer")
        check_codebook(part, config.vocabulary.codebook)
        config = replace(config, tokenizer=part.architecture.tokenizer)
        state = replace_part(state, "tokenizer.", part.state)
    if predictor is not None:
        part = read_part(predictor, "predictor", heads)
        part.settle(("weights", *PREDICTOR_HEADS), ("predictor_heads",), fixed=("weights",))
        check_codebook(part, config.vocabulary.codebook)
        resampled = resample_state(part.state, part.architecture.grid, config.grid)
        config = replace(config, predictor=part.architecture.predictor)
        state = replace_part(state, "predictor.", resampled)
    if not any(key.startswith("tokenizer.") for key in state):
        raise UserError(
            f"{weights.source}: has no tokenizer; expected one in the file or passed as tokenizer=<VQGAN file>"
        )
    if process is not None:
        config = replace(config, process=process)
    if image_size is not None:
        resized = replace(config, image_size=(image_size[0], image_size[1]))
        state = resample_state(state, config.grid, resized.grid)
        config = resized
    return fill(ADDP(config), state, weights.source)


def load_tokenizer(source: Source) -> Tokenizer:
    """Load the tokenizer of a VQGAN file, a tokenizer run or any ADDP file; eval mode, float32, CPU."""
    weights = read_part(source, "tokenizer")
    weights.settle(("weights",), fixed=("weights",))
    return fill(Tokenizer(weights.architecture.tokenizer, weights.architecture.grid), weights.state, weights.source)


def load_predictor(source: Source, grid: tuple[int, int] | None = None, **heads: int) -> TokenPredictor:
    """Load the token predictor of a MAGE file, a predictor run or any ADDP file; eval mode, float32, CPU.

    Args:
        source: a path, a run folder, "hf://owner/repository[/file]" or a state dict.
        grid: token grid (rows, columns); positions are resampled if it differs from the file's.
        heads: predictor_heads and predictor_decoder_heads, if the file does not store them.
    """
    weights = read_part(source, "predictor", heads)
    weights.settle(("weights", *PREDICTOR_HEADS), ("predictor_heads",), fixed=("weights",))
    architecture: PredictorArchitecture = weights.architecture
    state = weights.state if grid is None else resample_state(weights.state, architecture.grid, grid)
    rows, columns = grid or architecture.grid
    predictor = TokenPredictor(architecture.predictor, rows * columns, architecture.vocabulary)
    predictor.trained_on = architecture.trained_on
    return fill(predictor, state, weights.source)


def load_classifier(
    source: Source,
    img_size: int | tuple[int, int] | None = None,
    *,
    encoder_heads: int | None = None,
    normalisation: Literal["imagenet", "half"] | None = None,
    weights: str = "",
) -> Classifier:
    """Load a classifier; eval mode, float32, CPU.

    Args:
        source: a run of `addp finetune` or `addp linprobe`, or a foreign ViT with its head: fine-tuned by MAE's, BEiT's
            or ADDP's published code, MAE's linear probe, or a state dict of timm's ViT. Pooling, norm and number of
            classes are the file's; with `norm` in place of `fc_norm` the head reads the class token.
        img_size: pixels, a side or (height, width), if other than in training; positions are resampled bicubically.
        encoder_heads: number of attention heads, if the file does not tell it and it is not the usual one of its width.
        weights: the name of the model to read, if a checkpoint holds several, as in `load_encoder`.
        normalisation: mean and std of the images, which most foreign files do not store (timm's `train.py` does):
            ImageNet's (the default, as MAE, BEiT's fine-tuning and DeiT) or 0.5 ("half": most ViTs of timm).

    Raises:
        UserError: if the file has no head, or the arguments do not fit it.
    """
    heads = {} if encoder_heads is None else {"encoder_heads": encoder_heads}
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    file = read_weights(source, "classifier", heads, size, weights)
    if file.kind != "classifier":
        raise UserError(
            f"{file.source}: {describe_kind(file)}; expected a classifier: a run of `addp finetune`, or a ViT "
            "with its norm and head"
        )
    assumed = ("weights", "encoder_heads", "img_size", "pooling") + (
        ("normalisation",) if normalisation is None else ()
    )
    file.settle(assumed, ("encoder_heads", "img_size"))
    architecture: ClassifierArchitecture = file.architecture
    if normalisation is not None:
        if not file.assumes("normalisation"):
            raise UserError(f"normalisation: {file.source} stores its mean and std; leave the key out")
        mean, std = NORMALISATION[normalisation]
        architecture = replace(architecture, mean=mean, std=std)
    stored = architecture.encoder
    height, width = size or stored.image_size
    encoder: AnyEncoder
    try:
        encoder = stored.build((height, width))
    except ValueError as error:
        raise UserError(f"img_size={img_size}: {error}") from error
    model = Classifier(
        encoder,
        architecture.classes,
        architecture.pooling,
        architecture.norm,
        architecture.class_names,
        architecture.mean,
        architecture.std,
        architecture.crop,
        architecture.feature_norm,
    )
    encoder_state = fit_encoder_state(file.part("encoder."), stored, encoder)
    return fill(model, replace_part(file.state, "encoder.", encoder_state), file.source)


def check_codebook(part: Weights, codes: int) -> None:
    """Raise UserError if a tokenizer or predictor does not have this number of codes."""
    architecture = part.architecture
    found = architecture.tokenizer.codebook if part.kind == "tokenizer" else architecture.vocabulary.codebook
    if found != codes:
        raise UserError(f"{part.kind}={part.source}: it has {found} codes, but the model predicts {codes}")


def _check_keywords(keywords: Mapping[str, Any], allowed: Iterable[str], function: str) -> None:
    for key in keywords:
        if key not in allowed:
            raise TypeError(f"{function}() got an unexpected keyword argument {key!r}{did_you_mean(key, allowed)}")
