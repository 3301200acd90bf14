"""Writing what detectron2's own scripts load: model_final.pth, and the config.yaml that builds its model."""

from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from detectron2.config import CfgNode, LazyCall, LazyConfig, get_cfg, instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace, write_atomically
from addp_core.networks.cnn import CnnArchitecture, CnnEncoder
from addp_core.weights.fitting import AnyArchitecture, AnyEncoder
from addp_core.weights.pretrained import NORMALISATION
from det.config import DetectorArchitecture
from det.model import DETECTRON2_CONFIG, DETECTRON2_WEIGHTS, Detector
from det.native.backbone import EncoderBackbone
from det.native.config import (
    IMAGE_FORMAT,
    add_encoder_config,
    architecture_keys,
    build_cnn,
    build_encoder,
    encoder_options,
)
from det.native.lazy import mask_rcnn
from det.native.safe_lazy import lazy_encoder
from det.native.stages import EncoderStages, stage_mask_rcnn
from det.native.train_net import find_config


def write_detector(detector: Detector, out: Path) -> tuple[Tensor, Tensor]:
    """Write a detector of the engine detectron2 into a folder, with a LazyConfig like those of det/native/configs/.

    Returns the features of the written model and those of the detector, for comparison. Raises UserError for the engine
    torchvision.
    """
    if detector.architecture.engine != "detectron2":
        raise UserError(
            "model: a detector of engine=torchvision, whose anchors and RoIAlign detectron2 does not have; expected "
            "one that was trained with engine=detectron2"
        )
    rcnn = cast(Any, detector).rcnn
    architecture = detector.architecture
    encoder = (rcnn.backbone.net if architecture.cnn_encoder is None else rcnn.backbone.bottom_up).encoder
    cfg = LazyConfig.load(str(find_config("mask_rcnn_vitdet_b_100ep")))
    cfg.model = lazy_model(architecture, encoder.architecture)
    cfg.categories = [asdict(category) for category in architecture.categories]
    cfg.dataloader.train.mapper.use_instance_mask = architecture.masks
    _, scale, crop = cfg.dataloader.train.mapper.augmentations
    resize = cfg.dataloader.test.mapper.augmentations[0]
    size = architecture.size
    scale.target_height = scale.target_width = resize.short_edge_length = resize.max_size = size
    crop.crop_size = (size, size)
    cfg.train.init_checkpoint = str((out / DETECTRON2_WEIGHTS).resolve())
    _save(rcnn, out)
    LazyConfig.save(cfg, str(out / DETECTRON2_CONFIG))
    again = instantiate(LazyConfig.load(str(out / DETECTRON2_CONFIG)).model).eval()
    return _compare(again, rcnn.eval(), out, (size, size))


def lazy_model(architecture: DetectorArchitecture, encoder: AnyArchitecture) -> Any:
    """Return the LazyConfig of a detector around an encoder that is built from its architecture, without a file."""
    is_cnn = isinstance(encoder, CnnArchitecture)
    net = LazyCall(EncoderStages if is_cnn else EncoderBackbone)(
        encoder=OmegaConf.create(lazy_encoder(encoder)),
        checkpointing=False,
    )
    options = (len(architecture.categories), architecture.detector, architecture.normalisation)
    if is_cnn:
        return stage_mask_rcnn(net, architecture.size, *options)
    return mask_rcnn(net, encoder.patch_size, architecture.size, *options)


def write_encoder(encoder: AnyEncoder, normalisation: str, out: Path) -> tuple[Tensor, Tensor]:
    """Write a pretrained encoder as the weights of a detector, with a yacs config that is merged into one of the zoo's.

    Returns the maps of the written encoder and its own, for comparison.
    """
    mean, std = ([255 * value for value in part] for part in NORMALISATION[normalisation])
    about = encoder.architecture
    node = _plain(architecture_keys(about)) | {"drop_path": encoder.config.drop_path}
    config = {
        "MODEL": {
            "BACKBONE": {"NAME": "EncoderFPN" if isinstance(encoder, CnnEncoder) else "EncoderPyramid"},
            "WEIGHTS": str((out / DETECTRON2_WEIGHTS).resolve()),
            "PIXEL_MEAN": mean,
            "PIXEL_STD": std,
            "ENCODER": node,
        },
        "INPUT": {"FORMAT": IMAGE_FORMAT},
    }
    model = _as_in_a_detector(encoder)
    _save(model, out)
    write_atomically(out / DETECTRON2_CONFIG, yaml.safe_dump(config, sort_keys=False).encode())

    cfg = get_cfg()
    add_encoder_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(config))
    build = build_cnn if isinstance(encoder, CnnEncoder) else build_encoder
    again = _as_in_a_detector(build(encoder_options(cfg)))
    return _compare(again, model, out, about.image_size)


def _plain(value: Any) -> Any:
    """Return nested values with lists in place of tuples, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _as_in_a_detector(encoder: AnyEncoder) -> nn.Module:
    """Return a module whose tensors have the names that they have in a detector with a pyramid."""
    model = nn.Module()
    if isinstance(encoder, CnnEncoder):
        parts = OrderedDict[str, nn.Module](bottom_up=EncoderStages(encoder=encoder))
    else:
        parts = OrderedDict[str, nn.Module](net=EncoderBackbone(encoder=encoder))
    model.backbone = nn.Sequential(parts)
    return model


def _save(model: nn.Module, out: Path) -> None:
    with atomic_replace(out / DETECTRON2_WEIGHTS) as temporary, open(temporary, "wb") as file:
        torch.save({"model": model.state_dict(), "__author__": "addp"}, file)


def _compare(again: Any, model: Any, out: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Load what was written into `again`; return all maps of both models on a random image."""
    again.load_state_dict(torch.load(out / DETECTRON2_WEIGHTS, weights_only=True)["model"])
    return _maps(again.backbone, size), _maps(model.backbone, size)


@torch.inference_mode()
def _maps(backbone: Any, size: tuple[int, int]) -> Tensor:
    """Return all maps of a random image of this size, one after the other."""
    backbone.eval()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return torch.cat([map_.flatten() for map_ in backbone(images).values()])
