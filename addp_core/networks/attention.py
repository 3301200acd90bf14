"""Attention patterns for dense prediction: windows with a few global blocks, and relative positions.

References: ViTDet (arXiv 2203.16527) for windows and decomposed positions, BEiT (2106.08254) for the bias table.
"""

from functools import lru_cache
from typing import cast

import torch
from timm.layers import RelPosBias, gen_relative_position_index
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.networks.config import PLAIN_ATTENTION as PLAIN_ATTENTION
from addp_core.networks.config import AttentionConfig as AttentionConfig


class DecomposedRelativePositions(nn.Module):
    """ViTDet's relative positions: the query times the embedding of the vertical offset, plus the same horizontally.

    Initialized to zero. For grids other than `grid` (rows, columns) both tables are interpolated linearly.
    """

    def __init__(self, grid: tuple[int, int], head_width: int, prefix_tokens: int):
        super().__init__()
        self.prefix_tokens = prefix_tokens  # tokens before the patches; they have no position
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, head_width))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, head_width))

    def forward(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map the queries of a grid, Float[B,heads,L,d], to biases of the attention scores, Float[B,heads,L,L]."""
        vertical, horizontal = (x[:, :, self.prefix_tokens :] for x in self.terms(q, grid))
        bias = (vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)).flatten(3)
        return F.pad(bias, (self.prefix_tokens, 0, self.prefix_tokens, 0))

    def terms(
        self, q: Tensor, grid: tuple[int, int], of_queries: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map queries, Float[B,heads,Q,d], to Float[B,heads,Q,rows] and Float[B,heads,Q,columns].

        The bias of a query and a key is the sum of the entries for the key's row and column.

        Args:
            grid: rows and columns of the keys.
            of_queries: the first rows and columns of `grid`, where the queries are (default: all).
        """
        rows, columns = of_queries or grid
        patches = q[:, :, self.prefix_tokens :].unflatten(2, (rows, columns))
        by_row, by_column = (
            _embeddings_by_pair(table, size) for table, size in zip((self.rel_pos_h, self.rel_pos_w), grid, strict=True)
        )
        vertical = torch.einsum("bnhwd,hkd->bnhwk", patches, by_row[:rows])
        horizontal = torch.einsum("bnhwd,wkd->bnhwk", patches, by_column[:columns])
        vertical, horizontal = vertical.flatten(2, 3), horizontal.flatten(2, 3)
        if self.prefix_tokens:
            vertical, horizontal = (F.pad(x, (0, 0, self.prefix_tokens, 0)) for x in (vertical, horizontal))
        return vertical, horizontal

    def product(
        self, q: Tensor, k: Tensor, scale: float, grid: tuple[int, int], of_queries: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return wider queries and keys, Float[B,heads,*,d+rows+columns], whose products are the scores with biases.

        They are [scale q, terms] and [k, one for the key's row, one for its column], so that an attention kernel
        without a bias serves. q: Float[B,heads,Q,d], k: Float[B,heads,L,d]; the grids are those of `terms`.
        """
        rows, columns = (torch.eye(size, dtype=k.dtype, device=k.device) for size in grid)
        places = torch.cat([rows.repeat_interleave(grid[1], 0), columns.repeat(grid[0], 1)], 1)
        places = F.pad(places, (0, 0, self.prefix_tokens, 0)).expand(*k.shape[:2], -1, -1)
        terms = (term.to(q.dtype) for term in self.terms(q, grid, of_queries))
        return torch.cat([q * scale, *terms], -1), torch.cat([k, places], -1)


def _embeddings_by_pair(table: Tensor, size: int) -> Tensor:
    """Expand Float[2s-1,d] to Float[size,size,d]: entry (i, j) is the table's row of offset i - j."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.t().unsqueeze(0), size=2 * size - 1, mode="linear")[0].t()
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index + size - 1]


class RelativePositionTable(RelPosBias):
    """BEiT's relative positions: a learned bias per offset and head (timm's module and parameter names).

    With a class token, the table ends with three more entries: class to patch, patch to class, and class to class.
    Initialized to zero. For grids other than `grid` the table is resized (`resize_bias_table`).
    """

    def __init__(self, grid: tuple[int, int], heads: int, prefix_tokens: int):
        super().__init__(grid, heads, prefix_tokens=prefix_tokens)
        nn.init.zeros_(self.relative_position_bias_table)
        self.grid, self.heads = (grid[0], grid[1]), heads

    def forward(self, q: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]  # timm's takes the scores
        """Return the biases of the attention scores of a grid, Float[1,heads,L,L], for queries Float[B,heads,L,d]."""
        table: Tensor = self.relative_position_bias_table
        if tuple(grid) == self.grid:
            index = cast(Tensor, self.relative_position_index)
        else:
            table = resize_bias_table(table, self.grid, grid, self.prefix_tokens)
            index = gen_relative_position_index(grid, class_token=self.prefix_tokens > 0).to(q.device).flatten()
        if (
            q.device.type == "cpu"
        ):  # the gradient of this takes a quarter of the time, but on a GPU is not deterministic
            bias = table.t().gather(1, index.expand(self.heads, -1))
        else:
            bias = table[index].t()
        return bias.unflatten(1, (q.shape[2], q.shape[2])).unsqueeze(0)


def resize_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix_tokens: int) -> Tensor:
    """Resize a table of biases, Float[entries,heads], from the grid `old` to `new`; a class token's entries are kept.

    As in BEiT's fine-tuning, small offsets keep their meaning in patches, and large ones are stretched over the new
    grid.
    """
    if tuple(old) == tuple(new):
        return table
    offsets, class_entries = (table[:-3], table[-3:]) if prefix_tokens else (table, table[:0])
    rows, columns = (_stretching_weights(2 * o - 1, 2 * n - 1).to(table) for o, n in zip(old, new, strict=True))
    offsets = offsets.unflatten(0, (2 * old[0] - 1, 2 * old[1] - 1))
    offsets = torch.einsum("ih,jw,hwn->ijn", rows, columns, offsets)
    return torch.cat([offsets.flatten(0, 1), class_entries])


@lru_cache
@torch.inference_mode(False)  # the cached tensor must be usable in training too
def _stretching_weights(old: int, new: int) -> Tensor:
    """Return Float[new,old]: interpolation along one axis of a table, from geometrically to evenly spaced offsets.

    The old entries lie at 0, +-1, +-(1 + q), +-(1 + q + q^2) ..., with q such that the last one lies at the new edge.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old // 2)) / (1 - q) > new // 2 else (q, high)
    steps = torch.tensor([q**i for i in range(old // 2)], dtype=torch.float64).cumsum(0)
    old_offsets = torch.cat([-steps.flip(0), steps.new_zeros(1), steps])
    new_offsets = torch.arange(new, dtype=torch.float64).sub(new // 2).clamp(old_offsets[0], old_offsets[-1])
    if old == 1:
        return torch.ones(new, 1)
    right = torch.searchsorted(old_offsets, new_offsets).clamp(1, old - 1)
    fraction = (new_offsets - old_offsets[right - 1]) / (old_offsets[right] - old_offsets[right - 1])
    weights = torch.zeros(new, old, dtype=torch.float64)
    weights.scatter_(1, right[:, None], fraction[:, None]).scatter_(1, right[:, None] - 1, 1 - fraction[:, None])
    return weights.float()


def to_windows(x: Tensor, grid: tuple[int, int], window: tuple[int, int], padding: Tensor | None = None) -> Tensor:
    """Cut Float[B,h*w,W] into windows (rows, columns), Float[B*n,rows*columns,W].

    padding: Float[W], the token beyond the edge of the grid (default: zeros).
    """
    bottom, right = (-size % side for size, side in zip(grid, window, strict=True))
    x = x.unflatten(1, grid)
    if padding is None:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    else:
        x = torch.cat([x, padding.expand(len(x), grid[0], right, -1)], 2) if right else x
        x = torch.cat([x, padding.expand(len(x), bottom, x.shape[2], -1)], 1) if bottom else x
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)  # [B, n_h, n_w, rows, columns, W]
    return x.flatten(3, 4).flatten(0, 2)


def from_windows(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Invert `to_windows`."""
    rows, columns = (-(-size // side) for size, side in zip(grid, window, strict=True))
    x = x.unflatten(1, window).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]].flatten(1, 2)
