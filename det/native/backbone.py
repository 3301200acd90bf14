"""The suite's encoder as a detectron2 backbone: registered there, and the `net` of its SimpleFeaturePyramid."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor

from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import Encoder
from addp_core.weights.encoders import load_encoder


@BACKBONE_REGISTRY.register()
class EncoderBackbone(Backbone):
    """One feature map, `out_feature`: the patch tokens after the last block, at the stride of the patch size.

    In a LazyConfig, `encoder` is a LazyCall of `load_encoder`. In a yacs config, MODEL.BACKBONE.NAME is
    "EncoderBackbone" and the node MODEL.ENCODER holds the arguments of `load_encoder`, with those of AttentionConfig in
    its node `attention`.

    The encoder's final norm is frozen, because the map is taken before it.
    """

    @configurable
    def __init__(self, *, encoder: Encoder, checkpointing: bool = False, out_feature: str = "last_feat"):
        """checkpointing: activation checkpointing in the encoder."""
        super().__init__()
        self.encoder, self.out_feature = encoder, out_feature
        encoder.checkpointing = checkpointing
        encoder.norm.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        options = dict(cfg.MODEL.ENCODER)
        return {"encoder": load_encoder(**options | {"attention": AttentionConfig(**options.get("attention", {}))})}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalized Float[B,3,H,W] with sides divisible by `size_divisibility` -> Float[B,W,H/patch,W/patch]."""
        (tokens,) = self.encoder.forward_maps(images, [-1])
        return {self.out_feature: tokens}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {self.out_feature: ShapeSpec(channels=self.encoder.config.width, stride=self.encoder.patch_size)}

    @property
    def size_divisibility(self) -> int:
        return self.encoder.patch_size
