"""CNNs as backbones of detectron2: the maps of their four stages, its own FPN (arXiv 1612.03144) over them, and its
Mask R-CNN with that.
"""

import logging
from typing import Any, cast

from detectron2.config import CfgNode, LazyCall, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from omegaconf import DictConfig
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.networks.cnn import OUTPUT_STRIDES, CnnEncoder
from addp_core.weights.pretrained import has_cnn
from det.config import DetectorConfig, padded_size
from det.native.backbone import misplaced_encoder
from det.native.config import build_cnn, encoder_options, square_pad
from det.native.consumers import check_images, missing_levels
from det.native.lazy import mask_rcnn

log = logging.getLogger("detectron2.addp")

STAGE_NAMES = ("res2", "res3", "res4", "res5")  # of detectron2's ResNets
MAP_STRIDE = 16  # from which ViTDet's scales 4, 2, 1 and 0.5 give the strides of the stages


@BACKBONE_REGISTRY.register()
class EncoderStages(Backbone):
    """The maps of a CNN's stages, under the names of detectron2's ResNets: res2, res3, res4, res5.

    The statistics of the batch norms are frozen; their scales and shifts are trained. In a LazyConfig, `encoder` is a
    LazyCall of `load_encoder`. In a yacs config, MODEL.BACKBONE.NAME is "EncoderStages", and `det.add_encoder_config`
    adds the node MODEL.ENCODER; MODEL.BACKBONE.FREEZE_AT is read as by detectron2's ResNets.

    Loading a checkpoint that holds nothing for this backbone, but a pretrained CNN under other names, raises UserError.
    """

    @configurable
    def __init__(self, *, encoder: CnnEncoder, checkpointing: bool = False, freeze_at: int = 0):
        """Wrap a CNN.

        Args:
            encoder: the CNN.
            checkpointing: activation checkpointing in it.
            freeze_at: 1 freezes the stem, 2 also the first stage, and so on; 0: nothing.

        Raises:
            UserError: if it has no so many stages.
        """
        super().__init__()
        encoder.freeze_statistics()
        encoder.checkpointing = checkpointing
        if freeze_at:
            try:
                encoder.freeze_stages(freeze_at)
            except ValueError as error:
                raise UserError(f"MODEL.BACKBONE.FREEZE_AT: {encoder.config.arch}: {error}") from error
        self.encoder = encoder
        self.register_load_state_dict_pre_hook(_refuse_other_checkpoints)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        options, freeze_at = encoder_options(cfg), cfg.MODEL.BACKBONE.FREEZE_AT
        check_images(cfg)
        if cfg.MODEL.BACKBONE.NAME == "EncoderStages" and (problem := missing_levels(cfg, STAGE_NAMES)):
            log.warning(problem)  # no error: heads of other projects may leave these keys as they are
        if options["init"] == "random" and freeze_at:
            log.warning("MODEL.BACKBONE.FREEZE_AT=%s: freezes random weights; 0 trains all of them", freeze_at)
        encoder = build_cnn(options)
        return {"encoder": encoder, "checkpointing": options["checkpointing"], "freeze_at": freeze_at}

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


@BACKBONE_REGISTRY.register()
class EncoderFPN(FPN):
    """detectron2's FPN over the stages of a CNN: maps p2 to p6, or p3 to p7 for RetinaNet.

    In a yacs config, MODEL.BACKBONE.NAME is "EncoderFPN"; MODEL.FPN is read as by detectron2's FPN over ResNets. In a
    LazyConfig, detectron2's own FPN takes an `EncoderStages` as `bottom_up`.
    """

    @configurable
    def __init__(self, **options: Any):
        """Build detectron2's FPN with these arguments."""
        super().__init__(**options)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.FPN
        names = list(node.IN_FEATURES) or [*STAGE_NAMES]
        if unknown := [name for name in names if name not in STAGE_NAMES]:
            raise UserError(
                f"MODEL.FPN.IN_FEATURES: found {', '.join(unknown)}, expected some of {', '.join(STAGE_NAMES)}"
            )
        top, levels = LastLevelMaxPool(), [name.replace("res", "p") for name in names] + ["p6"]
        bottom_up = EncoderStages(cfg, input_shape)
        if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
            top, levels = LastLevelP6P7(bottom_up.encoder.width, node.OUT_CHANNELS), [*levels, "p7"]
        if problem := missing_levels(cfg, levels):
            raise UserError(problem)
        return {
            "bottom_up": bottom_up,
            "in_features": names,
            "out_channels": node.OUT_CHANNELS,
            "norm": node.NORM,
            "top_block": top,
            "fuse_type": node.FUSE_TYPE,
            "square_pad": square_pad(cfg),
        }


def _refuse_other_checkpoints(
    module: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    _metadata: dict,
    _strict: bool,
    _missing: list[str],
    unexpected: list[str],
    _errors: list[str],
) -> None:
    """Raise UserError where detectron2's checkpointer would go on with random weights: if a pretrained CNN is loaded
    into a detector. `state` is what the checkpoint holds below `prefix`, `unexpected` has names that nothing takes.
    """
    if not state and has_cnn(unexpected, cast(EncoderStages, module).encoder):
        raise misplaced_encoder(f"{prefix}encoder.")


def stage_mask_rcnn(
    net: Any, size: int, classes: int, detector: DetectorConfig, normalisation: str = "imagenet"
) -> DictConfig:
    """Return the config of `mask_rcnn` with an FPN over the stages of `net`, an `EncoderStages`, for its pyramid."""
    model = mask_rcnn(net, MAP_STRIDE, size, classes, detector, normalisation)
    model.backbone = LazyCall(FPN)(
        bottom_up=net,
        in_features=list(STAGE_NAMES),
        out_channels=detector.channels,
        top_block=model.backbone.top_block,
        square_pad=padded_size(size, OUTPUT_STRIDES[-1]),
    )
    return model
