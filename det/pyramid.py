"""ViTDet's simple feature pyramid (arXiv 2203.16527), maps of several strides from the encoder's last map alone; and
the feature pyramid network (FPN: arXiv 1612.03144) over the four stages of a CNN.

Parameters of the first are named as in detectron2's SimpleFeaturePyramid (`net.*`, `simfp_<log2 of the stride>.*`), so
that weights can be exchanged without renaming.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from addp_core.base.errors import UserError
from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.encoder import TransformerEncoder

NORM_EPS = 1e-6  # as in ViTDet


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of Float[B,C,h,w]."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Conv2d):
    """A convolution without bias, followed by a `ChannelNorm`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = ChannelNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class FeaturePyramid(nn.Module):
    """Maps of `channels` channels at the size of the encoder's map times each of `scales` (from 4, 2, 1, 0.5), and one
    more level at half the size of the last.

    The encoder's final norm is frozen, because the maps are taken before it.
    Raises UserError if a level's stride is not a whole number of pixels.
    """

    def __init__(
        self, encoder: TransformerEncoder, channels: int = 256, scales: Sequence[float] = (4.0, 2.0, 1.0, 0.5)
    ):
        super().__init__()
        self.net, self.out_channels = encoder, channels
        strides = [encoder.patch_size / scale for scale in scales]
        if any(stride < 1 or stride % 1 for stride in strides):
            raise UserError(
                f"detector.scales: found {list(scales)} with {encoder.patch_size}-pixel patches, "
                "expected strides of whole pixels"
            )
        self.strides = [*map(int, strides), int(2 * strides[-1])]
        self.levels = [f"simfp_{int(math.log2(stride))}" for stride in strides]
        for level, scale in zip(self.levels, scales, strict=True):
            self.add_module(level, make_level(encoder.config.width, channels, scale))
        encoder.norm.requires_grad_(False)

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Normalized Float[B,3,H,W] with sides divisible by the patch size -> maps "0", "1", ... of
        Float[B,C,H/stride,W/stride].
        """
        (tokens,) = self.net.forward_maps(images, [-1])
        # torchvision computes the anchors in the precision of the maps
        maps = [getattr(self, level)(tokens).float() for level in self.levels]
        maps.append(F.max_pool2d(maps[-1], 1, 2))
        return OrderedDict((str(i), map_) for i, map_ in enumerate(maps))


class StagePyramid(nn.Module):
    """torchvision's FPN over the stages of a CNN: maps of `channels` channels at their strides, and one more level at
    half the size of the last. The statistics of the CNN's batch norms are frozen.
    """

    def __init__(self, encoder: CnnEncoder, channels: int = 256):
        super().__init__()
        encoder.freeze_statistics()
        self.net, self.out_channels = encoder, channels
        self.strides = [*encoder.config.strides, 2 * encoder.config.strides[-1]]
        self.fpn = FeaturePyramidNetwork(list(encoder.config.channels), channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Normalized Float[B,3,H,W] -> maps "0", "1", ... of Float[B,C,H/stride,W/stride]."""
        stages = self.net.forward_maps(images, range(self.net.depth))
        maps = self.fpn(OrderedDict((str(i), map_) for i, map_ in enumerate(stages))).values()
        # torchvision computes the anchors in the precision of the maps
        return OrderedDict((str(i), map_.float()) for i, map_ in enumerate(maps))


def make_level(width: int, channels: int, scale: float) -> nn.Sequential:
    """Return the layers that turn Float[B,W,h,w] into Float[B,C,h*scale,w*scale]; `scale` is a power of two.

    Each doubling is a transposed convolution to half the channels, with norm and GELU between two of them; a smaller
    map is pooled. For 4, 2, 1 and 0.5 these are ViTDet's layers.
    """
    doublings = int(math.log2(scale))
    resize: list[nn.Module] = []
    for i in range(doublings):
        if i:
            resize += [ChannelNorm(width), nn.GELU()]
        resize.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width //= 2
    resize += [nn.MaxPool2d(2, 2) for _ in range(-doublings)]
    return nn.Sequential(*resize, ConvNorm(width, channels, 1), ConvNorm(channels, channels, 3))
