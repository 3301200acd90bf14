"""The engine "detectron2": its Mask R-CNN, or Faster R-CNN for boxes alone (RPN, heads, samplers and RoIAlign as in
ViTDet) over the suite's encoder.

`addp det train` trains it with the suite's training engine, on the same crops as the other engine;
det/native/train_net.py trains the same model with detectron2's own trainer and data loading.
"""

from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.modeling import FPN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.encoder import FeatureEncoder
from det.augment import DetectionSample
from det.config import DetectorArchitecture, DetEncoder
from det.masks import encode_bitmap
from det.model import Detections, Detector, resize_to_longer_side
from det.native.backbone import EncoderBackbone
from det.native.lazy import mask_rcnn
from det.native.stages import EncoderStages, stage_mask_rcnn


class Detectron2Detector(Detector):
    """detectron2's Mask R-CNN with ViTDet's configuration. In training, `model(samples)` returns the losses by name."""

    def __init__(self, architecture: DetectorArchitecture, encoder: DetEncoder):
        super().__init__()
        options = (len(architecture.categories), architecture.detector, architecture.normalisation)
        if isinstance(encoder, CnnEncoder):
            net = EncoderStages(encoder=encoder, checkpointing=encoder.checkpointing)
            config = stage_mask_rcnn(net, architecture.size, *options)
        else:
            vit = EncoderBackbone(encoder=encoder, checkpointing=encoder.checkpointing)
            config = mask_rcnn(vit, encoder.patch_size, architecture.size, *options)
        self.rcnn = instantiate(config)
        self.architecture = architecture

    def forward(self, samples: list[DetectionSample]) -> dict[str, Tensor]:
        """Return the losses of the RPN (two), of classes, boxes and, if it has them, masks: scalars to be added."""
        with EventStorage():  # detectron2 logs metrics of its own during training and needs a place for them
            return self.rcnn([{"image": sample.image, "instances": _to_instances(sample)} for sample in samples])

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """Detect objects on UInt8[3,H,W] RGB images of any sizes, on the model's device; requires eval mode."""
        size, interpolation = self.architecture.size, self.architecture.interpolation
        resized = [resize_to_longer_side(image.float(), size, interpolation) for image in images]
        instances = self.rcnn.inference([{"image": image} for image in resized], do_postprocess=False)
        return [_to_detections(each, image) for each, image in zip(instances, images, strict=True)]

    def no_weight_decay(self) -> set[str]:
        """Return the names of the encoder's parameters that are exempt from weight decay."""
        return {self._encoder_prefix + name for name in self._encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups for layer decay: the encoder's stem, then its blocks; the rest comes last."""
        return self._encoder.group_matcher(coarse, prefix=self._encoder_prefix)

    @property
    def _encoder(self) -> FeatureEncoder:
        return self.get_submodule(self._encoder_prefix.rstrip("."))  # type: ignore[return-value]

    @property
    def _encoder_prefix(self) -> str:
        """What the names of the encoder's parameters begin with."""
        return f"rcnn.backbone.{'bottom_up' if isinstance(self.rcnn.backbone, FPN) else 'net'}.encoder."


def _to_instances(sample: DetectionSample) -> Instances:
    instances = Instances(sample.image.shape[-2:], gt_boxes=Boxes(sample.boxes), gt_classes=sample.labels)
    if sample.masks is not None:
        instances.gt_masks = BitMasks(sample.masks.bool())
    return instances


def _to_detections(instances: Instances, image: Tensor) -> Detections:
    """Map detections from the resized image to the original one.

    Masks are pasted one at a time: a hundred masks of a large photograph do not fit in memory.
    """
    hw = image.shape[-2:]
    if not instances.has("pred_masks"):
        restored = detector_postprocess(instances, *hw)
        return Detections(restored.pred_boxes.tensor.float(), restored.scores.float(), restored.pred_classes, None)
    kept, masks = [], []
    for i in range(len(instances)):
        restored = detector_postprocess(instances[i : i + 1], *hw)
        if len(restored):  # detectron2 drops boxes outside the image
            kept.append(restored)
            masks.append(encode_bitmap(restored.pred_masks[0]))
            restored.remove("pred_masks")
    if not kept:
        return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), [])
    merged = Instances.cat(kept)
    return Detections(merged.pred_boxes.tensor.float(), merged.scores.float(), merged.pred_classes, masks)
