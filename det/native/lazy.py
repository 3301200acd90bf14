"""The functions that the suite's LazyConfigs call: the detector, COCO files, the schedule, learning rates and weight
decay.
"""

import json
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
from addp_core.networks.encoder import TransformerEncoder
from addp_core.weights.pretrained import NORMALISATION
from det.coco import CocoDataset, open_coco
from det.config import ANCHOR_SCALE, CocoFiles, DetectorConfig, padded_size
from det.masks import to_rle

WARMUP_START_FACTOR = 0.001  # of the learning rate at the first iteration, as in ViTDet

MaskFormat = Literal["polygon", "bitmask"]


def package_config(name: str) -> DictConfig:
    """Load a config that is part of the detectron2 package, such as "common/train.py".

    model_zoo.get_config would do the same, but it needs `pkg_resources`, which setuptools 81 removed.
    """
    return LazyConfig.load(str(Path(detectron2.__file__).parent / "model_zoo" / "configs" / name))


def mask_rcnn(
    net: Any, patch: int, size: int, classes: int, detector: DetectorConfig, normalisation: str = "imagenet"
) -> DictConfig:
    """Return the config of ViTDet's Mask R-CNN, or of Faster R-CNN if `detector.masks` is false.

    Args:
        net: a backbone with one map, or its LazyCall.
        patch: stride of that map in pixels.
        size: images are padded to squares of this side (to the next multiple of the stride), so that positions match
            those of training.
        classes: number of categories.
        detector: the keys of the pyramid and the heads.
        normalisation: a key of `NORMALISATION`.
    """
    model = package_config("common/models/mask_rcnn_vitdet.py").model
    model.pixel_mean, model.pixel_std = ([255 * value for value in part] for part in NORMALISATION[normalisation])
    strides = [int(patch / scale) for scale in detector.scales]
    strides.append(2 * strides[-1])
    levels = [f"p{stride.bit_length() - 1}" for stride in strides]
    pyramid, rpn, heads = model.backbone, model.proposal_generator, model.roi_heads
    pyramid.net, pyramid.in_feature, pyramid.square_pad = net, "last_feat", padded_size(size, patch)
    pyramid.out_channels, pyramid.scale_factors = detector.channels, list(detector.scales)
    pyramid.top_block = LazyCall(pool_last)(level=levels[-2])
    rpn.in_features, rpn.head.in_channels = levels, detector.channels
    rpn.anchor_generator.sizes = [[ANCHOR_SCALE * stride] for stride in strides]
    rpn.anchor_generator.strides = strides
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
    if detector.masks is False:
        heads.mask_in_features = heads.mask_pooler = heads.mask_head = None  # Faster R-CNN
    return model


def pool_last(level: str) -> LastLevelMaxPool:
    """Return detectron2's additional level, at half the size of `level`."""
    pool = LastLevelMaxPool()
    pool.in_feature = level
    return pool


# -------------------- data


def coco_dicts(dataset: CocoDataset, masks: MaskFormat) -> list[dict[str, Any]]:
    """Convert a dataset to detectron2's standard format, without the images whose files are missing."""
    missing = {os.path.join(dataset.folder, name) for name in dataset.missing}
    records = []
    for index, image_id in enumerate(dataset.ids):
        if dataset.name(index) in missing:
            continue
        height, width = dataset.sizes[index]
        annotations = []
        for obj in dataset.objects(index):
            mask = obj["segmentation"]
            if masks == "bitmask" or isinstance(mask, dict):
                mask = to_rle(mask, height, width)
            entry = {"bbox": obj["bbox"], "bbox_mode": BoxMode.XYWH_ABS, "segmentation": mask}
            annotations.append({**entry, "category_id": obj["label"], "iscrowd": obj["iscrowd"]})
        image = {"file_name": dataset.name(index), "image_id": image_id, "height": height, "width": width}
        records.append({**image, "annotations": annotations})
    return records


@cache
def _register_once(root: str, split: str, masks: MaskFormat, **files: Any) -> tuple[str, CocoDataset]:
    """Return the name that a dataset is registered under, and the dataset."""
    dataset = open_coco(CocoFiles(root=root, **files), split, masks=True)
    name = f"{dataset.path} {dataset.folder} {masks}"
    DatasetCatalog.register(name, lambda: coco_dicts(dataset, masks))
    MetadataCatalog.get(name).set(
        thing_classes=list(dataset.classes),
        thing_dataset_id_to_contiguous_id={category.id: i for i, category in enumerate(dataset.categories)},
        categories=dataset.categories,
    )
    return name, dataset


def register_coco(root: str, split: str, masks: MaskFormat = "bitmask", **files: str) -> str:
    """Check the COCO files under `root`, register them with detectron2 and return the name of the dataset.

    Args:
        root: dataset folder.
        split: "train" or "val".
        masks: the mapper's `instance_mask_format`.
        files: `<split>_annotations` and `<split>_images`, if they are not found under `root`.

    Raises:
        UserError: as in `open_coco`, or if polygons are requested and shapely is not installed.
    """
    if masks == "polygon" and find_spec("shapely") is None:
        raise UserError(
            "dataloader.train.mapper.instance_mask_format=polygon: detectron2 crops polygons with shapely, which is "
            "not installed; pip install shapely, or use bitmask"
        )
    return _register_once(root, split, masks, **files)[0]


def coco_evaluator(root: str, split: str, out: str, **files: str) -> COCOEvaluator:
    """Return detectron2's evaluator of a dataset without its skipped annotations; it writes into the folder `out`."""
    name, dataset = _register_once(root, split, "bitmask", **files)
    folder = Path(out)
    truth = folder / f"ground_truth_{split}.json"
    if comm.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(truth, json.dumps(dataset.to_coco()).encode())
    comm.synchronize()
    # Metadata of one name never change, but two evaluations in one process may write into two folders.
    metadata = MetadataCatalog.get(f"{name} {truth.absolute()}")
    metadata.set(**{**MetadataCatalog.get(name).as_dict(), "name": metadata.name, "json_file": str(truth.absolute())})
    return COCOEvaluator(metadata.name, output_dir=out)


# -------------------- optimization


def cosine(iterations: int, warmup: int) -> WarmupParamScheduler:
    """Return the factor on the learning rate: linear over `warmup` iterations, then half a cosine to 0."""
    if warmup >= iterations:
        raise UserError(f"train.warmup: found {warmup}, expected fewer iterations than train.max_iter={iterations}")
    decay = CosineParamScheduler(1.0, 0.0)
    return WarmupParamScheduler(decay, WARMUP_START_FACTOR, warmup / iterations, rescale_interval=True)


def parameter_groups(model: nn.Module, base_lr: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups with the learning rate `base_lr * layer_decay ** (depth + 1 - layer)`.

    The encoder's embedding is layer 0, its block i is layer i + 1, everything else is layer depth + 1. One-dimensional
    tensors (norms, biases) and the encoder's `no_weight_decay` parameters are exempt from weight decay.
    """
    ((prefix, encoder),) = (
        (f"{name}.", part) for name, part in model.named_modules() if isinstance(part, TransformerEncoder)
    )
    last, matcher = len(encoder.blocks) + 1, encoder.group_matcher(prefix=prefix)
    exempt = {prefix + name for name in encoder.no_weight_decay()}
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
        groups.append(group | ({"weight_decay": 0.0} if parameter.ndim <= 1 or name in exempt else {}))
    return reduce_param_groups(groups)
