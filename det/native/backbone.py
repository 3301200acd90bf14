"""The suite's encoder as a detectron2 backbone: registered there, and the `net` of its SimpleFeaturePyramid."""

import logging
from collections.abc import Sequence
from typing import Any, cast

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.base.errors import UserError
from addp_core.networks.encoder import TransformerEncoder
from addp_core.networks.token_encoder import RGB, TokenEncoder
from addp_core.weights.pretrained import has_encoder
from det.native.config import build_encoder, encoder_options
from det.native.consumers import check_images, missing_levels

log = logging.getLogger("detectron2.addp")


@BACKBONE_REGISTRY.register()
class EncoderBackbone(Backbone):
    """One feature map, `out_feature`: the patch tokens after the last block, at the stride of the patch size.

    In a LazyConfig, `encoder` is a LazyCall of `load_encoder`. In a yacs config, MODEL.BACKBONE.NAME is
    "EncoderBackbone", and `det.add_encoder_config` adds the node MODEL.ENCODER with the arguments of `load_encoder`.

    The encoder's final norm is frozen, because the map is taken before it. Loading a checkpoint that holds nothing for
    this backbone, but a pretrained encoder under other names, raises UserError.
    """

    @configurable
    def __init__(
        self,
        *,
        encoder: TransformerEncoder,
        checkpointing: bool = False,
        out_feature: str = "last_feat",
        stride: int | None = None,
        dynamic: bool = True,
    ):
        """Wrap an encoder.

        Args:
            encoder: the encoder.
            checkpointing: activation checkpointing in the encoder.
            out_feature: the name of the map.
            stride: of the map in pixels; the default is the patch size, for another one the map is resampled.
            dynamic: take images of any size.
        """
        super().__init__()
        self.encoder, self.out_feature = encoder, out_feature
        self.stride = stride or encoder.patch_size
        encoder.checkpointing = checkpointing
        encoder.norm.requires_grad_(False)
        if dynamic:
            encoder.make_dynamic()
        self.register_load_state_dict_pre_hook(_refuse_other_checkpoints)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        options = encoder_options(cfg)
        check_images(cfg)
        problem = missing_levels(cfg, [options["out_feature"]])
        if problem and cfg.MODEL.BACKBONE.NAME == "EncoderBackbone":  # and not as the net of a pyramid
            log.warning(problem)  # no error: heads of other projects may leave these keys as they are
        names = ("checkpointing", "out_feature", "stride", "dynamic")
        encoder = build_encoder(options)
        if isinstance(encoder, TokenEncoder):  # its tokenizer needs the normalization of the images undone
            encoder.mean, encoder.std = (_of_unit_range(cfg.MODEL[f"PIXEL_{part}"]) for part in ("MEAN", "STD"))
        return {"encoder": encoder, **{name: options[name] for name in names}}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalized Float[B,3,H,W] with sides divisible by `size_divisibility` -> Float[B,W,H/stride,W/stride]."""
        patch = self.encoder.patch_size
        if self.stride == patch:
            (tokens,) = self.encoder.forward_maps(images, [-1])
            return {self.out_feature: tokens}
        height, width = images.shape[-2:]
        (tokens,) = self.encoder.forward_maps(F.pad(images, (0, -width % patch, 0, -height % patch)), [-1])
        # positions are kept: the map's cell j lies at (j + 1/2) * stride pixels
        tokens = F.interpolate(tokens, scale_factor=patch / self.stride, mode="bilinear")
        return {self.out_feature: tokens[..., : height // self.stride, : width // self.stride]}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {self.out_feature: ShapeSpec(channels=self.encoder.config.width, stride=self.stride)}

    @property
    def size_divisibility(self) -> int:
        return self.stride


def _of_unit_range(values: Sequence[float]) -> RGB:
    """Return values of the channels of images in [0,255] as those of images in [0,1]."""
    red, green, blue = (float(value) / 255 for value in values)
    return red, green, blue


def misplaced_encoder(prefix: str) -> UserError:
    """Return the error for a pretrained encoder that is loaded as a detector, whose encoder has names with `prefix`."""
    return UserError(
        "the checkpoint has an encoder under other names, and nothing under those of this detector "
        f"({prefix}...); expected it as MODEL.ENCODER.source (yacs) or encoder.source (LazyConfig), with no "
        "MODEL.WEIGHTS or train.init_checkpoint; `addp export layout=detectron2` writes a file that can be one"
    )


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
    """Raise UserError where detectron2's checkpointer would go on with random weights: if a pretrained encoder is
    loaded into a detector, or positions of another image size were left out.

    Module.load_state_dict calls it with what a checkpoint holds below `prefix`, and with the names that nothing takes.
    """
    ours = f"{prefix}encoder."
    if not any(name.startswith(ours) for name in state):
        if not state and has_encoder(unexpected):  # and no detector of another backbone
            raise misplaced_encoder(ours)
        return
    encoder = cast(EncoderBackbone, module).encoder
    if f"{ours}{encoder.position_name}" not in state:  # detectron2 drops tensors of other shapes
        size = " x ".join(map(str, encoder.image_size))
        raise UserError(
            f"{ours}{encoder.position_name}: the checkpoint has none for images of {size} pixels; expected "
            "MODEL.ENCODER.img_size (yacs) or encoder.img_size (LazyConfig) to be that of the checkpoint"
        )
