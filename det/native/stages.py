"""The four stages of a CNN as a backbone of detectron2, and its Mask R-CNN with its own FPN (arXiv 1612.03144) over
them.
"""

from typing import Any

from detectron2.config import LazyCall
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from omegaconf import DictConfig
from torch import Tensor

from addp_core.networks.cnn import OUTPUT_STRIDES, CnnEncoder
from det.config import DetectorConfig, padded_size
from det.native.lazy import mask_rcnn

STAGE_NAMES = ("res2", "res3", "res4", "res5")  # of detectron2's ResNets
MAP_STRIDE = 16  # from which ViTDet's scales 4, 2, 1 and 0.5 give the strides of the stages


class StageBackbone(Backbone):
    """The maps of a CNN's stages, under the names of detectron2's ResNets. The batch norms' statistics are frozen."""

    def __init__(self, encoder: CnnEncoder):
        super().__init__()
        encoder.freeze_statistics()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalized Float[B,3,H,W] -> Float[B,C,H/stride,W/stride] by name."""
        return dict(zip(STAGE_NAMES, self.encoder.forward_maps(images, range(self.encoder.depth)), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        config = self.encoder.config
        shapes = [ShapeSpec(channels=c, stride=s) for c, s in zip(config.channels, config.strides, strict=True)]
        return dict(zip(STAGE_NAMES, shapes, strict=True))

    @property
    def size_divisibility(self) -> int:
        return self.encoder.patch_size


def stage_mask_rcnn(
    net: Any, size: int, classes: int, detector: DetectorConfig, normalisation: str = "imagenet"
) -> DictConfig:
    """Return the config of `mask_rcnn` with an FPN over the stages of `net`, a `StageBackbone`, for its pyramid."""
    model = mask_rcnn(net, MAP_STRIDE, size, classes, detector, normalisation)
    model.backbone = LazyCall(FPN)(
        bottom_up=net,
        in_features=list(STAGE_NAMES),
        out_channels=detector.channels,
        top_block=model.backbone.top_block,
        square_pad=padded_size(size, OUTPUT_STRIDES[-1]),
    )
    return model
