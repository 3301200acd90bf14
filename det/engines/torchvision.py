"""The detector of a plain install: torchvision's Mask R-CNN over the suite's encoder and feature pyramid, with ViTDet's
heads (arXiv 2203.16527), trained by the suite's engine.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from addp_core.networks.encoder import Encoder
from addp_core.weights.start import NORMALISATION
from det.augment import Scene
from det.config import ANCHOR, DetectorFile
from det.model import Detections
from det.pyramid import ChannelNorm, FeaturePyramid

RATIOS = (0.5, 1.0, 2.0)
NET = "backbone.net."  # begins the names of the encoder's parameters


class TorchvisionDetector(MaskRCNN):
    """torchvision's Mask R-CNN: two convolutions in the RPN head, four and one linear layer in the box head, norms over
    channels in box and mask head; boxes are regressed for each class.

    Training: `model(scenes)` gives the losses. Evaluation: `model.detect(images)`.
    """

    def __init__(self, file: DetectorFile, encoder: Encoder):
        config, classes = file.detector, len(file.categories) + 1  # class 0 is the ground
        pyramid = FeaturePyramid(encoder, config.channels, config.scales)
        sizes = tuple((ANCHOR * stride,) for stride in pyramid.strides)
        pool, pooled = partial(_Pool, pyramid.strides[:-1]), 7
        super().__init__(
            pyramid,
            rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
            rpn_head=_RPNHead(config.channels, len(RATIOS), conv_depth=2),
            rpn_post_nms_top_n_train=config.proposals,
            rpn_post_nms_top_n_test=config.proposals,
            box_roi_pool=pool(pooled),
            box_head=FastRCNNConvFCHead(
                (config.channels, pooled, pooled), [config.convs] * 4, [config.fc], norm_layer=ChannelNorm
            ),
            box_predictor=_BoxPredictor(config.fc, classes),
            box_batch_size_per_image=config.samples,
            box_score_thresh=config.score,
            box_detections_per_img=config.detections,
            mask_roi_pool=pool(2 * pooled),
            mask_head=MaskRCNNHeads(config.channels, [config.convs] * 4, 1, norm_layer=ChannelNorm),
            mask_predictor=MaskRCNNPredictor(config.convs, config.convs, classes),
        )
        self.transform = _Square(file.size, *NORMALISATION[file.normalisation])
        self.file = file

    def forward(self, seen: list[Scene] | list[Tensor]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Training: scenes of one size -> losses by name. Evaluation: Float[3,H,W] in [0,1] each -> what is found."""
        if not self.training:
            return super().forward(seen)
        targets = [{"boxes": s.boxes, "labels": s.labels + 1, "masks": s.masks} for s in seen]
        return super().forward([s.image.float() / 255 for s in seen], targets)

    def no_weight_decay(self) -> set[str]:
        return {NET + name for name in self.backbone.net.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer decay: the encoder's stem and blocks; pyramid and heads come last."""
        return self.backbone.net.group_matcher(coarse, prefix=NET)

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """UInt8[3,H,W] RGB each, of any sizes, on the model's device; the model must be in eval mode."""
        found = self([image.float() / 255 for image in images])
        return [Detections(f["boxes"].float(), f["scores"].float(), f["labels"] - 1, f["masks"]) for f in found]


build = TorchvisionDetector


class _RPNHead(RPNHead):
    """In float32 under autocast too: torchvision's boxes take the precision of what moves them, and bfloat16 rounds
    them to 4 pixels beyond 512.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], ...]:
        return tuple([map_.float() for map_ in maps] for maps in super().forward(x))


class _BoxPredictor(FastRCNNPredictor):
    """In float32, as `_RPNHead`."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.float() for part in super().forward(x))


class _Pool(MultiScaleRoIAlign):
    """RoIAlign over maps of known strides; torchvision would guess them from images that are not padded yet."""

    def __init__(self, strides: list[int], side: int):
        super().__init__([str(i) for i in range(len(strides))], side, sampling_ratio=0)
        self.scales = [1 / stride for stride in strides]
        lowest, highest = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
        self.map_levels = initLevelMapper(lowest, highest)


class _Square(GeneralizedRCNNTransform):
    """Images normalised, in evaluation resized to a longer side of `size`, and padded to squares of it: where training
    saw its positions. Masks come back as COCO's codes, one at a time: a hundred of a large photograph do not fit.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__(size, size, mean, std, size_divisible=size)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict | None]:
        if self.training:
            return image, target
        factor = self.max_size / max(image.shape[-2:])
        hw = [max(1, round(side * factor)) for side in image.shape[-2:]]
        return F.interpolate(image[None], hw, mode="bicubic", antialias=True)[0], target

    def postprocess(
        self, result: list[dict[str, Any]], image_shapes: list[tuple[int, int]], original_image_sizes: list
    ) -> list[dict[str, Any]]:
        if self.training:
            return result
        for found, shown, hw in zip(result, image_shapes, original_image_sizes, strict=True):
            found["boxes"] = resize_boxes(found["boxes"], shown, hw)
            masks = zip(found["masks"].float(), found["boxes"], strict=True)
            found["masks"] = [_code(paste_masks_in_image(mask[None], box[None], hw)[0, 0] > 0.5) for mask, box in masks]
        return result


def _code(mask: Tensor) -> dict[str, Any]:
    """Bool[H,W] -> COCO's compressed code."""
    return coco_mask.encode(np.asfortranarray(mask.to(torch.uint8).cpu().numpy()))
