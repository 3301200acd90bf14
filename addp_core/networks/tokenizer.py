"""The image tokenizer: MaskGIT's VQGAN, and the vocabulary that the transformers build on its codebook.

Images in [0, 1] become a grid of codebook ids and come back as unclamped images. No attention, GroupNorm with swish,
average pooling on the way down, nearest-neighbour upsampling with a 3x3 convolution on the way up.
References: VQGAN (arXiv 2012.09841), MaskGIT (2202.04200). Module names are those of published files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.networks.kernels import Conv3x3, avg_pool_2x2, norm_swish


@dataclass(frozen=True)
class TokenizerConfig:
    """Architecture of the VQGAN; the defaults are the published one (54.5 M parameters)."""

    width: Annotated[int, Ge(1), "channels at full resolution, a multiple of groups"] = 128
    multipliers: Annotated[
        tuple[int, ...], "width multiplier of each level; every level but the last halves the grid"
    ] = (1, 1, 2, 2, 4)
    blocks: Annotated[int, Ge(1), "residual blocks a level"] = 2
    codebook: Annotated[int, Ge(2), "number of codes"] = 1024
    dim: Annotated[int, Ge(1), "width of a code"] = 256
    # With one channel a group, the decoder can hardly tell a dark image from a bright one; published widths have four.
    groups: Annotated[int, Ge(1), "groups of every norm; a quarter of width is good for narrow models"] = 32

    def __post_init__(self):
        if self.width % self.groups:
            raise ValueError(f"width: found {self.width}, expected a multiple of groups = {self.groups}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers: found {self.multipliers}, expected one whole number >= 1 for each level")

    @property
    def stride(self) -> int:
        """Pixels a token spans, per side."""
        return 2 ** (len(self.multipliers) - 1)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of an image (height, width). ValueError where the stride does not divide it."""
        height, width = image_size
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"image size {height} x {width}: expected multiples of the tokenizer's stride {self.stride}"
            )
        return height // self.stride, width // self.stride


@dataclass(frozen=True)
class Vocabulary:
    """Ids that the transformers know: the codebook's, unused slots (1000 classes in MaskGIT), and one mask id, the
    last.
    """

    codebook: int
    unused: int = 1000
    class_slot: int = 76  # which unused slot stands in front of the sequence: id 1100 in published files

    def __post_init__(self):
        if not 0 <= self.class_slot < self.unused:
            raise ValueError(f"class_slot: found {self.class_slot}, expected one of the {self.unused} unused slots")

    @classmethod
    def with_slots(cls, codebook: int, unused: int) -> "Vocabulary":
        """With `unused` slots, the class slot the published one, or the last where there are fewer."""
        return cls(codebook, unused, min(cls.class_slot, unused - 1))

    @property
    def size(self) -> int:
        return self.codebook + self.unused + 1

    @property
    def class_id(self) -> int:
        return self.codebook + self.class_slot

    @property
    def mask_id(self) -> int:
        return self.size - 1


class Tokenizer(nn.Module):
    """VQGAN. `grid` is the token grid (rows, columns) that `lookup` assumes where it is not told one."""

    def __init__(self, config: TokenizerConfig, grid: tuple[int, int] | None = None):
        super().__init__()
        self.config = config
        self.grid = grid
        self.chunk_size: int | None = None  # compute only: images in one go where nothing trains; None is all
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook, config.dim)

    def encode(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] in [0,1] -> Long[B,N] codebook ids, row-major over the token grid."""
        return self._each(lambda x: self.quantize.nearest_ids(self.encoder(x)), images)

    def lookup(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Long[B,N] ids -> Float[B,D,h,w] code embeddings. ValueError where N does not fit the grid."""
        h, w = grid or self.grid or _square(ids.shape[1])
        if h * w != ids.shape[1]:
            raise ValueError(f"lookup: found {ids.shape[1]} ids, expected {h} x {w}; pass grid=(rows, columns)")
        return to_feature_map(self.quantize.embedding(ids), (h, w))

    def decode(self, embeddings: Tensor) -> Tensor:
        """Float[B,D,h,w] code embeddings (or mixtures of them) -> Float[B,3,H,W], unclamped."""
        return self._each(self.decoder, embeddings)

    def _each(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of the batch `x`, or of some images at a time."""
        if self.chunk_size is None or len(x) <= self.chunk_size or torch.is_grad_enabled():
            return function(x)
        return torch.cat([function(rows) for rows in x.split(self.chunk_size)])


def to_feature_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Float[B,N,D] tokens, row-major -> Float[B,D,h,w]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def _square(n: int) -> tuple[int, int]:
    side = math.isqrt(n)
    return side, side


class Codebook(nn.Module):
    def __init__(self, size: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def did_you_mean(self, h: Tensor) -> Tensor:
        """Float[B,D,h,w] -> Long[B,h*w], the id of the nearest code by Euclidean distance."""
        codes = self.embedding.weight.float()
        h = h.flatten(2).transpose(1, 2).float()
        # |h|^2 is the same for every code and cannot change which is nearest. float32: bf16 distances would tie.
        with torch.autocast(h.device.type, enabled=False):
            return (codes.square().sum(1) - 2 * h @ codes.T).argmin(-1)


class Encoder(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = Conv3x3(3, config.width)
        self.down = nn.ModuleList()
        previous = config.width
        for width in widths:
            level = nn.Module()
            level.block = residual_blocks(previous, width, config)
            self.down.append(level)
            previous = width
        self.mid = middle(previous, config)
        self.norm_out = group_norm(previous, config)
        self.conv_out = nn.Conv2d(previous, config.dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,3,H,W] in [0,1] -> Float[B,D,h,w], before quantization."""
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            if i:
                x = avg_pool_2x2(x)
            for block in level.block:
                x = block(x)
        x = self.mid.block_2(self.mid.block_1(x))
        return self.conv_out(norm_swish(self.norm_out, x))


class Decoder(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        previous = widths[-1]
        self.conv_in = Conv3x3(config.dim, previous, bias=True)
        self.mid = middle(previous, config)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            level = nn.Module()
            level.block = residual_blocks(previous, width, config)
            if i:
                level.upsample = Upsample(width)
            levels.append(level)
            previous = width
        self.up = nn.ModuleList(reversed(levels))  # published files count from the full resolution
        self.norm_out = group_norm(previous, config)
        self.conv_out = Conv3x3(previous, 3, bias=True)

    def forward(self, z: Tensor) -> Tensor:
        """Float[B,D,h,w] -> Float[B,3,H,W]."""
        x = self.mid.block_2(self.mid.block_1(self.conv_in(z)))
        for i, level in reversed(list(enumerate(self.up))):
            for block in level.block:
                x = block(x)
            if i:
                x = level.upsample(x)
        return self.conv_out(norm_swish(self.norm_out, x))


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, config: TokenizerConfig):
        super().__init__()
        self.norm1 = group_norm(width_in, config)
        self.conv1 = Conv3x3(width_in, width)
        self.norm2 = group_norm(width, config)
        self.conv2 = Conv3x3(width, width)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_swish(self.norm1, x))
        h = self.conv2(norm_swish(self.norm2, h))
        # MaskGIT's quirk: where the width changes, the shortcut starts from the block's own output, not from its input.
        return self.nin_shortcut(h).add_(h) if hasattr(self, "nin_shortcut") else h.add_(x)


class Upsample(nn.Module):
    """Nearest-neighbour x2, then a 3x3 convolution, computed as four 2x2 convolutions on the small map.

    Each output phase sees only 2x2 different input pixels, so the taps that fall on the same pixel are summed first:
    the same result with 4/9 of the multiplications and without the enlarged input. Winograd's way saves more than that.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv3x3(width, width, bias=True)
        # fold[phase][pixel][tap]: which of three taps fall on the first and the second pixel that a phase sees
        fold = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        self.register_buffer("fold", fold, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,C,h,w] -> Float[B,C,2h,2w]."""
        b, c, h, w = x.shape
        if self.conv.uses_winograd(x, 2 * h, 2 * w):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
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
    return nn.GroupNorm(config.groups, width, eps=1e-6)


def residual_blocks(width_in: int, width: int, config: TokenizerConfig) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(width if i else width_in, width, config) for i in range(config.blocks))


def middle(width: int, config: TokenizerConfig) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.block_2 = ResidualBlock(width, width, config), ResidualBlock(width, width, config)
    return mid
