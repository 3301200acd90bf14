"""The encoder as timm models: `timm.create_model("addp_vit_base_patch16", ...)`, also tiny, small and large.

They are timm's own `VisionTransformer` with the pooling and initialization of App. D.2. `checkpoint_path` takes files
in every layout that `load_encoder` reads; `pretrained=True` loads the published weights of ViT-B and ViT-L, or with
`pretrained_cfg_overlay={"file": ...}` any file or run folder. `addp_vit` takes its whole architecture from such a file.
"""

import inspect
import logging
import os
from collections.abc import Mapping
from typing import Any, cast

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from addp_core.base.errors import UserError, renaming_keys
from addp_core.networks.classifier import init_head
from addp_core.networks.encoder import METADATA_KEY, VIT_SIZES
from addp_core.networks.layers import INIT_STD, init_transformer
from addp_core.weights.files import MODEL_FILE
from addp_core.weights.stated import describe_vit
from cls.timm_weights import TimmFile, as_vit, convert_weights, describe_file

log = logging.getLogger("addp")

HUB_REPOSITORY = "Changyao/ADDP"  # of the authors
ANY_SIZE = "addp_vit"  # the name whose architecture is that of its file


def _cfg(**options: Any) -> dict[str, Any]:
    """Return timm's description of a pretrained model."""
    return {
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "num_classes": 0,  # the published files have no head
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2306.05423",
        **options,
    }


def _published_cfg(filename: str) -> dict[str, Any]:
    return _cfg(hf_hub_id=HUB_REPOSITORY, hf_hub_filename=filename, custom_load="hf")


default_cfgs = generate_default_cfgs(
    {
        ANY_SIZE: _cfg(),
        "addp_vit_tiny_patch16": _cfg(),
        "addp_vit_small_patch16": _cfg(),
        "addp_vit_base_patch16": _published_cfg("addp-vit-base-16.pth"),
        "addp_vit_large_patch16": _published_cfg("addp-vit-large-16.pth"),
    }
)


class EncoderForTimm(VisionTransformer):
    """timm's ViT with average pooling before its norm, our initialization, and state dicts in any layout."""

    def __init__(self, global_pool: Any = "avg", fc_norm: bool | None = True, depth: int = 12, **options: Any):
        """Build the model; `options` are further arguments of timm's `VisionTransformer`."""
        super().__init__(global_pool=global_pool, fc_norm=fc_norm, depth=depth, **options)
        self.depth = depth  # before timm prunes blocks
        self.file: TimmFile | None = None  # whose tensors timm loads next, without its metadata
        self.register_state_dict_post_hook(describe_vit)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialize as `Encoder` and `Classifier` do, or as timm does if the caller chose a `weight_init`."""
        if mode or getattr(self, "weight_init_mode", ""):
            super().init_weights(mode)
            return
        for module in self.modules() if needs_reset else ():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        init_transformer(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as a linear layer on the patch
        for token in (self.pos_embed, self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=INIT_STD)
        if isinstance(self.head, nn.Linear):
            init_head(self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one with small random weights; with 0 classes, by none."""
        super().reset_classifier(num_classes, global_pool)
        if isinstance(self.head, nn.Linear):
            init_head(self.head)

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a file in any layout, or a run folder, for timm. Raises UserError like `convert_weights`."""
        super().load_state_dict(convert_weights(self, self.depth, checkpoint_path))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict, converted if it is one of another layout, image size or number of classes.

        Raises UserError like `convert_weights`.
        """
        return super().load_state_dict(self.convert(state_dict), strict, assign)

    def convert(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the tensors of a state dict in any layout under this model's names, of its shapes."""
        file, self.file = self.file, None
        own = self.state_dict()
        if all(key in own and own[key].shape == value.shape for key, value in state.items()):
            return state
        if file is None:
            return convert_weights(self, self.depth, as_vit(state))
        if file.metadata:
            state = {**state, METADATA_KEY: file.metadata}
        with renaming_keys({"state dict": file.source}):
            return convert_weights(self, self.depth, state, file.source)


def _convert_features_state(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Convert a state dict in place, as `EncoderForTimm` does, for the wrapper of timm's `features_only`.

    The wrapper holds the model, without its later parts, as `wrapper.model`.
    """
    if prefix or any(key.startswith("model.") for key in state):
        return
    converted = cast(EncoderForTimm, wrapper.model).convert(state)
    state.clear()
    state.update({f"model.{key}": value for key, value in converted.items()})


def _checkpoint_path() -> str:
    """Return the `checkpoint_path` of the running `timm.create_model`, or "".

    timm loads that file after it has built the model and tells a model's function nothing of it, so the only place that
    has it in time for the architecture is the frame of the caller.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not timm.create_model.__code__:
        frame = frame.f_back
    return "" if frame is None else os.fspath(frame.f_locals["checkpoint_path"] or "")


def _pretrained_file(cfg: Any, overlay: Mapping[str, Any]) -> str:
    """Return the file with which the caller replaces timm's pretrained weights, or ""."""
    entries = cfg if isinstance(cfg, Mapping) else getattr(cfg, "__dict__", {})
    if entries.get("source"):  # a folder or repository that timm wrote, with all arguments
        return ""
    return os.fspath(overlay.get("file") or entries.get("file") or "")


def _build(name: str, shape: Mapping[str, Any], pretrained: bool, **options: Any) -> nn.Module:
    """Build a model with the arguments of its name, of the caller and, for what they leave open, of its file."""
    features = {"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"}
    overlay = dict(options.pop("pretrained_cfg_overlay", None) or {})
    path, arguments, described = _checkpoint_path(), dict(shape), None
    file = path or _pretrained_file(options.get("pretrained_cfg"), overlay)
    if file:
        described = describe_file(file, name, {**shape, **options})
        arguments = {**described.arguments, **shape}
        cfg = described.cfg if name == ANY_SIZE else {k: v for k, v in described.cfg.items() if k != "input_size"}
        overlay = {**cfg, **overlay}
    if path and not os.path.isfile(path):
        in_folder = f"{path}/{MODEL_FILE}, or " if os.path.isdir(path) else ""
        raise UserError(
            f"checkpoint_path: found {path}, but timm reads files only; expected {in_folder}pretrained=True, "
            f"pretrained_cfg_overlay={{'file': '{path}'}} in its place"
        )
    if file and not path:
        overlay["custom_load"] = True  # by `load_pretrained`, which reads more than timm
        if not pretrained:
            log.warning("%s: took its architecture but not its weights, which pretrained=True loads", file)
    model = build_model_with_cfg(
        EncoderForTimm,
        name,
        pretrained,
        pretrained_cfg_overlay=overlay,
        feature_cfg=features,
        **{**arguments, **options},
    )
    inner: Any = getattr(model, "model", model)  # timm's `features_only` wraps the model
    inner.file = described if path else None
    if inner is not model:
        model.register_load_state_dict_pre_hook(_convert_features_state)
    model._model_args = arguments  # type: ignore[assignment]  # which timm stores when it saves the model
    return model


def _shape(size: str) -> dict[str, int]:
    """Return timm's arguments for a size."""
    config = VIT_SIZES[size]
    return {"patch_size": 16, "embed_dim": config["width"], "depth": config["depth"], "num_heads": config["heads"]}


@register_model
def addp_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ADDP's encoder as its file describes it; ViT-B without a file."""
    return _build(ANY_SIZE, {}, pretrained, **kwargs)


@register_model
def addp_vit_tiny_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ADDP's encoder, 192 wide, 12 blocks."""
    return _build("addp_vit_tiny_patch16", _shape("tiny"), pretrained, **kwargs)


@register_model
def addp_vit_small_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ADDP's encoder, 384 wide, 12 blocks."""
    return _build("addp_vit_small_patch16", _shape("small"), pretrained, **kwargs)


@register_model
def addp_vit_base_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ADDP's ViT-B: 768 wide, 12 blocks."""
    return _build("addp_vit_base_patch16", _shape("base"), pretrained, **kwargs)


@register_model
def addp_vit_large_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ADDP's ViT-L: 1024 wide, 24 blocks."""
    return _build("addp_vit_large_patch16", _shape("large"), pretrained, **kwargs)
