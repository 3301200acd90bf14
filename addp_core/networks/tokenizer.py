"""The image tokenizer: MaskGIT's VQGAN, and the vocabulary that the transformers build on its codebook.

It maps images in [0, 1] to a grid of codebook ids, and ids back to unclamped images. There is no attention; norms are
GroupNorm followed by swish; the encoder downsamples by average pooling, the decoder upsamples by nearest neighbor and a
3x3 convolution. References: VQGAN (arXiv 2012.09841), MaskGIT (2202.04200). Module names are those of the published
checkpoints.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.networks.config import TokenizerConfig as TokenizerConfig
from addp_core.networks.config import Vocabulary as Vocabulary
from addp_core.networks.kernels import Conv3x3, avg_pool_2x2, norm_swish

NORM_EPS = 1e-6  # of every GroupNorm


class Tokenizer(nn.Module):
    """The VQGAN.

    grid: rows and columns of tokens that `lookup` assumes by default.
    """

    def __init__(self, config: TokenizerConfig, grid: tuple[int, int] | None = None):
        super().__init__()
        self.config = config
        self.grid = grid
        self.chunk_pixels: int | None = None  # compute only: pixels at a time without gradients; None: the whole batch
        self.encoder = VQEncoder(config)
        self.decoder = VQDecoder(config)
        self.quantize = Codebook(config.codebook, config.dim)

    def encode(self, images: Tensor) -> Tensor:
        """Map images Float[B,3,H,W] in [0,1] to codebook ids Long[B,N], row-major over the token grid.

        Autocast does not apply: in bfloat16, some of the ids would be others (docs/fidelity.md).
        """
        images = images.to(self.encoder.conv_in.weight.dtype)
        with torch.autocast(images.device.type, enabled=False):
            return self._in_chunks(lambda x: self.quantize.nearest_ids(self.encoder(x)), images, stride=1)

    def lookup(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Map ids Long[B,N] to code embeddings Float[B,D,h,w].

        grid: rows and columns (default: the tokenizer's, or else square). Raises ValueError if N does not fit.
        """
        h, w = grid or self.grid or _square_grid(ids.shape[1])
        if h * w != ids.shape[1]:
            raise ValueError(f"lookup: found {ids.shape[1]} ids, expected {h} x {w}; pass grid=(rows, columns)")
        return to_feature_map(self.quantize.embedding(ids), (h, w))

    def decode(self, embeddings: Tensor) -> Tensor:
        """Map code embeddings or mixtures of them, Float[B,D,h,w], to unclamped images Float[B,3,H,W]."""
        return self._in_chunks(self.decoder, embeddings, self.config.stride)

    def _in_chunks(self, function: Callable[[Tensor], Tensor], x: Tensor, stride: int) -> Tensor:
        """Apply `function` to the batch, as many images at a time as have `chunk_pixels` pixels, but at least one.

        stride: side in pixels of what a position of x stands for.
        """
        if self.chunk_pixels is None or torch.is_grad_enabled():
            return function(x)
        images = max(1, self.chunk_pixels // (x.shape[2] * x.shape[3] * stride**2))
        return function(x) if len(x) <= images else torch.cat([function(chunk) for chunk in x.split(images)])


def to_feature_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Arrange row-major tokens on their grid: Float[B,N,D] -> Float[B,D,h,w]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def _square_grid(n: int) -> tuple[int, int]:
    side = math.isqrt(n)
    return side, side


class Codebook(nn.Module):
    """The code embeddings."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def nearest_ids(self, h: Tensor) -> Tensor:
        """Return the ids of the nearest codes by Euclidean distance: Float[B,D,h,w] -> Long[B,h*w]."""
        codes = self.embedding.weight.float()
        h = h.flatten(2).transpose(1, 2).float()
        # |h|^2 is the same for every code and cannot change which is nearest. float32: bf16 distances would tie.
        with torch.autocast(h.device.type, enabled=False):
            return (codes.square().sum(1) - 2 * h @ codes.T).argmin(-1)


class VQEncoder(nn.Module):
    """The VQGAN's encoder."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.conv_in = Conv3x3(3, config.width)
        self.down = nn.ModuleList()
        width_in = config.width
        for multiplier in config.multipliers:
            width = config.width * multiplier
            self.down.append(Level(width_in, width, config))
            width_in = width
        self.mid = MiddleBlocks(width_in, config)
        self.norm_out = group_norm(width_in, config)
        self.conv_out = nn.Conv2d(width_in, config.dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images Float[B,3,H,W] in [0,1] to features Float[B,D,h,w] before quantization."""
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(avg_pool_2x2(x) if i else x)
        x = self.mid(x)
        return self.conv_out(norm_swish(self.norm_out, x))


class VQDecoder(nn.Module):
    """The VQGAN's decoder."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        width_in = config.width * config.multipliers[-1]
        self.conv_in = Conv3x3(config.dim, width_in, bias=True)
        self.mid = MiddleBlocks(width_in, config)
        levels = []
        for i, multiplier in reversed(list(enumerate(config.multipliers))):
            width = config.width * multiplier
            levels.append(Level(width_in, width, config, upsample=i > 0))
            width_in = width
        self.up = nn.ModuleList(reversed(levels))  # published checkpoints count from the full resolution
        self.norm_out = group_norm(width_in, config)
        self.conv_out = Conv3x3(width_in, 3, bias=True)

    def forward(self, z: Tensor) -> Tensor:
        """Map code embeddings Float[B,D,h,w] to images Float[B,3,H,W]."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(norm_swish(self.norm_out, x))


class Level(nn.Module):
    """The residual blocks of one resolution, and in the decoder the upsampling to the next one."""

    def __init__(self, width_in: int, width: int, config: TokenizerConfig, upsample: bool = False):
        super().__init__()
        widths_in = [width_in] + [width] * (config.blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(block_width, width, config) for block_width in widths_in)
        self.upsample = Upsample(width) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,C,h,w] -> Float[B,C',h,w], or Float[B,C',2h,2w] with upsampling."""
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class MiddleBlocks(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, width: int, config: TokenizerConfig):
        super().__init__()
        self.block_1 = ResidualBlock(width, width, config)
        self.block_2 = ResidualBlock(width, width, config)

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,C,h,w] -> Float[B,C,h,w]."""
        return self.block_2(self.block_1(x))


class ResidualBlock(nn.Module):
    """Two convolutions, each after GroupNorm and swish, and a shortcut."""

    def __init__(self, width_in: int, width: int, config: TokenizerConfig):
        super().__init__()
        self.norm1 = group_norm(width_in, config)
        self.conv1 = Conv3x3(width_in, width)
        self.norm2 = group_norm(width, config)
        self.conv2 = Conv3x3(width, width)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,C,h,w] -> Float[B,C',h,w]."""
        h = self.conv1(norm_swish(self.norm1, x))
        h = self.conv2(norm_swish(self.norm2, h))
        # MaskGIT's quirk: where the width changes, the shortcut starts from the block's own output, not from its input.
        return self.nin_shortcut(h).add_(h) if hasattr(self, "nin_shortcut") else h.add_(x)


class Upsample(nn.Module):
    """Nearest-neighbor x2, then a 3x3 convolution, computed as four 2x2 convolutions on the small map.

    Each of the four output phases sees only 2x2 different input pixels, so kernel taps that fall on the same pixel are
    summed first. This gives the same result with 4/9 of the multiplications and without the enlarged input. Winograd's
    convolution, where it is used, saves more than that.
    """

    fold: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv3x3(width, width, bias=True)
        # fold[phase][pixel][tap]: which of three taps fall on the first and on the second pixel that a phase sees
        fold = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        self.register_buffer("fold", fold, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,C,h,w] -> Float[B,C,2h,2w]."""
        h, w = x.shape[-2:]
        if self.conv.uses_winograd(x, 2 * h, 2 * w, self._enlarged, self._folded):
            return self._enlarged(x)
        return self._folded(x)

    def _enlarged(self, x: Tensor) -> Tensor:
        return self.conv.winograd_convolution(F.interpolate(x.float(), scale_factor=2.0, mode="nearest"))

    def _folded(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernels = torch.einsum("pyi,qxj,ocij->pqocyx", self.fold, self.fold, self.conv.weight)
        padded = F.pad(x, (1, 1, 1, 1))
        phases = [
            F.conv2d(padded[:, :, p : p + h + 1, q : q + w + 1], kernels[p, q], self.conv.bias)
            for p in (0, 1)
            for q in (0, 1)
        ]
        out = torch.stack(phases, -1).view(b, c, h, w, 2, 2)
        return out.permute(0, 1, 2, 4, 3, 5).reshape(b, c, 2 * h, 2 * w)


def group_norm(width: int, config: TokenizerConfig) -> nn.GroupNorm:
    """Return a GroupNorm with the configured number of groups."""
    return GroupNorm(config.groups, width, eps=NORM_EPS)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm whose gradient stays finite on constant maps. The result is the same to the last bit.

    A black image gives maps of zeros: the first convolution has no bias, and until training moves them, neither have
    the norms. The derivative of a norm at zero variance is 1 / sqrt(eps) = 1000, so that over a few norms in a row the
    gradient overflows. Here, the gradient that a group passes to its input is multiplied by var / (var + eps): a map
    that is constant but for rounding passes on nothing, any other map what it did before. The gradients of weight and
    bias are exact, so that black images train all that comes after the last constant map.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,C,h,w] -> Float[B,C,h,w]."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        device = x.device.type
        if device != "cpu" and torch.is_autocast_enabled(device):
            x = x.float()  # what autocast does to nn.GroupNorm on these devices
        return _BoundedGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class _BoundedGroupNorm(torch.autograd.Function):
    """torch's group norm with the gradient that `GroupNorm` describes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        memory_format = _norm_memory_format(x)
        x = x.contiguous(memory_format=memory_format)
        b, c, h, w = x.shape
        out, mean, rstd = torch.native_group_norm(x, weight, bias, b, c, h * w, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        b, c, h, w = x.shape
        groups = rstd.shape[1]
        gradient = gradient.contiguous(memory_format=_norm_memory_format(x))
        to_x, to_weight, to_bias = torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, rstd, weight, b, c, h * w, groups, ctx.needs_input_grad[:3]
        )
        share = (1 - ctx.eps * rstd.square()).clamp_min(0)  # var / (var + eps)
        share = share.repeat_interleave(c // groups, dim=1)[..., None, None]
        return to_x * share.to(to_x.dtype), to_weight, to_bias, None, None


def _norm_memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format in which torch normalizes x: channels last stays as it is on a CPU only."""
    on_cpu = x.device.type == "cpu"
    channels_last = on_cpu and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
