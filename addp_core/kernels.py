"""Faster ways to compute the same on a CPU, in float32, without gradients. `compute.accelerate_model` switches them on.

References: Winograd convolution (Lavin and Gray, arXiv 1509.09308), which cuDNN also chooses for such layers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINOGRAD_PIXELS = 32 * 32  # below, transforming the kernels costs more than it saves
WINOGRAD_CHANNELS = 32


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the image's size.

    With `winograd` set, large maps go one image at a time through NNPACK's Winograd convolution F(6x6, 3x3): a fifth of
    the multiplications. Its rounding error is about 1e-5 of the output's spread, ten times that of a direct sum.
    """

    winograd = False

    def __init__(self, width_in: int, width: int, bias: bool = False):
        super().__init__(width_in, width, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,C,h,w] -> Float[B,C',h,w]."""
        if not self.takes_winograd(x, *x.shape[-2:]):
            return super().forward(x)
        maps = [torch._nnpack_spatial_convolution(m, self.weight, self.bias, [1, 1], [1, 1]) for m in x.split(1)]
        return maps[0] if len(maps) == 1 else torch.cat(maps)

    def takes_winograd(self, x: Tensor, h: int, w: int) -> bool:
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


def halve(x: Tensor) -> Tensor:
    """2x2 average pooling, Float[B,C,2h,2w] -> Float[B,C,h,w]."""
    if x.is_cuda or torch.is_grad_enabled():
        return F.avg_pool2d(x, 2)
    rows = x[:, :, ::2] + x[:, :, 1::2]  # four times as fast as the CPU's pooling
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)
