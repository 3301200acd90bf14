"""ViTDet's simple feature pyramid as a detectron2 backbone, for encoders of any patch size."""

import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor

from addp_core.base.errors import UserError
from det.native.backbone import EncoderBackbone
from det.native.config import LEVELS, encoder_options, square_pad
from det.native.consumers import levels_of, missing_levels
from det.pyramid import make_level

LAST_STAGE = 5  # p5, of stride 32: further levels are pooled (p6), or two convolutions (p6 and p7), as in FPN


@BACKBONE_REGISTRY.register()
class EncoderPyramid(Backbone):
    """Maps p2, p3, ... of strides 4, 8, ... from the encoder's last map, with the layers and names of detectron2's
    SimpleFeaturePyramid, which takes patches of 16 pixels alone.

    The maps of patches whose size is no power of two are first resampled to the nearest one. In a yacs config,
    MODEL.BACKBONE.NAME is "EncoderPyramid", MODEL.ENCODER describes the encoder, and MODEL.FPN.OUT_CHANNELS is read.
    """

    @configurable
    def __init__(
        self,
        *,
        net: EncoderBackbone,
        out_channels: int = 256,
        levels: Sequence[str] = LEVELS,
        square_pad: int = 0,
    ):
        """Build a pyramid over a backbone of one map.

        Args:
            net: the backbone.
            out_channels: channels of every level.
            levels: names of consecutive levels; p<n> has the stride 2 ** n. p6 is pooled from p5 if it is the last
                one; p6 and p7 are convolutions, as RetinaNet's.
            square_pad: pad images to squares of this side, as ViTDet does; 0: only to multiples of the largest stride.

        Raises:
            UserError: if the levels are not consecutive.
        """
        super().__init__()
        self.net = net
        net.stride = 2 ** round(math.log2(net.stride))
        numbers = _numbers(levels)
        stages = [n for n in numbers if n <= LAST_STAGE]
        for n in stages:
            self.add_module(f"simfp_{n}", make_level(net.encoder.config.width, out_channels, net.stride / 2**n))
        self.stages, self.top_block = stages, None
        if len(numbers) > len(stages):
            two = len(numbers) - len(stages) == 2
            self.top_block = LastLevelP6P7(out_channels, out_channels, "p5") if two else LastLevelMaxPool()
        self._out_features = list(levels)
        self._out_feature_strides = {f"p{n}": 2**n for n in numbers}
        self._out_feature_channels = dict.fromkeys(levels, out_channels)
        self._size_divisibility, self._square_pad = max(net.stride, 2 ** stages[-1]), square_pad

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        options = encoder_options(cfg)
        levels = tuple(options["levels"]) or levels_of(cfg)
        _numbers(levels)
        if problem := missing_levels(cfg, levels):
            raise UserError(problem)
        return {
            "net": EncoderBackbone(cfg, input_shape),
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "levels": levels,
            "square_pad": square_pad(cfg),
        }

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalized Float[B,3,H,W], sides divisible by `size_divisibility` -> maps Float[B,C,H/stride,W/stride]."""
        tokens = self.net(images)[self.net.out_feature]
        maps = [getattr(self, f"simfp_{n}")(tokens) for n in self.stages]
        if self.top_block is not None:
            maps += self.top_block(maps[-1])
        return dict(zip(self._out_features, maps, strict=True))


def _numbers(levels: Sequence[str]) -> list[int]:
    """Return the numbers of p2, p3, ... Raises UserError if there is no consecutive order in them."""
    expected = "expected consecutive levels from p0 to p7, such as p2, p3, p4, p5, p6"
    try:
        numbers = [int(level.removeprefix("p")) for level in levels]
    except ValueError as error:
        raise UserError(f"MODEL.ENCODER.levels: found {list(levels)}, {expected}") from error
    if not numbers or numbers != list(range(numbers[0], numbers[-1] + 1)) or not 0 <= numbers[0] <= LAST_STAGE:
        raise UserError(f"MODEL.ENCODER.levels: found {list(levels)}, {expected}")
    if numbers[-1] > LAST_STAGE + 2:
        raise UserError(f"MODEL.ENCODER.levels: found {list(levels)}, {expected}")
    return numbers
