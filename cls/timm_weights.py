"""Weights of any layout for timm's `VisionTransformer`: what a file says about the model, and its tensors."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from addp_core.base.errors import UserError, renaming_keys
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder, EncoderArchitecture
from addp_core.weights.architectures import ClassifierArchitecture
from addp_core.weights.encoders import encoder_architecture, load_encoder
from addp_core.weights.files import Source, State
from addp_core.weights.layouts.vit import timm_arguments, to_timm
from addp_core.weights.loading import load_classifier
from addp_core.weights.reading import Weights, read_weights
from cls.data import classifier_crop

log = logging.getLogger("addp")

SHAPE = ("patch_size", "embed_dim", "depth", "num_heads", "pre_norm", "init_values")  # arguments that an encoder fixes
PLAIN: dict[str, Any] = {  # what our encoder always is, among timm's arguments
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "qk_norm": False,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "proj_bias": True,
    "class_token": True,
    "pos_embed": "learn",
    "no_embed_class": False,
    "reg_tokens": 0,
}
POOLING = ("global_pool", "fc_norm", "final_norm")  # arguments that a classifier fixes besides
NEW = ("norm.", "fc_norm.", "attn_pool.", "head.")  # parts that keep their initial weights if a file lacks them


@dataclass(frozen=True)
class TimmFile:
    """What a file says about the model of timm that holds its weights."""

    source: str  # names the file
    arguments: dict[str, Any]  # of timm's VisionTransformer
    cfg: dict[str, Any]  # entries of timm's pretrained_cfg
    metadata: str  # of a file of ours, which timm drops when it reads the tensors; otherwise ""


def describe_file(source: Source, name: str, wanted: Mapping[str, Any]) -> TimmFile:
    """Read what a file says about its model and compare it with the arguments that the caller wants.

    Args:
        source: a file, a run folder, zoo:<name> or hf://owner/repository/file.
        name: of the model in timm.
        wanted: timm's arguments, those of the name included.

    Raises:
        UserError: if the file has no encoder that timm's ViT can hold, or contradicts `wanted`.
    """
    weights = read_weights(source, "classifier", image_size=_pair(wanted.get("img_size")))
    model = _skeleton(weights, bool(wanted.get("pre_norm")))
    arguments = _arguments(weights, model)
    if not weights.stored and "num_heads" not in wanted:
        with renaming_keys({"encoder_heads": "num_heads"}):
            weights.settle(("encoder_heads",), ("encoder_heads",))
    has_head = wanted.get("num_classes", model.num_classes) == model.num_classes
    refuse_contradictions(weights, name, wanted, _comparable(weights, arguments, has_head))
    cfg: dict[str, Any] = {"input_size": (3, *model.encoder.image_size)}
    if weights.kind == "classifier":
        cfg |= {"mean": model.mean, "std": model.std, "crop_pct": classifier_crop(model)}
        cfg |= {"num_classes": model.num_classes, "label_names": model.class_names or None}
    description = {"kind": weights.kind, "architecture": asdict(weights.architecture)}
    return TimmFile(weights.source, arguments, cfg, json.dumps(description) if weights.stored else "")


def refuse_contradictions(weights: Weights, name: str, wanted: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise UserError if arguments of timm contradict those that a file fixes; says which, and how to take the file's.

    Args:
        weights: of the file.
        name: of the model in timm.
        wanted: timm's arguments, those of the name included.
        arguments: those that the file fixes.
    """
    fixed = {**PLAIN, **arguments}
    wrong = [key for key in fixed if key in wanted and not _agree(key, wanted[key], fixed[key])]
    if wrong:
        found, expected = (", ".join(f"{key}={values[key]}" for key in wrong) for values in (wanted, fixed))
        raise UserError(
            f"{weights.source}: found {found} ({name}), expected {expected} as in the file; the name addp_vit without "
            "these arguments takes them from it"
        )


def _agree(key: str, wanted: Any, found: Any) -> bool:
    """Compare two values of an argument of timm."""
    if key == "init_values":  # values of layer scale come from the file
        return (wanted is None) == (found is None)
    if key == "patch_size":
        return _pair(wanted) == _pair(found)
    return bool(wanted == found)


def _pair(size: Any) -> tuple[int, int] | None:
    """Return a size in pixels, which timm takes as a side or as a pair, as a pair."""
    return None if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])


def _skeleton(weights: Weights, keep_norm: bool) -> Classifier:
    """Return the model of a file without its weights: its classifier, or its encoder as one without a head."""
    encoder = encoder_architecture(weights)
    if not isinstance(encoder, EncoderArchitecture):
        raise UserError(f"{weights.source}: timm's ViTs read pixels, but its encoder reads tokens; use load_encoder")
    config = replace(encoder.encoder, tokenizer_norm=keep_norm or encoder.encoder.pre_norm)
    with torch.device("meta"):
        network = Encoder(config, encoder.image_size, encoder.patch_size, encoder.attention)
        if weights.kind != "classifier":
            return Classifier(network, 0)
        head: ClassifierArchitecture = weights.architecture
        return Classifier(
            network,
            head.classes,
            head.pooling,
            head.norm,
            head.class_names,
            head.mean,
            head.std,
            head.crop,
            head.feature_norm,
        )


def _arguments(weights: Weights, model: Classifier) -> dict[str, Any]:
    """Return the arguments of timm that a file fixes. Raises UserError if timm's ViT cannot hold the model."""
    try:
        arguments = {"init_values": None, "final_norm": True, **timm_arguments(model)}
    except ValueError as error:
        raise UserError(f"{weights.source}: {error}") from error
    arguments["fc_norm"] &= arguments["final_norm"]
    return {key: arguments[key] for key in SHAPE + (POOLING if weights.kind == "classifier" else ())}


def _comparable(weights: Weights, arguments: Mapping[str, Any], has_head: bool) -> dict[str, Any]:
    """Leave out what is only assumed about a file, and the pooling before a head that the model does not take."""
    unknown = set() if has_head else {"global_pool"}
    if not weights.stored:
        unknown |= {"num_heads"} | ({"global_pool"} if arguments.get("global_pool") == "avg" else set())
    return {key: value for key, value in arguments.items() if key not in unknown}


# -------------------- tensors


def convert_weights(model: VisionTransformer, depth: int, source: Source, name: str = "") -> State:
    """Return the tensors that timm's model loads from a file or state dict in any layout, for its own image size.

    A head for another number of classes is left out, with a line in the log, and so is ADDP's norm on the patches,
    unless the model has `pre_norm`. The model's own tensors take the place of a norm and head that the file lacks.

    Args:
        model: of timm, possibly without its last blocks and head.
        depth: the number of blocks that it was built with.
        source: as for `load_encoder`.
        name: of the file from which timm read a state dict.

    Raises:
        UserError: if the file has no encoder that timm's ViT can hold, or contradicts the model.
    """
    size = _pair(model.patch_embed.img_size)
    assert size is not None  # every ViT of timm with positions has one
    weights = read_weights(source, "classifier", image_size=size)
    weights = replace(weights, source=name or weights.source)
    wanted = {**_arguments_of(model), "depth": depth}
    skeleton = _skeleton(weights, wanted["pre_norm"])
    arguments, is_whole = _arguments(weights, skeleton), len(model.blocks) == depth
    has_head = weights.kind == "classifier" and skeleton.num_classes == model.num_classes
    arguments = _comparable(weights, arguments, has_head)
    if not is_whole:
        arguments = {key: value for key, value in arguments.items() if key in SHAPE}
    model_name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    refuse_contradictions(weights, model_name, wanted, arguments)
    loaded = _load(weights, source, size, wanted)
    _report(weights, skeleton, size, wanted["pre_norm"], has_head or model.num_classes == 0)
    state, _ = to_timm(loaded)
    if weights.kind != "classifier":  # the norm before the head is new
        state = {key: value for key, value in state.items() if not key.startswith("fc_norm.")}
    if not has_head:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    channels = model.patch_embed.proj.in_channels
    if channels != 3:
        log.warning("%s: fitted the patch embedding of 3 channels to %d", weights.source, channels)
        state["patch_embed.proj.weight"] = adapt_input_conv(channels, state["patch_embed.proj.weight"])
    own = model.state_dict()
    state |= {key: value for key, value in own.items() if key not in state and key.startswith(NEW)}
    return state if is_whole else {key: state[key] for key in own}


def as_vit(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rename the tensors of a classifier of ours, whose description timm dropped, to those of a ViT with its head."""
    if "encoder.patch_embed.proj.weight" not in state or "fc_norm.weight" not in state:
        return state
    return {
        key.removeprefix("encoder.").replace("tokenizer_norm.", "norm_pre."): value
        for key, value in state.items()
        if not key.startswith("encoder.norm.")  # which classifiers do not use
    }


def _load(weights: Weights, source: Source, size: tuple[int, int], wanted: Mapping[str, Any]) -> Classifier:
    """Load the classifier or encoder of a file for this image size; heads that it does not store are timm's."""
    heads = None if weights.stored else wanted["num_heads"]
    with renaming_keys({"tokenizer_norm": "pre_norm", "encoder_heads": "num_heads"}):
        if weights.kind == "classifier":
            normalisation: Any = "imagenet" if weights.assumes("normalisation") else None
            return load_classifier(source, size, encoder_heads=heads, normalisation=normalisation)
        return Classifier(load_encoder(source, size, encoder_heads=heads, tokenizer_norm=wanted["pre_norm"]), 0)


def _report(weights: Weights, model: Classifier, size: tuple[int, int], keeps_norm: bool, keeps_head: bool) -> None:
    """Say what of a file the model does not have, and that a classifier was trained at another image size."""
    encoder = encoder_architecture(weights)
    assert isinstance(encoder, EncoderArchitecture)  # `_skeleton` has checked it
    if encoder.encoder.tokenizer_norm and not (keeps_norm or encoder.encoder.pre_norm):
        note = "left out its norm on the patches, as the published transfers do; pre_norm=True keeps it"
        log.warning("%s: %s", weights.source, note)
    if not keeps_head and model.num_classes:
        log.warning("%s: left out its head for %d classes", weights.source, model.num_classes)
    elif model.num_classes and encoder.image_size != size:
        note = "a classifier of %d x %d px images: resampled its positions to %d x %d px"
        log.warning(f"%s: {note}", weights.source, *encoder.image_size, *size)


def _arguments_of(model: VisionTransformer) -> dict[str, Any]:
    """Return the arguments that a model of timm was built with, as far as files fix them; `depth` may have changed."""
    has_fc_norm, has_norm = (not isinstance(norm, nn.Identity) for norm in (model.fc_norm, model.norm))
    height, width = model.patch_embed.patch_size
    first: Any = model.blocks[0]
    return {
        "patch_size": height if height == width else (height, width),
        "embed_dim": model.embed_dim,
        "num_heads": first.attn.num_heads,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "init_values": None if isinstance(first.ls1, nn.Identity) else 1.0,
        "global_pool": model.global_pool,
        "fc_norm": has_fc_norm,
        "final_norm": has_norm or has_fc_norm,
    }
