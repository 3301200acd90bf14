"""Entry points of torch.hub: `torch.hub.load(<owner>/<repository of this project>, "addp", "hf://owner/name")`.

From a checkout: `torch.hub.load("<folder>", "encoder", "zoo:cifar10", source="local")`. A checkpoint is a file, a run
folder, zoo:<name>, or hf://owner/repository[/file].
"""

from typing import Any

from torch import nn

dependencies = [
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "pydantic",
    "yaml",
    "numpy",
]


def addp(checkpoint: str, **options: Any) -> nn.Module:
    """Load a whole ADDP for generation; `options` are those of `addp_core.load_addp`."""
    from addp_core import load_addp

    return load_addp(checkpoint, **options)


def encoder(checkpoint: str, img_size: Any = None, **options: Any) -> nn.Module:
    """Load an encoder for recognition; `options` are those of `addp_core.load_encoder`."""
    from addp_core import load_encoder

    return load_encoder(checkpoint, img_size, **options)


def classifier(checkpoint: str, **options: Any) -> nn.Module:
    """Load a fine-tuned classifier; `options` are those of `addp_core.load_classifier`."""
    from addp_core import load_classifier

    return load_classifier(checkpoint, **options)


def tokenizer(checkpoint: str) -> nn.Module:
    """Load the VQGAN of a file."""
    from addp_core import load_tokenizer

    return load_tokenizer(checkpoint)


def predictor(checkpoint: str, **options: Any) -> nn.Module:
    """Load the token predictor of a file; `options` are those of `addp_core.load_predictor`."""
    from addp_core import load_predictor

    return load_predictor(checkpoint, **options)


def addp_vit_base_patch16(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ADDP's ViT-B as a model of timm; `pretrained` loads the authors' weights."""
    return _timm_model("addp_vit_base_patch16", pretrained, options)


def addp_vit_large_patch16(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ADDP's ViT-L as a model of timm; `pretrained` loads the authors' weights."""
    return _timm_model("addp_vit_large_patch16", pretrained, options)


def _timm_model(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    import cls  # noqa: F401 (registers the name)

    return timm.create_model(name, pretrained=pretrained, **options)
