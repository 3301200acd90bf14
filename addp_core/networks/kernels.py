"""Faster ways to compute the same on a CPU, in float32, without gradients. `compute.accelerate_model` switches them on.

References: Winograd convolution (Lavin and Gray, arXiv 1509.09308), which cuDNN also chooses for such layers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HAS_WINOGRAD = torch._nnpack_available()  # asking also starts it, once a process
WINOGRAD_PIXELS = 16 * 16  # below, transforming the kernels costs more than it saves
WINOGRAD_CHANNELS = 32
TILE = 6  # pixels a side that one transform yields
SHARED_PIXELS = 64 * 64  # up to here the images of a batch share the kernels' transform


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the image's size.

    With `winograd` set, large enough maps go through NNPACK's Winograd convolution F(6x6, 3x3): a fifth of the
    multiplications. Its rounding error is about 1e-5 of the output's spread, ten times that of a direct sum, and an
    image's result does not depend on the rest of the batch.
    """

    winograd = False

    def __init__(self, width_in: int, width: int, bias: bool = False):
        super().__init__(width_in, width, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,C,h,w] -> Float[B,C',h,w]."""
        b, c, h, w = x.shape
        if not self.uses_winograd(x, h, w):
            return super().forward(x)
        if b == 1:
            return self._convolve(x)
        if h * w > SHARED_PIXELS:
            return torch.cat([self._convolve(image) for image in x.split(1)])
        # One tall image, with zeros in between that serve as padding and let each image start a row of tiles.
        rows = h + TILE - h % TILE
        tall = F.pad(x, (0, 0, 0, rows - h)).transpose(0, 1).reshape(1, c, b * rows, w)
        return self._convolve(tall).view(-1, b, rows, w)[:, :, :h].transpose(0, 1).contiguous()

    def _convolve(self, x: Tensor) -> Tensor:
        return torch._nnpack_spatial_convolution(x, self.weight, self.bias, [1, 1], [1, 1])

    def uses_winograd(self, x: Tensor, h: int, w: int) -> bool:
        """Whether an input like `x`, of h x w pixels, goes that way."""
        return (
            self.winograd
            and h * w >= WINOGRAD_PIXELS
            and min(self.in_channels, self.out_channels) >= WINOGRAD_CHANNELS
            and x.dtype == self.weight.dtype == torch.float32
            and not (x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        )


def norm_swish(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """swish(norm(x)); without gradients in one buffer."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def avg_pool_2x2(x: Tensor) -> Tensor:
    """2x2 average pooling, Float[B,C,2h,2w] -> Float[B,C,h,w]."""
    if x.is_cuda or torch.is_grad_enabled():
        return F.avg_pool2d(x, 2)
    rows = x[:, :, ::2] + x[:, :, 1::2]  # four times as fast as the CPU's pooling
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)
