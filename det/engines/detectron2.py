"""The engine detectron2: its Mask R-CNN (RPN, heads, samplers, RoIAlign as ViTDet's) over the suite's encoder.

`addp det train` trains it with the suite's engine, on the same crops as the other one;
det/native/train_net.py trains it with nothing but detectron2's own trainer and data loading.
"""

from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.networks.encoder import Encoder
from det.augment import Scene
from det.config import DetectorFile
from det.model import Detections
from det.native.backbone import EncoderBackbone
from det.native.lazy import mask_rcnn

NET = "rcnn.backbone.net.encoder."  # begins the names of the encoder's parameters


class Detectron2Detector(nn.Module):
    """Training: `model(scenes)` gives the losses. Evaluation: `detect`."""

    def __init__(self, file: DetectorFile, encoder: Encoder):
        super().__init__()
        net = EncoderBackbone(encoder=encoder, checkpointing=encoder.checkpointing)
        classes, patch = len(file.categories), encoder.patch_size
        self.rcnn = instantiate(mask_rcnn(net, patch, file.size, classes, file.detector, file.normalisation))
        self.file = file

    def forward(self, scenes: list[Scene]) -> dict[str, Tensor]:
        """Losses of the RPN (two), of classes, boxes and masks: scalars to be added."""
        with EventStorage():  # detectron2 writes figures of its own wherever it trains
            return self.rcnn([{"image": scene.image, "instances": _instances(scene)} for scene in scenes])

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """UInt8[3,H,W] RGB each, of any sizes, on the model's device; the model must be in eval mode."""
        found = self.rcnn.inference([{"image": self._shown(image)} for image in images], do_postprocess=False)
        return [_detections(each, image) for each, image in zip(found, images, strict=True)]

    def _shown(self, image: Tensor) -> Tensor:
        """Float[3,h,w], the longer side as many pixels as in training."""
        factor = self.file.size / max(image.shape[-2:])
        hw = [max(1, round(side * factor)) for side in image.shape[-2:]]
        return F.interpolate(image[None].float(), hw, mode="bicubic", antialias=True)[0]

    def no_weight_decay(self) -> set[str]:
        return {NET + name for name in self.rcnn.backbone.net.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer decay: the encoder's stem and blocks; pyramid and heads come last."""
        return self.rcnn.backbone.net.encoder.group_matcher(coarse, prefix=NET)


build = Detectron2Detector


def _instances(scene: Scene) -> Instances:
    masks = BitMasks(scene.masks.bool())
    return Instances(scene.image.shape[-2:], gt_boxes=Boxes(scene.boxes), gt_classes=scene.labels, gt_masks=masks)


def _detections(found: Instances, image: Tensor) -> Detections:
    """What was found on the image as it was shown -> on the image as it is; masks one at a time, for a hundred of a
    large photograph do not fit.
    """
    codes, kept = [], []
    for i in range(len(found)):
        moved = detector_postprocess(found[i : i + 1], *image.shape[-2:])
        if len(moved):  # a box outside the image is dropped
            kept.append(moved)
            codes.append(coco_mask.encode(np.asfortranarray(moved.pred_masks[0].to(torch.uint8).cpu().numpy())))
            moved.remove("pred_masks")
    if not kept:
        return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), [])
    whole = Instances.cat(kept)
    return Detections(whole.pred_boxes.tensor.float(), whole.scores.float(), whole.pred_classes, codes)
