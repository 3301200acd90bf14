"""ViTDet's simple feature pyramid (arXiv 2203.16527): maps of several strides from the encoder's last map alone.

Parameters are named as in detectron2's SimpleFeaturePyramid (`net.*`, `simfp_<log2 of the stride>.*`), so that weights
go from one to the other as they are.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.base.errors import UserError
from addp_core.networks.encoder import Encoder

EPS = 1e-6  # of every norm, as ViTDet's


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of Float[B,C,h,w]."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv(nn.Conv2d):
    """A convolution without bias, then its norm."""

    def __init__(self, inputs: int, outputs: int, size: int):
        super().__init__(inputs, outputs, size, padding=size // 2, bias=False)
        self.norm = ChannelNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class FeaturePyramid(nn.Module):
    """Maps of `channels` channels at the encoder's map's size times each of `scales` (of 4, 2, 1, 0.5), and one more
    at half the last one's size.

    The encoder's final norm, which its maps do not use, is frozen.
    """

    def __init__(self, encoder: Encoder, channels: int = 256, scales: Sequence[float] = (4.0, 2.0, 1.0, 0.5)):
        super().__init__()
        self.net, self.out_channels = encoder, channels
        strides = [encoder.patch_size / scale for scale in scales]
        if any(stride < 1 or stride % 1 for stride in strides):
            raise UserError(
                f"detector.scales: found {list(scales)} of the map of {encoder.patch_size}-pixel patches, "
                "expected strides of whole pixels"
            )
        self.strides = [*map(int, strides), int(2 * strides[-1])]
        self.stages = [f"simfp_{int(math.log2(stride))}" for stride in strides]
        for stage, scale in zip(self.stages, scales, strict=True):
            self.add_module(stage, _stage(encoder.config.width, channels, scale))
        encoder.norm.requires_grad_(False)

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Float[B,3,H,W] normalised, sides multiples of the patch -> "0", "1", ...: Float[B,C,H/stride,W/stride]."""
        (tokens,) = self.net.forward_maps(images, [-1])
        # torchvision places its anchors in the precision of the maps
        maps = [getattr(self, stage)(tokens).float() for stage in self.stages]
        maps.append(F.max_pool2d(maps[-1], 1, 2))
        return OrderedDict((str(i), map_) for i, map_ in enumerate(maps))


def _stage(width: int, channels: int, scale: float) -> nn.Sequential:
    """One map's size and channels from Float[B,W,h,w]."""
    if scale == 4.0:
        half, quarter = width // 2, width // 4
        first = nn.ConvTranspose2d(width, half, 2, 2)
        resize, inner = [first, ChannelNorm(half), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)], quarter
    elif scale == 2.0:
        resize, inner = [nn.ConvTranspose2d(width, width // 2, 2, 2)], width // 2
    else:
        resize, inner = [] if scale == 1.0 else [nn.MaxPool2d(2, 2)], width
    return nn.Sequential(*resize, NormedConv(inner, channels, 1), NormedConv(channels, channels, 3))
