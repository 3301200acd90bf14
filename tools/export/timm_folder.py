"""layout=timm: a folder for `timm.create_model`."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from addp_core.base.files import atomic_replace, write_atomically
from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.encoder import VIT_SIZES
from addp_core.weights.files import MODEL_FILE
from addp_core.weights.layouts.cnn import cnn_to_timm
from addp_core.weights.layouts.vit import to_timm
from cls.data import classifier_crop
from tools.export.compare import check_equal, load_exported, random_images, removed_on_failure
from tools.export.recipe import Recipe

CONFIG_FILE = "config.json"  # where timm looks for it


def export_timm(recipe: Recipe, out: Path) -> None:
    """Write a folder of model.safetensors and config.json.

    timm loads it with `timm.create_model("local-dir:<folder>", pretrained=True)` or, from the Hugging Face Hub, with
    "hf-hub:<owner>/<name>".
    """
    model = load_exported(recipe)
    is_cnn = isinstance(model.encoder, CnnEncoder)
    arguments: dict[str, Any] = {}
    if is_cnn:
        state, name = cnn_to_timm(model)
    else:
        state, arguments = to_timm(model)
        name = f"vit_{_size_name(model.embed_dim)}_patch16_224"  # every part of which the arguments replace
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None  # timm has a configuration for each of its models
    height, width = model.encoder.image_size
    config = {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.embed_dim,
        "global_pool": model.pooling,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "tag": "addp",
            "custom_load": False,
            "input_size": [3, height, width],
            "fixed_input_size": not is_cnn,
            "interpolation": "bicubic",
            "crop_pct": classifier_crop(model),
            "crop_mode": "center",
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": cfg.first_conv,
            "classifier": cfg.classifier,
        },
    }
    if model.class_names:
        config["label_names"] = list(model.class_names)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_replace(out / MODEL_FILE) as temporary:
        save_file({key: value.contiguous() for key, value in state.items()}, temporary, metadata={"format": "pt"})
    write_atomically(out / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    again: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with removed_on_failure(out / MODEL_FILE, out / CONFIG_FILE), torch.inference_mode():
        images = random_images(model, 2)
        features = again.forward_features(images)
        tokens = features.flatten(2).transpose(1, 2) if is_cnn else features
        check_equal(out, "tokens", model.forward_features(images), tokens)
        check_equal(out, "logits" if model.num_classes else "pooled features", model(images), again(images))


def _size_name(width: int) -> str:
    return next((name for name, size in VIT_SIZES.items() if size["width"] == width), "base")
