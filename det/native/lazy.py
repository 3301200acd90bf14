"""What detectron2's LazyConfigs of the suite call: the detector, COCO files, the schedule, rates and weight decay."""

import json
import logging
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import detectron2
from detectron2.config import LazyCall, LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import reduce_param_groups
from detectron2.structures import BoxMode
from detectron2.utils import comm
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import DictConfig
from torch import nn

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.networks.encoder import Encoder
from addp_core.weights.start import NORMALISATION
from det.coco import CocoSet, encode, open_coco
from det.config import ANCHOR, CocoConfig, DetectorConfig

log = logging.getLogger("addp")

WARMUP_FROM = 0.001  # share of the rate that the warm-up starts from, as ViTDet's


def package_config(name: str) -> DictConfig:
    """A config that detectron2's package brings, such as "common/train.py".

    model_zoo.get_config would do the same, but needs `pkg_resources`, which setuptools 81 removed.
    """
    return LazyConfig.load(str(Path(detectron2.__file__).parent / "model_zoo" / "configs" / name))


def mask_rcnn(
    net: Any, patch: int, size: int, classes: int, detector: DetectorConfig, normalisation: str = "imagenet"
) -> DictConfig:
    """Config of ViTDet's Mask R-CNN over a backbone `net` (or its LazyCall) with one map at stride `patch`.

    Images are padded to squares of `size` pixels: where training saw its positions. normalisation: of `NORMALISATION`.
    """
    model = package_config("common/models/mask_rcnn_vitdet.py").model
    model.pixel_mean, model.pixel_std = ([255 * value for value in part] for part in NORMALISATION[normalisation])
    strides = [int(patch / scale) for scale in detector.scales]
    strides.append(2 * strides[-1])
    levels = [f"p{stride.bit_length() - 1}" for stride in strides]
    pyramid, rpn, heads = model.backbone, model.proposal_generator, model.roi_heads
    pyramid.net, pyramid.in_feature, pyramid.square_pad = net, "last_feat", size
    pyramid.out_channels, pyramid.scale_factors = detector.channels, list(detector.scales)
    pyramid.top_block = LazyCall(pool_last)(level=levels[-2])
    rpn.in_features, rpn.head.in_channels = levels, detector.channels
    rpn.anchor_generator.sizes, rpn.anchor_generator.strides = [[ANCHOR * stride] for stride in strides], strides
    rpn.post_nms_topk = (detector.proposals, detector.proposals)
    heads.num_classes, heads.batch_size_per_image = classes, detector.samples
    heads.box_in_features = heads.mask_in_features = levels[:-1]
    for pooler in (heads.box_pooler, heads.mask_pooler):
        pooler.scales = [1 / stride for stride in strides[:-1]]
    for head in (heads.box_head, heads.mask_head):
        head.input_shape.channels = detector.channels
    heads.box_head.conv_dims, heads.box_head.fc_dims = [detector.convs] * 4, [detector.fc]
    heads.box_predictor.input_shape.channels = detector.fc
    heads.box_predictor.test_score_thresh = detector.score
    heads.box_predictor.test_topk_per_image = detector.detections
    heads.mask_head.conv_dims = [detector.convs] * 5  # the last one upsamples
    return model


def pool_last(level: str) -> LastLevelMaxPool:
    """detectron2's extra level, at half the size of `level`."""
    pool = LastLevelMaxPool()
    pool.in_feature = level
    return pool


# -------------------- data


MaskFormat = Literal["polygon", "bitmask"]


def coco_dicts(coco: CocoSet, masks: MaskFormat) -> list[dict[str, Any]]:
    """A set in detectron2's standard format, without the images whose files are missing."""
    missing, found = {os.path.join(coco.folder, name) for name in coco.missing}, []
    for index, image_id in enumerate(coco.ids):
        if coco.name(index) in missing:
            continue
        height, width = coco.sizes[index]
        things = []
        for thing in coco.objects(index):
            mask = thing["segmentation"]
            if masks == "bitmask" or isinstance(mask, dict):
                mask = encode(mask, height, width)
            entry = {"bbox": thing["bbox"], "bbox_mode": BoxMode.XYWH_ABS, "segmentation": mask}
            things.append({**entry, "category_id": thing["label"], "iscrowd": thing["iscrowd"]})
        image = {"file_name": coco.name(index), "image_id": image_id, "height": height, "width": width}
        found.append({**image, "annotations": things})
    return found


@cache
def _open(root: str, split: str, masks: MaskFormat, **files: str) -> tuple[str, CocoSet]:
    """The set and the name it is registered under."""
    coco = open_coco(CocoConfig(root=root, **files), split)
    name = f"{coco.path} {coco.folder} {masks}"
    DatasetCatalog.register(name, lambda: coco_dicts(coco, masks))
    MetadataCatalog.get(name).set(
        thing_classes=list(coco.classes),
        thing_dataset_id_to_contiguous_id={category.id: i for i, category in enumerate(coco.categories)},
    )
    return name, coco


def register_coco(root: str, split: str, masks: MaskFormat = "bitmask", **files: str) -> str:
    """Makes the COCO files under `root` known to detectron2, with every check of theirs; returns the name.

    masks: the mapper's `instance_mask_format`. files: CocoConfig's `<split>_annotations` and `<split>_images`, where
    they are not found under `root`. UserError as `open_coco`, and where a package for cropping polygons is missing.
    """
    if masks == "polygon" and find_spec("shapely") is None:
        raise UserError(
            "dataloader.train.mapper.instance_mask_format=polygon: detectron2 crops polygons with shapely, which is "
            "not installed; pip install shapely, or take bitmask"
        )
    return _open(root, split, masks, **files)[0]


def coco_evaluator(root: str, split: str, out: str, **files: str) -> COCOEvaluator:
    """detectron2's evaluator of a set, without the annotations that cannot be used; it writes into the folder `out`."""
    name, coco = _open(root, split, "bitmask", **files)
    folder = Path(out)
    truth = folder / f"ground_truth_{split}.json"
    if comm.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(truth, json.dumps(coco.dataset()).encode())
    comm.synchronize()
    MetadataCatalog.get(name).set(json_file=str(truth))
    return COCOEvaluator(name, output_dir=out)


# -------------------- optimization


def cosine(iterations: int, warmup: int) -> WarmupParamScheduler:
    """Factor on the rate: linear over `warmup` iterations, then half a cosine to 0 over the rest."""
    if warmup >= iterations:
        raise UserError(f"train.warmup: found {warmup}, expected fewer iterations than train.max_iter={iterations}")
    falling = CosineParamScheduler(1.0, 0.0)
    return WarmupParamScheduler(falling, WARMUP_FROM, warmup / iterations, rescale_interval=True)


def parameter_groups(model: nn.Module, base_lr: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for an optimizer, with the rate `base_lr * layer_decay ** (depth + 1 - layer)`: the encoder's embedding is
    layer 0, its block i is layer i + 1, everything else layer depth + 1.

    Weight decay spares one-dimensional tensors (norms, biases) and what the encoder's `no_weight_decay` names.
    """
    ((prefix, encoder),) = ((f"{name}.", part) for name, part in model.named_modules() if isinstance(part, Encoder))
    last, matcher = len(encoder.blocks) + 1, encoder.group_matcher(prefix=prefix)
    spared = {prefix + name for name in encoder.no_weight_decay()}
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = last
        if re.match(matcher["stem"], name):
            layer = 0
        elif block := re.match(matcher["blocks"], name):
            layer = int(block[1]) + 1
        group = {"params": [parameter], "lr": base_lr * layer_decay ** (last - layer)}
        groups.append(group | ({"weight_decay": 0.0} if parameter.ndim <= 1 or name in spared else {}))
    return reduce_param_groups(groups)
