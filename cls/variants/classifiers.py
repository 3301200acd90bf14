"""The classifiers that `addp robustness` evaluates: ours, foreign ViTs with their heads, and any model of timm.

model=runs/ft                                    a run of `addp finetune` or `addp linprobe`, or its model file
model=mae_finetuned_vit_base.pth                 a ViT with its head: MAE's, BEiT's, timm's (last.pth.tar)
model=timm:resnet50.a1_in1k                      a model of timm with its published weights
model=timm:vit_base_patch16_224 checkpoint=FILE  the same architecture with the weights of a file
model=FOLDER                                     a folder that timm exports (`local-dir:` and `addp export`)
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import nn

from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.paths import expand_home
from addp_core.networks.classifier import RGB
from addp_core.training.processes import process_state
from addp_core.weights.architectures import NORMALISATION
from addp_core.weights.assumptions import settle
from addp_core.weights.files import MODEL_FILE, State, first_line, read_file
from addp_core.weights.loading import load_classifier
from cls import registry as registry  # model=timm:addp_vit_... are names that it registers
from cls.data import classifier_crop
from cls.variants.recipe import Recipe

log = logging.getLogger("addp")

TIMM = "timm:"
LOCAL_FOLDER = "local-dir:"  # timm's own prefix
TIMM_CONFIG = "config.json"  # in such a folder
OWN_MODELS = "addp_"  # timm's names for our encoder


@dataclass(frozen=True)
class EvaluatedClassifier:
    """A classifier in eval mode, and how its images are prepared."""

    title: str  # for the report
    model: nn.Module  # normalized images Float[B,3,h,w] -> logits Float[B,classes]
    classes: int
    class_names: tuple[str, ...]  # one for each class, or none if they are unknown
    hw: tuple[int, int]
    crop: float  # fraction of the shorter side
    mean: RGB
    std: RGB
    interface: tuple[Any, ...]  # what else decides about its logits, besides its weights and class names


def open_classifier(recipe: Recipe) -> EvaluatedClassifier:
    """Load the classifier that the recipe names. Raises UserError if it cannot be read or has no trained head."""
    name = recipe.model.removeprefix(TIMM)
    folder = expand_home(name.removeprefix(LOCAL_FOLDER))
    if name.startswith(LOCAL_FOLDER) or (folder / TIMM_CONFIG).is_file():
        if recipe.checkpoint:
            raise UserError(f"checkpoint: {folder} holds its own weights; leave the key out")
        return _timm_classifier(recipe, f"{LOCAL_FOLDER}{folder}", _weights_of_folder(folder))
    if recipe.model.startswith(TIMM):
        _check_timm_name(name)
        return _timm_classifier(recipe, name, recipe.checkpoint)
    if recipe.checkpoint:
        raise UserError(
            f"checkpoint: found {recipe.checkpoint} beside model={recipe.model}; expected model=timm:<name> with it, "
            "or the file itself as model="
        )
    return _own_classifier(recipe)


def _own_classifier(recipe: Recipe) -> EvaluatedClassifier:
    """Load a classifier that `load_classifier` reads."""
    model = load_classifier(
        recipe.model,
        recipe.size,
        encoder_heads=recipe.encoder_heads,
        normalisation=recipe.normalisation,
        weights=recipe.weights,
    )
    hw, crop = model.encoder.image_size, classifier_crop(model, recipe.crop)
    interface: tuple[Any, ...] = (model.pooling, model.norm)
    interface += () if model.feature_norm == "none" else (model.feature_norm,)
    interface += () if recipe.encoder_heads is None else (f"{recipe.encoder_heads} heads",)
    names, mean, std = model.class_names, model.mean, model.std
    return EvaluatedClassifier(recipe.model, model, model.num_classes, names, hw, crop, mean, std, interface)


# -------------------- timm


def _timm_classifier(recipe: Recipe, name: str, checkpoint: str) -> EvaluatedClassifier:
    """Build a model of timm, with the weights of `checkpoint`, or without one those that timm publishes.

    Normalization, crop and size are those of timm's `pretrained_cfg`, unless the recipe sets them.
    """
    if recipe.encoder_heads is not None:
        raise UserError(f"encoder_heads: the name of {recipe.model} says it; leave the key out")
    model: Any = _load_timm_file(recipe, name, checkpoint) if checkpoint else _load_published(recipe, name)
    cfg = model.pretrained_cfg
    data = resolve_model_data_config(model, use_test_size=not cfg.get("fixed_input_size"))
    height, width = data["input_size"][1:] if recipe.size is None else (recipe.size, recipe.size)
    crop = data["crop_pct"] if recipe.crop is None else recipe.crop
    mean, std = NORMALISATION[recipe.normalisation] if recipe.normalisation else map(tuple, (data["mean"], data["std"]))
    if process_state().is_main_process:
        log.info(
            "model: images of %d x %d px, central crop %g, mean %s, std %s, as timm has them for %s or the recipe sets "
            "them (size, crop, normalisation)",
            *(height, width, crop, mean, std, f"{cfg['architecture']}.{cfg.get('tag', '')}".rstrip(".")),
        )
        for key, supported in (("interpolation", "bicubic"), ("crop_mode", "center")):
            if data[key] != supported:
                log.warning(
                    "model: timm evaluates %s with %s=%s, and here it is %s: results can differ slightly",
                    *(name, key, data[key], supported),
                )
    return EvaluatedClassifier(
        recipe.model + (f" ({checkpoint})" if recipe.checkpoint else ""),
        model.eval(),
        model.num_classes,
        () if recipe.checkpoint else _label_names(cfg, model.num_classes, name),
        (height, width),
        crop,
        mean,
        std,
        (cfg["architecture"], getattr(model, "global_pool", "")),
    )


def _label_names(cfg: dict[str, Any], classes: int, name: str) -> tuple[str, ...]:
    """Return the class names that timm's configuration of a model has, or none.

    Raises UserError if they are not as many as the model has classes.
    """
    names = cfg.get("label_names") or ()
    if isinstance(names, dict):  # by the number of the class
        names = [names[number] for number in sorted(names, key=int)]
    if names and len(names) != classes:
        raise UserError(f"model: {name} has {len(names)} label_names for {classes} classes; expected one for each")
    return tuple(map(str, names))


def _check_timm_name(name: str) -> None:
    """Raise UserError if timm has no model of this name, with or without a tag for its weights."""
    architecture, _, tag = name.partition(".")
    if architecture.startswith(OWN_MODELS):
        raise UserError(f"model: {TIMM}{name} is our own encoder; expected its run or file as model=")
    if not timm.is_model(architecture):
        raise UserError(
            f"model: timm has no model {architecture!r}{did_you_mean(architecture, timm.list_models())}; expected "
            "timm:<name>, with or without .<tag of its weights>"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(f"model: {architecture} of timm has no weights {tag!r}; expected one of {', '.join(tags)}")


def _weights_of_folder(folder: Path) -> str:
    """Return the path of the weights in a folder that timm exported. Raises UserError if it is none."""
    try:
        config = json.loads((folder / TIMM_CONFIG).read_text(encoding="utf-8"))
        architecture = config["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model: {folder} has no {TIMM_CONFIG} that names an architecture of timm") from error
    _check_timm_name(architecture)
    path = next((folder / file for file in (MODEL_FILE, "pytorch_model.bin") if (folder / file).is_file()), None)
    if path is None:
        raise UserError(f"model: {folder} has no {MODEL_FILE} beside its {TIMM_CONFIG}")
    return str(path)


def _load_published(recipe: Recipe, name: str) -> nn.Module:
    """Return a model with the weights that timm publishes. Raises UserError if there are none, or none with a head."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(f"model: timm has no weights for {name}; expected checkpoint=<file> with it")
    if not cfg.num_classes:
        raise UserError(f"model: timm's weights of {name} have no head; expected checkpoint=<fine-tuned file> with it")
    if recipe.weights:
        raise UserError(f"weights: {recipe.model} has one set of weights; leave the key out")
    try:
        return _create(name, recipe.size, pretrained=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:  # no network, mostly
        raise UserError(
            f"model: the weights of {recipe.model} cannot be loaded ({first_line(error)}); expected a reachable hub, "
            "or checkpoint=<file> with it"
        ) from error


def _load_timm_file(recipe: Recipe, name: str, checkpoint: str) -> nn.Module:
    """Return a model with the weights of a file, every one of them.

    Raises UserError if the file has no head, or does not fit.
    """
    file = read_file(checkpoint, recipe.weights)
    settle(file.source, file.assumptions, ("weights",))
    pooling = {"global_pool": "avg"} if "fc_norm.weight" in file.state else {}  # MAE's ViTs; says timm's class for ViTs
    try:
        model = _create(name, recipe.size, **pooling)
        state = _timm_names(model, file.state)
        classes = _classes_of_head(model, state, file.source)
        if classes != model.num_classes:
            model = _create(name, recipe.size, num_classes=classes, **pooling)
            state = _timm_names(model, file.state)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise UserError(f"{file.source}: does not fit {name} of timm ({first_line(error)})") from error
    _fill(model, state, name, file.source)
    positions = file.state.get("pos_embed")
    if positions is not None and positions.shape != model.pos_embed.shape and process_state().is_main_process:
        log.warning(
            "%s: its %d positions were resampled to the %d of %s; set size= to its own size in pixels to keep them",
            *(file.source, positions.shape[1], model.pos_embed.shape[1], name),
        )
    return model


def _create(name: str, size: int | None, **options: Any) -> Any:
    """Call timm.create_model, with `img_size` where the architecture knows it."""
    if size is not None:
        try:
            return timm.create_model(name, img_size=size, **options)
        except TypeError as error:  # a network without positions takes images of any size
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, **options)


def _timm_names(model: nn.Module, state: State) -> State:
    """Convert the tensors of a file as timm does for the weights that it publishes."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return dict(convert(dict(state), model)) if convert else dict(state)


def _classes_of_head(model: Any, state: State, source: str) -> int:
    """Return the number of classes of the head in a file. Raises UserError if it has none."""
    classifier = model.pretrained_cfg["classifier"]
    names = [f"{name}.weight" for name in ([classifier] if isinstance(classifier, str) else classifier)]
    if names[0] not in state:
        raise UserError(f"{source}: has no head ({names[0]}); expected a fine-tuned classifier")
    return len(state[names[0]])


def _fill(model: nn.Module, state: State, name: str, source: str) -> None:
    """Copy the tensors into the model. Raises UserError if one is missing, left over or of another shape."""
    own = model.state_dict()
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "mis-shaped": [key for key in own if key in state and state[key].shape != own[key].shape],
    }
    found = "; ".join(f"{len(keys)} {fault}: {_first(keys)}" for fault, keys in faults.items() if keys)
    if found:
        raise UserError(f"{source}: does not fit {name} of timm: {found}; expected the name that it was trained with")
    model.load_state_dict(state)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
