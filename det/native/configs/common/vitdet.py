"""The common part of the configs: ViTDet's Mask R-CNN over the suite's encoder, with the data, optimizer and schedule
of the paper's ViT-B.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from torch.optim import AdamW

from addp_core.networks.attention import AttentionConfig
from addp_core.weights.encoders import load_encoder
from det.config import DetectorConfig
from det.native.backbone import EncoderBackbone
from det.native.lazy import coco_evaluator, cosine, mask_rcnn, package_config, parameter_groups, register_coco

size = 1024

model = mask_rcnn(
    net=L(EncoderBackbone)(
        encoder=L(load_encoder)(
            source="hf://Changyao/ADDP/addp-vit-base-16.pth",
            img_size=size,
            drop_path=0.1,
            attention=L(AttentionConfig)(window=14, global_blocks=4, relative="decomposed", class_token=False),
            dynamic=True,
            init="pretrained",
        ),
        checkpointing=False,
    ),
    patch=16,
    size=size,
    classes=80,
    detector=DetectorConfig(),
)

dataloader = {
    "coco": {"root": "datasets/coco"},
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=L(register_coco)(
                root="${dataloader.coco.root}", split="train", masks="${dataloader.train.mapper.instance_mask_format}"
            ),
            filter_empty=True,
        ),
        mapper=L(DatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.RandomFlip)(horizontal=True),
                L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=size, target_width=size),
                L(T.FixedSizeCrop)(crop_size=(size, size), pad=False),
            ],
            image_format="RGB",
            use_instance_mask=True,
            instance_mask_format="polygon",  # use "bitmask" for run-length masks, or if shapely is not installed
            recompute_boxes=True,
        ),
        total_batch_size=128,
        num_workers=8,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=L(register_coco)(root="${dataloader.coco.root}", split="val"), filter_empty=False
        ),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=size, max_size=size)],
            image_format="RGB",
        ),
        num_workers=8,
    ),
    "evaluator": L(coco_evaluator)(root="${dataloader.coco.root}", split="val", out="${train.output_dir}/evaluation"),
}

train = package_config("common/train.py").train
train.output_dir = "runs/det"
train.seed = 0
train.max_iter = 100 * 118_287 // 128  # 100 epochs of train2017
train.warmup = 250
train.amp = {"enabled": True, "dtype": "float16"}
train.ddp.fp16_compression = True
train.checkpointer.max_to_keep = 3

lr_multiplier = L(cosine)(iterations="${train.max_iter}", warmup="${train.warmup}")

optimizer = L(AdamW)(
    params=L(parameter_groups)(model=None, base_lr="${..lr}", layer_decay=0.8),
    lr=1.6e-4,
    betas=(0.9, 0.999),
    weight_decay=0.1,
)
