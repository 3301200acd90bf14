"""The keys of the encoder in detectron2's yacs configs: the node MODEL.ENCODER, its defaults, and the encoder it
describes.
"""

import logging
from dataclasses import asdict, fields
from typing import Any

from detectron2.config import CfgNode
from pydantic import TypeAdapter, ValidationError

from addp_core.base.errors import UserError, did_you_mean, renaming_keys
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.cnn import CnnArchitecture, CnnConfig, CnnEncoder
from addp_core.networks.encoder import Encoder, EncoderArchitecture, EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.token_encoder import TokenEncoder, TokenInput
from addp_core.weights.encoders import DEFAULT_PATCH_SIZE, load_encoder
from addp_core.weights.fitting import AnyArchitecture, AnyEncoder
from addp_core.weights.pretrained import NORMALISATION
from det.config import vitdet_attention

log = logging.getLogger("detectron2.addp")

NODE = "MODEL.ENCODER"
DEFAULT_SIZE = 1024  # pixels, as in ViTDet
IMAGE_FORMAT = "RGB"  # in which all encoders were pretrained
LEVELS = ("p2", "p3", "p4", "p5", "p6")  # of the pyramid, as the heads of detectron2's FPN configs read them

DEFAULTS: dict[str, Any] = {
    "source": "",  # a run, a file, hf://owner/repository/file; with init=random also a size, or a CNN of timm
    "init": "pretrained",  # or random: only the architecture comes from `source`
    "input": "auto",  # or pixels, or token: what the encoder reads; auto: what that of `source` reads
    "tokenizer": "",  # the VQGAN of an encoder over token ids, if `source` neither contains nor names it
    "arch": {},  # in place of `source`: the keys of EncoderConfig (width, depth, heads, ...), with random weights
    "tokens": {},  # with `arch`, for an encoder over token ids: the nodes `tokenizer` and `vocabulary`
    "cnn": "",  # in place of `source`, for EncoderStages and EncoderFPN: a CNN of timm, with random weights
    "img_size": None,  # pixels (a side, or height and width) for which positions are stored; images may have any size
    "patch_size": None,  # pixels, if `source` is a size or `arch` is given
    "encoder_heads": None,  # attention heads, if the file does not tell and its width has no usual number
    "weights": "",  # the model to read, if a checkpoint holds several
    "dropout": 0.0,
    "drop_path": 0.1,
    "tokenizer_norm": False,  # keep ADDP's norm after the patches
    "dynamic": True,  # take images of any size
    "attention": asdict(vitdet_attention()),  # the keys of AttentionConfig
    "checkpointing": False,  # recompute activations: less memory, more computation
    "out_feature": "last_feat",  # EncoderBackbone: name of its map
    "stride": None,  # EncoderBackbone: stride of its map in pixels (default: the patch size)
    "levels": (),  # EncoderPyramid: p2 to p6, or those that RetinaNet reads
    "square_pad": 0,  # EncoderPyramid: pad images to squares of this side, as ViTDet does; 0: do not
}
NODES = {  # the keys that are nodes themselves
    "arch": EncoderConfig,
    "tokens": TokenInput,
    "attention": AttentionConfig,
}
NO_ARGUMENTS_OF_LOADING = ("arch", "tokens", "cnn", "checkpointing", "out_feature", "stride", "levels", "square_pad")

VIT_KEYS = ("attention", "arch", "tokens", "levels", "stride", "patch_size")  # which mean nothing for a CNN
FOR_CNNS = "expected MODEL.BACKBONE.NAME=EncoderFPN or EncoderStages for a CNN"


def add_encoder_config(cfg: CfgNode) -> None:
    """Add the keys of our backbones to a config, as the node MODEL.ENCODER (see `DEFAULTS`).

    Also sets INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD to what the encoder was pretrained with, because
    detectron2's defaults are those of Caffe's ResNets. Call it before `cfg.merge_from_file`.
    """
    cfg.MODEL.ENCODER = CfgNode(DEFAULTS, new_allowed=True)  # unknown keys are refused by `encoder_options`
    for name in NODES:
        cfg.MODEL.ENCODER[name].set_new_allowed(True)
    cfg.INPUT.FORMAT = IMAGE_FORMAT
    mean, std = NORMALISATION["imagenet"]
    cfg.MODEL.PIXEL_MEAN = [255 * value for value in mean]
    cfg.MODEL.PIXEL_STD = [255 * value for value in std]


def encoder_options(cfg: CfgNode) -> dict[str, Any]:
    """Return the values of MODEL.ENCODER, with defaults for keys that are missing.

    Raises UserError if the node is missing or has an unknown key.
    """
    if "ENCODER" not in cfg.MODEL:
        raise UserError(f"{NODE}: missing; call det.add_encoder_config(cfg) before cfg.merge_from_file")
    given = dict(cfg.MODEL.ENCODER)
    _refuse_unknown(given, DEFAULTS, NODE)
    for name, node_class in NODES.items():
        _refuse_unknown(given.get(name, {}), [field.name for field in fields(node_class)], f"{NODE}.{name}")
    if "attention" not in given:  # a node that was written without `add_encoder_config`
        given["attention"] = {}
    return {**DEFAULTS, **given}


def square_pad(cfg: CfgNode) -> int:
    """Return MODEL.ENCODER.square_pad. Raises UserError if larger images would be cut off, which detectron2 does
    without a word.
    """
    side = encoder_options(cfg)["square_pad"]
    for key in ("MAX_SIZE_TEST", "MAX_SIZE_TRAIN"):
        if 0 < side < (size := cfg.INPUT[key]):
            problem = (
                f"{NODE}.square_pad: found {side}, but INPUT.{key}={size}: larger images would be cut off; expected "
                f"INPUT.{key}={side}, or {NODE}.square_pad={size} or 0"
            )
            if key == "MAX_SIZE_TEST":
                raise UserError(problem)
            log.warning("%s", problem)  # a script's own loader may crop, and evaluation has no use for it
    return side


def _refuse_unknown(found: Any, known: Any, node: str) -> None:
    for key in found:
        if key not in known:
            raise UserError(f"{node}.{key}: no such key{did_you_mean(key, known)}; the keys are {', '.join(known)}")


def architecture_keys(architecture: AnyArchitecture) -> dict[str, Any]:
    """Return the keys of MODEL.ENCODER that build an encoder of this architecture, without a file."""
    if isinstance(architecture, CnnArchitecture):
        return {"img_size": list(architecture.image_size), "cnn": architecture.encoder.arch}
    keys = {"img_size": list(architecture.image_size), "attention": asdict(architecture.attention)}
    if isinstance(architecture, EncoderArchitecture):
        return keys | {"arch": asdict(architecture.encoder), "patch_size": architecture.patch_size}
    mage = architecture.predictor
    arch = {"width": mage.width, "depth": mage.depth, "heads": mage.heads, "dropout": mage.dropout}
    return keys | {"arch": arch, "tokens": asdict(TokenInput(architecture.vocabulary, architecture.tokenizer))}


def build_encoder(options: dict[str, Any]) -> Encoder | TokenEncoder:
    """Build the ViT that MODEL.ENCODER describes.

    Raises UserError as `load_encoder` does, or if the encoder is a CNN.
    """
    if options["cnn"]:
        raise UserError(f"{NODE}.cnn: found {options['cnn']!r}; {FOR_CNNS}")
    attention = _attention(options["attention"])
    if options["arch"]:
        return _build_from_architecture(options, _size(options), attention)
    encoder = _load(options, attention=attention, stages=True)  # so that a CNN is refused here
    if not isinstance(encoder, Encoder | TokenEncoder):
        raise UserError(f"{NODE}.source={options['source']}: a CNN; {FOR_CNNS}, or a ViT")
    return encoder


def build_cnn(options: dict[str, Any]) -> CnnEncoder:
    """Build the CNN that MODEL.ENCODER describes.

    Raises UserError as `load_encoder` does, or if the encoder is a ViT, or a key of ViTs is set.
    """
    for key in VIT_KEYS:
        if options[key] not in (DEFAULTS[key], {}):
            raise UserError(
                f"{NODE}.{key}: found {_plain(options[key])}, but a CNN is read at its four stages and has none; leave "
                "the key out"
            )
    if not options["cnn"]:
        encoder = _load(options, stages=True)
        if not isinstance(encoder, CnnEncoder):
            raise UserError(
                f"{NODE}.source={options['source']}: a ViT; expected a CNN, or MODEL.BACKBONE.NAME=EncoderPyramid"
            )
        return encoder
    if options["source"]:
        raise UserError(f"{NODE}.cnn: {NODE}.source={options['source']} has its own; leave one of the two out")
    try:
        config = CnnConfig(options["cnn"], drop_path=options["drop_path"])
    except ValueError as error:
        raise UserError(f"{NODE}.cnn: {str(error).removeprefix('arch: ')}") from error
    return CnnEncoder(config, _size(options))


def _size(options: dict[str, Any]) -> tuple[int, int]:
    """Return the height and width for which positions are stored."""
    size = DEFAULT_SIZE if options["img_size"] is None else options["img_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value


def _load(options: dict[str, Any], **more: Any) -> AnyEncoder:
    """Load the encoder of `source`. Raises UserError as `load_encoder` does."""
    if not options["source"]:
        raise UserError(
            f"{NODE}.source: missing; expected a checkpoint, a run folder or hf://owner/repository/file; with "
            f"{NODE}.init=random also a size (tiny, small, base, large) or a CNN of timm (resnet50)"
        )
    size = DEFAULT_SIZE if options["img_size"] is None else options["img_size"]
    arguments = {key: value for key, value in options.items() if key not in NO_ARGUMENTS_OF_LOADING}
    arguments["tokenizer"] = options["tokenizer"] or None
    del arguments["img_size"]
    del arguments["attention"]
    with renaming_keys({"img_size": f"{NODE}.img_size", "encoder_heads": f"{NODE}.encoder_heads"}):
        return load_encoder(**arguments, **{"img_size": size, **more})


def _attention(values: Any) -> AttentionConfig:
    """Return the attention of a node; windows need not say that there is no class token in them."""
    try:
        return AttentionConfig(**{"class_token": not values.get("window"), **values})
    except ValueError as error:
        raise UserError(f"{NODE}.attention.{error}") from error


def _build_from_architecture(
    options: dict[str, Any], hw: tuple[int, int], attention: AttentionConfig
) -> Encoder | TokenEncoder:
    if options["source"]:
        raise UserError(f"{NODE}.arch: {NODE}.source={options['source']} has its own; leave one of the two out")
    rates = {name: options[name] for name in ("dropout", "drop_path", "tokenizer_norm")}
    try:
        config = EncoderConfig(**{**rates, **options["arch"]})
        if options["tokens"]:
            return _build_over_tokens(config, options, hw, attention)
        return Encoder(config, hw, options["patch_size"] or DEFAULT_PATCH_SIZE, attention, options["dynamic"])
    except ValueError as error:
        raise UserError(f"{NODE}.arch: {error}") from error


def _build_over_tokens(
    config: EncoderConfig, options: dict[str, Any], hw: tuple[int, int], attention: AttentionConfig
) -> TokenEncoder:
    """Build an encoder over token ids from its architecture. Raises UserError if that of the ids is incomplete."""
    try:
        ids = TypeAdapter(TokenInput).validate_python({key: dict(value) for key, value in options["tokens"].items()})
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, ("tokens", *fault["loc"])))
        raise UserError(
            f"{NODE}.{key}: {fault['msg']}; expected the nodes tokenizer and vocabulary as `addp export "
            "layout=detectron2` writes them"
        ) from error
    mage = PredictorConfig(config.width, config.depth, config.heads, decoder_heads=config.heads, dropout=config.dropout)
    rate, dynamic = config.drop_path, options["dynamic"]
    return TokenEncoder(mage, ids.vocabulary, ids.tokenizer, hw, rate, attention=attention, dynamic=dynamic)
