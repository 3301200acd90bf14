# A small detector for toy COCO, 128 px, 100 epochs, on a CPU.
#
# Source: ours. ViTDet's detector with narrow heads and few sampled proposals, over the encoder of `addp pretrain tiny`.
# Run:    addp toy out=runs/toy only=[coco]
#         python -m det.native.train_net --config-file mask_rcnn_vitdet_tiny_100ep \
#             model.backbone.net.encoder.source=runs/tiny
#         Baseline from random weights: model.backbone.net.encoder.init=random. Short trial: train.max_iter=500.
from detectron2.data import transforms as T

from det.config import DetectorConfig
from det.native.lazy import mask_rcnn

from .common.vitdet import dataloader, lr_multiplier, model, optimizer, train

size = 128

net = model.backbone.net
net.encoder.source = "runs/tiny"
net.encoder.img_size = size
net.encoder.drop_path = 0.0
net.encoder.attention.window = 0
detector = DetectorConfig(channels=64, scales=(1.0, 0.5), convs=32, fc=128, proposals=100, samples=32)
model = mask_rcnn(net=net, patch=8, size=size, classes=10, detector=detector)

dataloader.coco.root = "runs/toy/coco"
# no flips, because mirrored digits are not digits
scale, crop = (aug for aug in dataloader.train.mapper.augmentations if aug._target_ is not T.RandomFlip)
scale.min_scale, scale.max_scale, scale.target_height, scale.target_width = 0.5, 1.5, size, size
crop.crop_size = (size, size)
dataloader.train.mapper.augmentations = [scale, crop]
dataloader.train.mapper.instance_mask_format = "bitmask"
dataloader.train.total_batch_size = 8
resize = dataloader.test.mapper.augmentations[0]
resize.short_edge_length = resize.max_size = size
dataloader.train.num_workers = dataloader.test.num_workers = 1

train.max_iter = 100 * 400 // 8
train.warmup = 50
train.eval_period = train.checkpointer.period = 1000
optimizer.lr = 1e-3
optimizer.weight_decay = 0.05
optimizer.params.layer_decay = 1.0

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]
