"""The encoder in timm: `timm.create_model("addp_vit_base_patch16", ...)`, also tiny, small and large.

`checkpoint_path` takes any file of safetensors or plain tensors that `load_encoder` reads, and `pretrained=True` the
published weights of ViT-B and ViT-L, both also with `features_only=True`. A file without a head, or with one that does
not fit, leaves the new one as it is.
"""

import logging
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import VIT_SIZES, Encoder, EncoderConfig
from addp_core.weights.encoders import load_encoder
from addp_core.weights.files import strip_prefix
from addp_core.weights.layouts.published import encoder_tensors

log = logging.getLogger("addp")

HUB = "Changyao/ADDP"  # the authors' repository


def _cfg(**published: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "num_classes": 0,  # of the published files
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "encoder.patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2306.05423",
        **published,
    }


default_cfgs = generate_default_cfgs(
    {
        "addp_vit_tiny_patch16": _cfg(),
        "addp_vit_small_patch16": _cfg(),
        "addp_vit_base_patch16": _cfg(hf_hub_id=HUB, hf_hub_filename="addp-vit-base-16.pth", custom_load="hf"),
        "addp_vit_large_patch16": _cfg(hf_hub_id=HUB, hf_hub_filename="addp-vit-large-16.pth", custom_load="hf"),
    }
)


class TimmClassifier(Classifier):
    """A `Classifier` as timm builds its models, that reads foreign state dicts."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        pre_norm: bool = False,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
    ):
        """timm's names for the options of `Encoder` and `Classifier`; `pre_norm` is ADDP's `tokenizer_norm`,
        `drop_rate` acts before the head.

        ValueError for other than three channels.
        """
        if in_chans != 3:
            raise ValueError(f"in_chans: found {in_chans}, expected 3")
        config = EncoderConfig(embed_dim, depth, num_heads, proj_drop_rate, drop_path_rate, pre_norm, proj_drop_rate)
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        super().__init__(Encoder(config, size, patch_size, dynamic=dynamic_img_size), num_classes, global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.register_load_state_dict_pre_hook(_read_foreign)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens Float[B,1+N,W] -> logits Float[B,classes], or what the head sees, Float[B,W]."""
        x = self.head_drop(super().forward_head(x, pre_logits=True))
        return x if pre_logits else self.head(x)

    def load_pretrained(self, path: str) -> None:
        """timm's: the encoder of a file in any layout; the head stays as it is. UserError as `load_encoder`."""
        config = self.encoder.config
        read = load_encoder(
            path, self.encoder.image_size, encoder_heads=config.heads, tokenizer_norm=config.tokenizer_norm
        )
        self.encoder.load_state_dict(read.state_dict())


def _read_foreign(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: other layouts and sizes under this model's names; a head that does not fit is dropped,
    and said to be.
    """
    if prefix:
        return
    own, config = model.state_dict(), model.encoder.config
    given = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    ours = len(given) < len(state)
    rest = {key: value for key, value in own.items() if not key.startswith("encoder.")}
    if ours and all(key in given and given[key].shape == value.shape for key, value in rest.items()):
        rest = given
    elif "head.weight" in given:
        log.warning("the checkpoint's head for %d classes is dropped", len(given["head.weight"]))
    if ours and state["encoder.pos_embed"].shape == own["encoder.pos_embed"].shape:
        encoder = {key: value for key, value in state.items() if key.startswith("encoder.")}
    else:
        part = strip_prefix(state, "encoder.") if ours else encoder_tensors(state)
        options = {"encoder_heads": config.heads, "tokenizer_norm": config.tokenizer_norm}
        read = load_encoder(part, model.encoder.image_size, **options)
        encoder = {f"encoder.{key}": value for key, value in read.state_dict().items()}
    state.clear()
    state.update(rest, **encoder)


def _read_features(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The same for `features_only`, where timm holds the model, without its later parts, as `wrapper.model`."""
    if prefix or any(key.startswith("model.") for key in state):
        return
    _read_foreign(wrapper.model, state, "")
    read = {f"model.{key}": value for key, value in state.items()}
    state.clear()
    state.update({key: read[key] for key in wrapper.state_dict() if key in read})


def _build(name: str, size: str, pretrained: bool, **options: Any) -> nn.Module:
    config = VIT_SIZES[size]
    shape = {"embed_dim": config["width"], "depth": config["depth"], "num_heads": config["heads"]}
    features = {"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"}
    model = build_model_with_cfg(TimmClassifier, name, pretrained, feature_cfg=features, **{**shape, **options})
    if options.get("features_only"):
        model.register_load_state_dict_pre_hook(_read_features)
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
