"""ResNets of timm and torchvision, and our CNNs as timm's plain models."""

from collections.abc import Mapping
from typing import Any, cast

import timm
import torch
from torch import nn

from addp_core.networks.classifier import Classifier
from addp_core.networks.cnn import CnnArchitecture, CnnConfig, CnnEncoder
from addp_core.weights.architectures import NORMALISATION, ClassifierArchitecture
from addp_core.weights.assumptions import Assumption, Hints
from addp_core.weights.files import State
from addp_core.weights.layouts.shapes import depth_of, has_tensors, require_tensors
from addp_core.weights.layouts.vit import fold_batch_norm

DEFAULT_SIZE = 224  # pixels; a CNN takes any size
RESNETS: dict[tuple[tuple[int, ...], bool], str] = {  # (blocks of each stage, whether bottlenecks) -> timm's name
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
STAGES = tuple(f"layer{number}." for number in range(1, 5))

is_resnet = has_tensors("conv1.weight", "bn1.weight", *(f"{stage}0.conv1.weight" for stage in STAGES))
has_head = has_tensors("fc.weight", "fc.bias")


def is_resnet_classifier(state: Mapping[str, Any]) -> bool:
    """Check whether a state dict is a ResNet with its head."""
    return is_resnet(state) and has_head(state)


def convert_resnet(source: str, state: State, hints: Hints) -> tuple[State, CnnArchitecture]:
    """Convert a ResNet of timm, torchvision or MoCo; its head is dropped.

    Raises ValueError if it is none of `RESNETS`.
    """
    blocks = tuple(depth_of(state, stage) for stage in STAGES)
    name = RESNETS.get((blocks, "layer1.0.conv3.weight" in state))
    if name is None:
        known = ", ".join(RESNETS.values())
        raise ValueError(f"a ResNet with {', '.join(map(str, blocks))} blocks in its stages; expected {known}")
    ours = {f"body.{key}": value for key, value in state.items() if key.startswith(("conv1.", "bn1.", *STAGES))}
    config = CnnConfig(name)
    for key, value in CnnEncoder(config, (DEFAULT_SIZE, DEFAULT_SIZE)).state_dict().items():
        if key.endswith("num_batches_tracked"):  # which old files lack
            ours.setdefault(key, value)
    return ours, CnnArchitecture(config, hints.image_size or (DEFAULT_SIZE, DEFAULT_SIZE))


def convert_resnet_classifier(source: str, state: State, hints: Hints) -> tuple[State, ClassifierArchitecture]:
    """Convert a ResNet of timm or torchvision with its head. Raises ValueError like `convert_resnet`."""
    encoder_state, encoder = convert_resnet(source, state, hints)
    require_tensors(source, state, ("fc.weight", "fc.bias"))
    ours = {f"encoder.{key}": value for key, value in encoder_state.items()}
    ours |= {"head.weight": state["fc.weight"], "head.bias": state["fc.bias"]}
    mean, std = NORMALISATION["imagenet"]
    note = "does not store how its images were normalized; took ImageNet's mean and std"
    hints.assumptions.append(Assumption("normalisation", note, "normalisation=half takes 0.5"))
    return ours, ClassifierArchitecture(encoder, len(state["fc.weight"]), "avg", "none", (), mean, std)


def cnn_to_timm(model: Classifier) -> tuple[State, str]:
    """Return a classifier (or, with 0 classes, an encoder) over a CNN as timm's plain model: its tensors and its name.

    Raises ValueError if timm's model has layers between its last stage and its head.
    """
    encoder = model.encoder
    assert isinstance(encoder, CnnEncoder)
    arch = encoder.config.arch
    if model.feature_norm != "none":
        raise ValueError(f"timm's {arch} has no norm on its pooled features; addp export layout=onnx holds it")
    with torch.device("meta"):
        plain: Any = timm.create_model(arch, num_classes=model.num_classes)
    state = {key: value.detach().cpu().clone() for key, value in cast(nn.Module, encoder.body).state_dict().items()}
    if model.num_classes:
        head = fold_batch_norm(model) if model.norm == "batch" else dict(model.head.named_parameters())
        name = plain.pretrained_cfg["classifier"]
        state |= {f"{name}.{key}": value.detach().cpu().clone() for key, value in head.items()}
    if others := sorted(plain.state_dict().keys() - state.keys()):
        raise ValueError(
            f"timm's {arch} has more layers between its last stage and its head ({', '.join(others[:3])}); "
            "addp export layout=onnx holds this one"
        )
    return state, arch
