"""The engine "torchvision", which a plain install has: torchvision's Mask R-CNN, or Faster R-CNN for boxes alone, over
the suite's encoder and feature pyramid, with ViTDet's heads (arXiv 2203.16527).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from addp_core.networks.cnn import CnnEncoder
from addp_core.weights.pretrained import NORMALISATION
from det.augment import DetectionSample
from det.config import ANCHOR_SCALE, DetectorArchitecture, DetEncoder, Interpolation, padded_size
from det.masks import encode_bitmap
from det.model import Detections, Detector, resize_to_longer_side
from det.pyramid import ChannelNorm, FeaturePyramid, StagePyramid

ASPECT_RATIOS = (0.5, 1.0, 2.0)
ENCODER_PREFIX = "backbone.net."  # of the names of the encoder's parameters


class TorchvisionDetector(FasterRCNN, Detector):
    """torchvision's Faster R-CNN, which a mask head turns into Mask R-CNN: two convolutions in the RPN head, four and
    one linear layer in the box head, norms over channels in box and mask head; boxes are regressed per class.

    In training, `model(samples)` returns the losses by name.
    """

    backbone: FeaturePyramid | StagePyramid

    def __init__(self, architecture: DetectorArchitecture, encoder: DetEncoder):
        config, classes = architecture.detector, len(architecture.categories) + 1  # class 0 is the background
        pyramid: FeaturePyramid | StagePyramid
        if isinstance(encoder, CnnEncoder):
            pyramid = StagePyramid(encoder, config.channels)
        else:
            pyramid = FeaturePyramid(encoder, config.channels, config.scales)
        anchor_sizes = tuple((ANCHOR_SCALE * stride,) for stride in pyramid.strides)
        make_pool, pooled = partial(_RoIAlign, pyramid.strides[:-1]), 7
        super().__init__(
            pyramid,
            rpn_anchor_generator=AnchorGenerator(anchor_sizes, (ASPECT_RATIOS,) * len(anchor_sizes)),
            rpn_head=_Float32RPNHead(config.channels, len(ASPECT_RATIOS), conv_depth=2),
            rpn_post_nms_top_n_train=config.proposals,
            rpn_post_nms_top_n_test=config.proposals,
            box_roi_pool=make_pool(pooled),
            box_head=FastRCNNConvFCHead(
                (config.channels, pooled, pooled), [config.convs] * 4, [config.fc], norm_layer=ChannelNorm
            ),
            box_predictor=_Float32BoxPredictor(config.fc, classes),
            box_batch_size_per_image=config.samples,
            box_score_thresh=config.score,
            box_detections_per_img=config.detections,
        )
        if architecture.masks:
            heads = cast(RoIHeads, self.roi_heads)
            heads.mask_roi_pool = make_pool(2 * pooled)
            heads.mask_head = MaskRCNNHeads(config.channels, [config.convs] * 4, 1, norm_layer=ChannelNorm)
            heads.mask_predictor = MaskRCNNPredictor(config.convs, config.convs, classes)
        normalization = NORMALISATION[architecture.normalisation]
        side = padded_size(architecture.size, encoder.patch_size)
        self.transform = _SquareTransform(architecture.size, side, architecture.interpolation, *normalization)
        self.architecture = architecture

    def forward(self, inputs: list[Any]) -> Any:
        """Training: `DetectionSample`s of at most the architecture's size -> losses by name. Evaluation: Float[3,H,W]
        images in [0,1] -> torchvision's dictionary of detections for each.
        """
        if not self.training:
            return super().forward(inputs)
        samples: list[DetectionSample] = inputs
        targets = [{"boxes": s.boxes, "labels": s.labels + 1} for s in samples]
        for target, sample in zip(targets, samples, strict=True):
            if sample.masks is not None:
                target["masks"] = sample.masks
        return super().forward([s.image.float() / 255 for s in samples], targets)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the encoder's parameters that are exempt from weight decay."""
        return {ENCODER_PREFIX + name for name in self.backbone.net.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups for layer decay: the encoder's stem, then its blocks; the rest comes last."""
        return self.backbone.net.group_matcher(coarse, prefix=ENCODER_PREFIX)

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """Detect objects on UInt8[3,H,W] RGB images of any sizes, on the model's device; requires eval mode."""
        outputs = self([image.float() / 255 for image in images])
        return [Detections(o["boxes"].float(), o["scores"].float(), o["labels"] - 1, o.get("masks")) for o in outputs]


class _Float32RPNHead(RPNHead):
    """Returns float32 under autocast too: torchvision's boxes take the precision of the regressed offsets, and bfloat16
    rounds coordinates beyond 512 to multiples of 4 pixels.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], ...]:
        return tuple([map_.float() for map_ in maps] for maps in super().forward(x))


class _Float32BoxPredictor(FastRCNNPredictor):
    """Returns float32, for the reason given in `_Float32RPNHead`."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.float() for part in super().forward(x))


class _RoIAlign(MultiScaleRoIAlign):
    """RoIAlign over maps of known strides; torchvision would estimate them from image sizes before padding."""

    def __init__(self, strides: list[int], output_size: int):
        super().__init__([str(i) for i in range(len(strides))], output_size, sampling_ratio=0)
        self.scales = [1 / stride for stride in strides]
        lowest, highest = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
        self.map_levels = initLevelMapper(lowest, highest)


class _SquareTransform(GeneralizedRCNNTransform):
    """Normalizes images and then pads them with zeros to squares of `side` pixels, so that positions match those of
    training. The detector knows the sizes before padding: no proposal lies in the padding.

    In evaluation, images are first resized to a longer side of `size`. Masks are returned in COCO's compressed code,
    pasted one at a time: a hundred masks of a large photograph do not fit in memory.
    """

    def __init__(self, size: int, side: int, interpolation: Interpolation, mean: Sequence[float], std: Sequence[float]):
        super().__init__(size, size, mean, std, size_divisible=side)
        self.interpolation = interpolation

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict | None]:
        if self.training:
            return image, target
        return resize_to_longer_side(image, self.max_size, self.interpolation), target

    def postprocess(
        self, result: list[dict[str, Any]], image_shapes: list[tuple[int, int]], original_image_sizes: list
    ) -> list[dict[str, Any]]:
        if self.training:
            return result
        for output, resized_hw, hw in zip(result, image_shapes, original_image_sizes, strict=True):
            output["boxes"] = resize_boxes(output["boxes"], resized_hw, hw)
            if "masks" not in output:
                continue
            pairs = zip(output["masks"].float(), output["boxes"], strict=True)
            output["masks"] = [
                encode_bitmap(paste_masks_in_image(mask[None], box[None], hw)[0, 0] > 0.5) for mask, box in pairs
            ]
        return result
