"""What a training states about its ViT beside the tensors: the options of timm's `train.py`, or the ViT itself."""

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.networks.classifier import RGB
from addp_core.networks.encoder import METADATA_KEY, VIT_SIZES

OWN_NAMES = {f"addp_vit_{size}_patch16": size for size in VIT_SIZES}  # of our encoder in timm
STATED_KIND = "vit"  # of these facts, where a state dict holds them
PLAIN = (bool, int, float, str)  # types of the options that can build a model


@dataclass(frozen=True)
class Stated:
    """Facts about a ViT that its tensors do not tell, as far as a checkpoint states them."""

    by: str = ""  # what states them, for messages
    width: int | None = None
    heads: int | None = None
    image_size: tuple[int, int] | None = None
    pooling: str = ""  # timm's `global_pool`
    mean: RGB | None = None  # of the images
    std: RGB | None = None
    crop: float | None = None  # share of the shorter side that validation crops

    def check_heads(self, source: str, given: int | None) -> None:
        """Raise UserError if the caller gives another number of heads."""
        if None not in (given, self.heads) and given != self.heads:
            raise UserError(
                f"encoder_heads={given}: {source} was trained with {self.heads} attention heads ({self.by}); leave the "
                "key out"
            )


def describe_vit(model: nn.Module, _state: Any, _prefix: str, metadata: dict[str, Any]) -> None:
    """Add the facts about a ViT of timm to the metadata of its state dict (`register_state_dict_post_hook`)."""
    stated = _stated_by(model, f"{type(model).__name__}'s metadata", {})
    metadata[METADATA_KEY] = json.dumps({"kind": STATED_KIND, "architecture": asdict(stated)})


def stated_by_training(metadata: Mapping[str, Any], state: Mapping[str, Tensor], described: Stated | None) -> Stated:
    """Return the facts that timm's `train.py` stores as `arch` and `args`, or none if they do not fit the tensors.

    Args:
        metadata: of the checkpoint.
        state: the tensors of the model.
        described: by the model itself, which is right about all but the images.
    """
    name, args = metadata.get("arch"), metadata.get("args")
    options = vars(args) if isinstance(args, Namespace) else args
    if not isinstance(name, str) or not isinstance(options, Mapping):
        return described or Stated()
    try:
        if described is not None:
            images = _images(options, {"mean": described.mean, "std": described.std, "crop_pct": described.crop})
            return replace(described, **images)
        stated = _stated_by_name(name, options)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, UserError, ValueError):
        return described or Stated()  # options of another version of timm, or of another program
    widths = {len(value) for key, value in state.items() if key.endswith("patch_embed.proj.weight")}
    return stated if widths == {stated.width} else Stated()


def _stated_by_name(name: str, options: Mapping[str, Any]) -> Stated:
    """Return the facts about a model of timm, or of the names that we register there, built with options."""
    given = {key: value for key, value in (options.get("model_kwargs") or {}).items() if _is_plain(value)}
    by = " ".join([f"arch {name}", *(f"num_heads={given[key]}" for key in ("num_heads",) if key in given)])
    given |= {} if options.get("gp") is None else {"global_pool": options["gp"]}
    if name in OWN_NAMES:
        size = VIT_SIZES[OWN_NAMES[name]]
        width, heads = given.get("embed_dim", size["width"]), given.get("num_heads", size["heads"])
        side = given.get("img_size", options.get("img_size") or 224)
        hw = (side, side) if isinstance(side, int) else (side[0], side[1])
        return Stated(by, width, heads, hw, given.get("global_pool", "avg"), **_images(options, {}))
    if not timm.is_model(name):
        return Stated()
    with torch.device("meta"):
        model = timm.create_model(name, **{"num_classes": 1} | given)
    return _stated_by(model, by, options)


def _stated_by(model: Any, by: str, options: Mapping[str, Any]) -> Stated:
    """Return the facts about a ViT of timm: its attributes and configuration, and the options of its training."""
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    heads, pooling = model.blocks[0].attn.num_heads, model.global_pool
    return Stated(by, model.embed_dim, heads, model.patch_embed.img_size, pooling, **_images(options, cfg))


def _images(options: Mapping[str, Any], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean, std and crop of the images of a training, by timm's rules."""
    data = resolve_data_config(dict(options), pretrained_cfg=dict(cfg))
    return {"mean": data["mean"], "std": data["std"], "crop": data["crop_pct"]}


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(x, PLAIN) for x in value))
