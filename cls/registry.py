"""The encoder as timm models: `timm.create_model("addp_vit_base_patch16", ...)`, also tiny, small and large.

`checkpoint_path` accepts every file of safetensors or plain tensors that `load_encoder` reads, and `pretrained=True`
loads the published weights of ViT-B and ViT-L; both work with `features_only=True` too. The new head keeps its initial
weights if the file has no head or one that does not fit.
"""

import logging
from typing import Any, cast

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from addp_core.networks.classifier import Classifier, Pooling
from addp_core.networks.encoder import VIT_SIZES, Encoder, EncoderConfig
from addp_core.weights.encoders import load_encoder
from addp_core.weights.files import Source, strip_prefix
from addp_core.weights.layouts.published import encoder_tensors

log = logging.getLogger("addp")

HUB_REPOSITORY = "Changyao/ADDP"  # of the authors


def _cfg(**options: Any) -> dict[str, Any]:
    """Return timm's description of a pretrained model."""
    return {
        "input_size": (3, 224, 224),
        "num_classes": 0,  # the published files have no head
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "encoder.patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2306.05423",
        **options,
    }


def _published_cfg(filename: str) -> dict[str, Any]:
    return _cfg(hf_hub_id=HUB_REPOSITORY, hf_hub_filename=filename, custom_load="hf")


default_cfgs = generate_default_cfgs(
    {
        "addp_vit_tiny_patch16": _cfg(),
        "addp_vit_small_patch16": _cfg(),
        "addp_vit_base_patch16": _published_cfg("addp-vit-base-16.pth"),
        "addp_vit_large_patch16": _published_cfg("addp-vit-large-16.pth"),
    }
)


class TimmClassifier(Classifier):
    """A `Classifier` with the constructor that timm expects, which loads state dicts in any layout."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pooling = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        pre_norm: bool = False,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
    ):
        """Build the model from timm's names for the arguments of `Encoder` and `Classifier`.

        `pre_norm` is ADDP's `tokenizer_norm`; `drop_rate` is a dropout before the head. Raises ValueError unless there
        are three channels.
        """
        if in_chans != 3:
            raise ValueError(f"in_chans: found {in_chans}, expected 3")
        config = EncoderConfig(embed_dim, depth, num_heads, proj_drop_rate, drop_path_rate, pre_norm, proj_drop_rate)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        encoder = Encoder(config, (height, width), patch_size, dynamic=dynamic_img_size)
        super().__init__(encoder, num_classes, global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.register_load_state_dict_pre_hook(_convert_state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens Float[B,1+N,W] -> logits Float[B,classes], or with `pre_logits` the input of the head, Float[B,W]."""
        x = self.head_drop(super().forward_head(x, pre_logits=True))
        return x if pre_logits else self.head(x)

    def load_pretrained(self, path: str) -> None:
        """Load the encoder from a file in any layout, for timm; the head is unchanged.

        Raises UserError like `load_encoder`.
        """
        self.encoder.load_state_dict(_load_same_encoder(self, path).state_dict())


def _load_same_encoder(model: TimmClassifier, source: Source) -> nn.Module:
    """Return the encoder of a file or state dict, with the size and options of the model's encoder."""
    config = model.encoder.config
    return load_encoder(
        source, model.encoder.image_size, encoder_heads=config.heads, tokenizer_norm=config.tokenizer_norm
    )


def _convert_state(model: TimmClassifier, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Convert a state dict of another layout or image size, in place, before the model loads it.

    A head that does not fit is dropped with a warning, and the model's own head is kept.
    """
    if prefix:
        return
    own_state = model.state_dict()
    loaded = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    has_our_names = len(loaded) < len(state)
    head = {key: value for key, value in own_state.items() if not key.startswith("encoder.")}
    if has_our_names and all(key in loaded and loaded[key].shape == value.shape for key, value in head.items()):
        head = loaded
    elif "head.weight" in loaded:
        log.warning("dropping the checkpoint's head for %d classes", len(loaded["head.weight"]))
    if has_our_names and state["encoder.pos_embed"].shape == own_state["encoder.pos_embed"].shape:
        encoder = {key: value for key, value in state.items() if key.startswith("encoder.")}
    else:
        tensors = strip_prefix(state, "encoder.") if has_our_names else encoder_tensors(state)
        converted = _load_same_encoder(model, tensors).state_dict()
        encoder = {f"encoder.{key}": value for key, value in converted.items()}
    state.clear()
    state.update(head, **encoder)


def _convert_features_state(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Convert a state dict as `_convert_state` does, for `features_only`.

    timm then holds the model, without its later parts, as `wrapper.model`.
    """
    if prefix or any(key.startswith("model.") for key in state):
        return
    _convert_state(cast(TimmClassifier, wrapper.model), state, "")
    converted = {f"model.{key}": value for key, value in state.items()}
    state.clear()
    state.update({key: converted[key] for key in wrapper.state_dict() if key in converted})


def _build(name: str, size: str, pretrained: bool, **options: Any) -> nn.Module:
    config = VIT_SIZES[size]
    shape = {"embed_dim": config["width"], "depth": config["depth"], "num_heads": config["heads"]}
    features = {"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"}
    model = build_model_with_cfg(TimmClassifier, name, pretrained, feature_cfg=features, **{**shape, **options})
    if options.get("features_only"):
        model.register_load_state_dict_pre_hook(_convert_features_state)
    return model


@register_model
def addp_vit_tiny_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ADDP's encoder, 192 wide, 12 blocks."""
    return _build("addp_vit_tiny_patch16", "tiny", pretrained, **kwargs)


@register_model
def addp_vit_small_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ADDP's encoder, 384 wide, 12 blocks."""
    return _build("addp_vit_small_patch16", "small", pretrained, **kwargs)


@register_model
def addp_vit_base_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ADDP's ViT-B: 768 wide, 12 blocks."""
    return _build("addp_vit_base_patch16", "base", pretrained, **kwargs)


@register_model
def addp_vit_large_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ADDP's ViT-L: 1024 wide, 24 blocks."""
    return _build("addp_vit_large_patch16", "large", pretrained, **kwargs)
