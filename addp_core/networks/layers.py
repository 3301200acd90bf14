"""Parts shared by encoder, token decoder and token predictor: transformer blocks, the head over token ids and the
initialization.

The blocks are timm's modules with a forward pass of our own that can compute some positions only. References: ViT
(arXiv 2010.11929), MAE (2111.06377), MAGE (2211.09117).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from timm.layers import Mlp
from timm.models import vision_transformer
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from addp_core.networks.attention import (
    PLAIN_ATTENTION,
    AttentionConfig,
    DecomposedRelativePositions,
    RelativePositionTable,
    from_windows,
    to_windows,
)
from addp_core.networks.chunked_attention import chunked_attention
from addp_core.networks.config import check_heads as check_heads

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
MIN_DYNAMIC_SIZE = 2  # of a dimension whose size may vary within a graph of torch.compile
FLASH_WIDTH = 256  # the widest queries and keys that torch's flash attention takes
INIT_STD = 0.02  # of position embeddings, mask token, class token and token embeddings


def transformer_blocks(
    width: int,
    depth: int,
    heads: int,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    layer_scale: bool = False,
    attention: AttentionConfig = PLAIN_ATTENTION,
    grid: tuple[int, int] | None = None,
) -> nn.ModuleList:
    """Build `depth` pre-norm blocks (qkv bias, MLP ratio 4).

    Args:
        dropout: in attention and MLP.
        drop_path: stochastic depth of the last block; it grows linearly from 0.
        attention: windows and relative positions of the blocks.
        grid: rows and columns of the patches, needed for relative positions in blocks with global attention.
    """
    drop_path_rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    blocks = [Block(width, heads, dropout, rate, layer_scale) for rate in drop_path_rates]
    for block, window in zip(blocks, attention.windows(depth), strict=True):
        block.window = window
        if attention.relative == "none":
            continue
        attended_grid = (window, window) if window else grid
        assert attended_grid is not None, "relative positions need the grid"
        prefix_tokens = int(attention.class_token)
        if attention.relative == "decomposed":
            block.relative = DecomposedRelativePositions(attended_grid, width // heads, prefix_tokens)
        else:
            block.relative = RelativePositionTable(attended_grid, heads, prefix_tokens)
    return nn.ModuleList(blocks)


class Block(vision_transformer.Block):
    """timm's pre-norm block (its modules and parameter names) with optional windows and relative positions."""

    attn: "SelfAttention"  # type: ignore[assignment]  # with timm's layers in it
    mlp: Mlp
    window = 0  # side of the attention windows in patches; 0: global attention
    checkpointing = False  # compute only: in training, recompute the block's activations instead of storing them

    def __init__(self, width: int, heads: int, dropout: float, drop_path: float, layer_scale: bool = False):
        super().__init__(
            width,
            heads,
            qkv_bias=True,
            proj_drop=dropout,
            attn_drop=dropout,
            drop_path=drop_path,
            init_values=1.0 if layer_scale else None,
            norm_layer=LayerNorm,  # type: ignore[arg-type]  # timm calls it and needs no class
        )
        self.relative: nn.Module | None = None  # a class attribute would hide the submodule that is set later
        self.attn = SelfAttention(cast(vision_transformer.Attention, self.attn), dropout)
        self.mlp.drop1, self.mlp.drop2 = Dropout(dropout), Dropout(dropout)

    def forward(  # type: ignore[override]  # timm's third argument, is_causal, has no use here
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        queries: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Map Float[B,L,W] to Float[B,L,W], or to Float[B,Q,W] if only the positions `queries` are wanted.

        Args:
            attn_mask: Bool, broadcast to [B,heads,L,L]; True where a key may be attended to.
            queries: Long[B,Q], the positions to compute. A last block need not compute what nothing reads.
            grid: rows and columns of the patches, for windows and relative positions.
        """
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self._compute, x, attn_mask, queries, grid, use_reentrant=False)
        return self._compute(x, attn_mask, queries, grid)

    def _compute(
        self, x: Tensor, attn_mask: Tensor | None, queries: Tensor | None, grid: tuple[int, int] | None
    ) -> Tensor:
        h = self.attn(self.norm1(x), attn_mask, queries, self.relative, grid, self.window)
        if queries is not None:
            x = gather_tokens(x, queries)
        x = x + self.drop_path1(self.ls1(h))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def checkpoint_blocks(model: nn.Module, checkpointing: bool) -> None:
    """Let all transformer blocks of a model recompute their activations in the backward pass, or store them.

    Random numbers are drawn again as they were, so the gradients are the same to the last bit.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.checkpointing = checkpointing


class SelfAttention(nn.Module):
    """The layers of timm's attention, under their names, with optional relative positions and queries."""

    def __init__(self, layers: vision_transformer.Attention, dropout: float):
        super().__init__()
        self.num_heads, self.scale = layers.num_heads, layers.scale
        self.qkv, self.attn_drop = layers.qkv, Dropout(dropout)
        self.proj, self.proj_drop = layers.proj, Dropout(dropout)

    def forward(
        self,
        h: Tensor,
        attn_mask: Tensor | None = None,
        queries: Tensor | None = None,
        relative: nn.Module | None = None,
        grid: tuple[int, int] | None = None,
        window: int = 0,
    ) -> Tensor:
        """Map Float[B,L,W] to Float[B,L,W], or to Float[B,Q,W] for the positions `queries` only.

        Args:
            h: normalized tokens.
            attn_mask: Bool, broadcast to [B,heads,L,L]; True where a key may be attended to.
            queries: Long[B,Q], the positions to compute.
            relative: relative positions, whose bias takes the place of `attn_mask`.
            grid: rows and columns of the patches.
            window: attend within windows of this side in patches; 0: globally. Then only `h`, `relative` and `grid`
                may be given.
        """
        width = h.shape[-1]
        if window:
            assert grid is not None, "windows need the grid"
            return self.proj_drop(self.proj(self._attend_in_windows(self.qkv(h), relative, grid, window)))
        if queries is None:
            q, k, v = self.qkv(h).chunk(3, -1)
        else:
            (w_q, w_kv), (b_q, b_kv) = (p.split((width, 2 * width)) for p in (self.qkv.weight, self.qkv.bias))
            q = F.linear(gather_tokens(h, queries), w_q, b_q)
            k, v = F.linear(h, w_kv, b_kv).chunk(2, -1)
        q, k, v = map(self._to_heads, (q, k, v))
        if relative is None:
            x = self._attend(q, k, v, attn_mask)
        else:
            assert grid is not None, "relative positions need the grid"
            x = self._attend_with_positions(q, k, v, relative, grid)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def _to_heads(self, x: Tensor) -> Tensor:
        """Float[B,L,W] -> Float[B,heads,L,D]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _attend_in_windows(self, qkv: Tensor, relative: nn.Module | None, grid: tuple[int, int], side: int) -> Tensor:
        """Map queries, keys and values of a grid, Float[B,h*w,3W], to Float[B,h*w,W].

        Beyond the edge of the grid, tokens are zero, so that their keys and values are the layer's bias. On a CPU,
        windows at the edge are computed apart from the others, without the queries beyond it.
        """
        width, maps, rows_of_maps = qkv.shape[-1] // 3, qkv.unflatten(1, grid), []
        padding, window = self.qkv.bias.to(qkv.dtype), (side, side)
        apart = isinstance(relative, DecomposedRelativePositions) and self._is_chunked(qkv)
        row_sizes, column_sizes = (_sizes_up_to_last_window(size, side) if apart else [size] for size in grid)
        for rows in maps.split(row_sizes, 1):
            maps_of_row = []
            for x in rows.split(column_sizes, 2):
                size = (x.shape[1], x.shape[2])
                inside = (min(side, size[0]), min(side, size[1])) if apart else window
                q, kv = x.flatten(1, 2).split((width, 2 * width), -1)
                q = to_windows(q, size, inside, padding[:width])
                k, v = to_windows(kv, size, window, padding[width:]).chunk(2, -1)
                q, k, v = map(self._to_heads, (q, k, v))
                if relative is None:
                    x = self._attend(q, k, v, None)
                else:
                    x = self._attend_with_positions(q, k, v, relative, window, inside)
                maps_of_row.append(from_windows(x.transpose(1, 2).flatten(2), size, inside).unflatten(1, size))
            rows_of_maps.append(torch.cat(maps_of_row, 2) if len(maps_of_row) > 1 else maps_of_row[0])
        return (torch.cat(rows_of_maps, 1) if len(rows_of_maps) > 1 else rows_of_maps[0]).flatten(1, 2)

    def _is_chunked(self, x: Tensor) -> bool:
        """Whether attention with relative positions, or in half precision, goes through `chunked_attention`."""
        is_eager = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        return x.device.type == "cpu" and is_eager and not self.attn_drop.is_active

    def _attend_with_positions(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        relative: nn.Module,
        grid: tuple[int, int],
        of_queries: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attend with relative positions: all are Float[B,heads,L,D], and `grid` is that of the keys.

        What is fastest was measured on a CPU (docs/speed.md). On a GPU, half precision goes through a product of wider
        queries and keys: torch's flash attention takes no bias, and the bias would need as much memory as the scores.

        of_queries: the first rows and columns of `grid`, where the queries are (default: all); only if `_is_chunked`,
            and with decomposed positions.
        """
        is_half, scale = _is_half(q), self.scale
        if isinstance(relative, DecomposedRelativePositions) and not self.attn_drop.is_active:
            if self._is_chunked(q):
                # In half precision, adding short rows is slower than a wider product.
                if relative.prefix_tokens or (is_half and sum(grid) < q.shape[-1]):
                    return chunked_attention(*relative.product(q, k, scale, grid, of_queries), v)
                terms = (term.to(q.dtype) for term in relative.terms(q, grid, of_queries))
                return chunked_attention(q * scale, k, v, None, *terms)
            if is_half and q.device.type != "cpu" and q.shape[-1] + sum(grid) <= FLASH_WIDTH:
                wide_q, wide_k = relative.product(q, k, scale, grid)
                wide_v = F.pad(v, (0, wide_q.shape[-1] - v.shape[-1]))  # flash attention wants one width
                return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=1.0)[..., : v.shape[-1]]
        elif self._is_chunked(q):
            return chunked_attention(q * scale, k, v, relative(q, grid))
        return self._attend(q, k, v, relative(q, grid).to(q.dtype))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with a mask (Bool) or bias (Float), broadcast to [B,heads,Q,L]: all are Float[B,heads,L,D]."""
        if mask is None and _is_half(q) and self._is_chunked(q):
            return chunked_attention(q * self.scale, k, v)  # 1.4 to 2 times as fast as torch's
        if q.device.type == "cpu" and self.attn_drop.is_active:
            # On the CPU torch has no fused attention with dropout, and its dropout is slow.
            scores = (q * self.scale) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            return self.attn_drop(scores.softmax(-1)) @ v
        return F.scaled_dot_product_attention(q, k, v, mask, self.attn_drop.p if self.attn_drop.is_active else 0.0)


class Dropout(nn.Dropout):
    """nn.Dropout that takes a quarter of the time on a CPU: one random 64-bit number decides about four values.

    The rate is rounded to a multiple of 1/65536, and kept values are scaled for the rounded rate.
    """

    @property
    def is_active(self) -> bool:
        """Whether this layer changes its input."""
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        """Float[...] -> Float[...]."""
        dropped = round(self.p * 2**16)  # how many of the 65536 values of a 16-bit integer drop an element
        if not self.is_active or x.device.type != "cpu" or not 0 < dropped < 2**16 or torch.compiler.is_compiling():
            return super().forward(x)  # torch.compile cannot trace `random_`, and fuses its own dropout
        size, last = x.numel(), dropped - 2**15 - 1  # the largest of the integers that drop
        bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:size]
        keep = bits.clamp_(last, last + 1).sub_(last).to(x.dtype)  # 0 or 1: 16-bit floats have no `last` + 1
        scale = 2**16 / (2**16 - dropped)
        if _is_half(x):  # in which a rounded scale would change the mean
            return (x * keep.view(x.shape)).mul_(scale)
        return x * keep.mul_(scale).view(x.shape)


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _sizes_up_to_last_window(size: int, side: int) -> list[int]:
    """Return the number of rows (or columns) in complete windows, and in an incomplete last one."""
    return [part for part in (size // side * side, size % side) if part]


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Select the tokens of each batch item at these positions: Float[B,L,W], Long[B,Q] -> Float[B,Q,W]."""
    first_row = torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first_row + index).flatten()).view(*index.shape, x.shape[-1])


def scatter_tokens(x: Tensor, index: Tensor, length: int) -> Tensor:
    """Put tokens at these positions of a sequence of zeros: Float[B,Q,W], Long[B,Q] -> Float[B,L,W]."""
    return x.new_zeros(len(x), length, x.shape[-1]).scatter(1, index.unsqueeze(-1).expand_as(x), x)


@dataclass(frozen=True)
class MaskPositions:
    """The positions at which a mask is False (visible) and True (masked), in ascending order.

    visible: Long[B,E] and masked: Long[B,M], where E and M are the largest numbers in any row. Shorter rows are padded
    with positions of the other kind; then visible_valid: Bool[B,E] is False at the padding, and masked_valid: Long[R]
    are the places in `masked`, flattened, that are no padding. Without padding, these two are None.
    """

    visible: Tensor
    visible_valid: Tensor | None
    masked: Tensor
    masked_valid: Tensor | None

    @classmethod
    def from_mask(
        cls, mask: Tensor, counts: Sequence[int] | None = None, for_compiled: bool = False
    ) -> "MaskPositions":
        """Return the positions of Bool[B,N].

        Args:
            counts: the number of visible positions of each row (`count_visible`), if the host knows them. Asking the
                device for them makes the host wait, and ends a graph of torch.compile.
            for_compiled: for a module that torch.compile has compiled: let one graph serve all sizes E and M. Such a
                graph takes no size below 2, so `visible` has two columns at least, with padding.
        """
        counts = count_visible(mask) if counts is None else counts
        fewest, most = min(counts), max(counts)
        columns = max(most, MIN_DYNAMIC_SIZE) if for_compiled else most
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        visible, masked = order[:, :columns].contiguous(), order[:, fewest:].contiguous()
        if for_compiled:
            for positions in (visible, masked):
                maybe_mark_dynamic(positions, 1)
        rank = torch.arange(mask.shape[1], device=mask.device)
        is_visible = rank < (~mask).sum(1, keepdim=True)
        visible_valid = is_visible[:, :columns] if fewest < columns else None
        if fewest == most:
            return cls(visible, visible_valid, masked, None)
        padding_last = is_visible[:, fewest:].flatten().to(torch.uint8).argsort(stable=True)
        return cls(visible, visible_valid, masked, padding_last[: mask.numel() - sum(counts)])

    def unpad_masked(self, x: Tensor) -> Tensor:
        """Concatenate the tokens of the masked positions without padding, row by row: Float[B,M,W] -> Float[R,W]."""
        return x.flatten(0, 1) if self.masked_valid is None else x.flatten(0, 1)[self.masked_valid]

    def scatter_masked(self, x: Tensor, length: int) -> Tensor:
        """Put the tokens of the masked positions, as `unpad_masked` orders them, into sequences of zeros.

        Float[R,W] -> Float[B,L,W].
        """
        if self.masked_valid is not None:
            padded = x.new_zeros(self.masked.numel(), x.shape[-1]).index_copy(0, self.masked_valid, x)
            x = padded  # zeros at the padding, which are visible positions
        return scatter_tokens(x.unflatten(0, self.masked.shape), self.masked, length)


def count_visible(mask: Tensor) -> list[int]:
    """Return how many positions of each row of Bool[B,N] are False; a mask on a GPU makes the host wait for it."""
    return (~mask).sum(1).tolist()


class TokenHead(nn.Module):
    """MAGE's `mlm_layer`: linear, GELU, LayerNorm, then the product with the token embeddings plus a bias.

    The embeddings are an argument of the forward pass and are detached: no gradient flows through the weight tie.
    """

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.ln = nn.LayerNorm(width)  # eps 1e-5, unlike every other norm
        self.bias = nn.Parameter(torch.zeros(1, 1, vocabulary))

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """Map features Float[...,W] and the embeddings of the first V' ids, Float[V',W], to logits Float[...,V']."""
        x = self.ln(F.gelu(self.fc(x)))
        return F.linear(x, embeddings.detach()) + self.bias[0, 0, : len(embeddings)]


def init_transformer(module: nn.Module) -> None:
    """Initialize linear layers like the JAX ViT: Xavier-uniform weights, zero biases. Norms keep torch's defaults."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def normal_parameter(*shape: int) -> nn.Parameter:
    """Return a parameter drawn from a normal distribution with standard deviation `INIT_STD`."""
    return nn.Parameter(torch.empty(shape).normal_(std=INIT_STD))
