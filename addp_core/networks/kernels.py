"""Faster CPU implementations of some layers, without gradients; `compute.accelerate_model` enables them.

Reference: Winograd convolution (Lavin and Gray, arXiv 1509.09308), which cuDNN also chooses for such layers.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIRECT, WINOGRAD = "direct", "winograd"  # implementations of a convolution
HAS_WINOGRAD = torch._nnpack_available()  # the first call also initializes NNPACK
WINOGRAD_PIXELS = 16 * 16  # on smaller maps, transforming the kernels costs more than it saves
WINOGRAD_CHANNELS = 32
TILE = 6  # side in pixels of the output of one transform
SHARED_PIXELS = 64 * 64  # up to this size, the images of a batch share one transform of the kernels


Implementation = Callable[[Tensor], Tensor]


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size of the map.

    If `winograd` is set, large enough maps go through NNPACK's Winograd convolution F(6x6, 3x3), which needs a fifth of
    the multiplications. Its rounding error is about 1e-5 of the output's standard deviation, ten times that of a direct
    sum, and the result of an image does not depend on the rest of the batch.

    In bfloat16, the direct convolution has twice the speed, and it depends on the CPU and the shape which of the two is
    the faster. Winograd's is computed in float32 then too, as its transforms need.
    """

    winograd = False
    faster: Callable[[str, Mapping[str, Callable[[], Tensor]]], str] | None = None
    """In bfloat16: returns which of several implementations of a shape to take (`KernelChoices.faster`)."""

    def __init__(self, width_in: int, width: int, bias: bool = False):
        super().__init__(width_in, width, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,C,h,w] -> Float[B,C',h,w]."""
        if self.uses_winograd(x, x.shape[2], x.shape[3]):
            return self.winograd_convolution(x)
        return super().forward(x)

    def winograd_convolution(self, x: Tensor) -> Tensor:
        """Float[B,C,h,w] -> Float32[B,C',h,w]."""
        b, c, h, w = x.shape
        x = x.float()
        if b == 1:
            return self._nnpack(x)
        if h * w > SHARED_PIXELS:
            return torch.cat([self._nnpack(image) for image in x.split(1)])
        # Stack the images into a tall one. The zeros in between are the padding and start each image at a new tile.
        rows = h + TILE - h % TILE
        tall = F.pad(x, (0, 0, 0, rows - h)).transpose(0, 1).reshape(1, c, b * rows, w)
        return self._nnpack(tall).view(-1, b, rows, w)[:, :, :h].transpose(0, 1).contiguous()

    def _nnpack(self, x: Tensor) -> Tensor:
        return torch._nnpack_spatial_convolution(x, self.weight, self.bias, [1, 1], [1, 1])

    def uses_winograd(
        self, x: Tensor, h: int, w: int, winograd: Implementation | None = None, direct: Implementation | None = None
    ) -> bool:
        """Return whether the map of x takes the Winograd convolution.

        Args:
            x: the input, Float[B,C,h',w'].
            h, w: rows and columns of the output.
            winograd, direct: compute the output in either way (default: this convolution).
        """
        possible = (
            self.winograd
            and h * w >= WINOGRAD_PIXELS
            and min(self.in_channels, self.out_channels) >= WINOGRAD_CHANNELS
            and self.weight.dtype == torch.float32
            and not (x.is_cuda or torch.is_grad_enabled())
        )
        if not possible or not torch.is_autocast_enabled("cpu"):
            return possible and x.dtype == torch.float32
        if self.faster is None:
            return False
        shape = f"{self.in_channels} x {x.shape[2]} x {x.shape[3]} to {self.out_channels} x {h} x {w}"
        winograd, direct = winograd or self.winograd_convolution, direct or super().forward
        return self.faster(shape, {WINOGRAD: lambda: winograd(x), DIRECT: lambda: direct(x)}) == WINOGRAD


def norm_swish(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Return swish(norm(x)); without gradients, in one buffer."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def avg_pool_2x2(x: Tensor) -> Tensor:
    """Average 2x2 blocks, Float[B,C,2h,2w] -> Float[B,C,h,w]; on a CPU four times as fast as torch's pooling."""
    if x.is_cuda or torch.is_grad_enabled():
        return F.avg_pool2d(x, 2)
    rows = x[:, :, ::2] + x[:, :, 1::2]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)
