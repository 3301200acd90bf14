"""How the blocks of dense prediction attend: in windows with a few global blocks, with relative positions.

References: ViTDet (arXiv 2203.16527) for windows and decomposed positions, BEiT (2106.08254) for the table of biases.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from timm.layers import RelPosBias, gen_relative_position_index
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class AttentionConfig:
    """Where the blocks attend; the defaults are the plain ViT's."""

    window: Annotated[int, Ge(0), "side of the square windows, in patches; 0: all patches see each other"] = 0
    global_blocks: Annotated[int, Ge(0), "evenly spaced blocks without windows; the last block is one"] = 4
    relative: Annotated[
        Literal["none", "decomposed", "table"],
        "relative positions: none, a term for each axis (ViTDet's), or a bias for each offset (BEiT's)",
    ] = "none"
    class_token: Annotated[bool, "attend to the class token too; windows have no place for it"] = True

    def __post_init__(self):
        if self.window and self.class_token:
            raise ValueError("class_token: found true, expected false where window > 0")

    def windows(self, depth: int) -> list[int]:
        """The window of each of `depth` blocks, 0 for the global ones: the last of each of `global_blocks` groups."""
        last = {round(depth * (i + 1) / self.global_blocks) - 1 for i in range(self.global_blocks)}
        return [0 if i in last else self.window for i in range(depth)]


PLAIN_ATTENTION = AttentionConfig()


class DecomposedRelativePositions(nn.Module):
    """ViTDet's relative positions: what a query makes of the vertical offset to a key, plus of the horizontal one.

    Zero at first. Other grids than `grid` (rows, columns) interpolate the two tables linearly.
    """

    def __init__(self, grid: tuple[int, int], head_width: int, prefix: int):
        super().__init__()
        self.prefix = prefix  # tokens before the patches, without a position
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, head_width))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, head_width))

    def forward(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Queries Float[B,heads,L,d] of a grid -> what is added to their scores, Float[B,heads,L,L]."""
        rows, columns = grid
        patches = q[:, :, self.prefix :].unflatten(2, grid)
        vertical = torch.einsum("bnhwd,hkd->bnhwk", patches, _by_offset(self.rel_pos_h, rows))
        horizontal = torch.einsum("bnhwd,wkd->bnhwk", patches, _by_offset(self.rel_pos_w, columns))
        bias = (vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)).flatten(4).flatten(2, 3)
        return F.pad(bias, (self.prefix, 0, self.prefix, 0))


def _by_offset(table: Tensor, size: int) -> Tensor:
    """Float[2s-1,d] -> Float[size,size,d]: the row of query position i and key position j is that of offset i - j."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.t().unsqueeze(0), size=2 * size - 1, mode="linear")[0].t()
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place + size - 1]


class RelativePositionTable(RelPosBias):
    """BEiT's relative positions: a learned bias for each offset and head (timm's module and parameter name).

    Zero at first. Other grids than `grid` stretch the table (`resize_bias_table`).
    """

    def __init__(self, grid: tuple[int, int], heads: int, prefix: int):
        super().__init__(grid, heads, prefix_tokens=prefix)
        nn.init.zeros_(self.relative_position_bias_table)
        self.grid, self.heads, self.prefix = tuple(grid), heads, prefix

    def forward(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Queries Float[B,heads,L,d] of a grid -> what is added to their scores, Float[1,heads,L,L]."""
        if tuple(grid) == self.grid:
            return self.get_bias()
        table = resize_bias_table(self.relative_position_bias_table, self.grid, grid, self.prefix)
        index = gen_relative_position_index(grid, class_token=self.prefix > 0).to(q.device)
        return table[index.flatten()].view(*index.shape, self.heads).permute(2, 0, 1).unsqueeze(0)


def resize_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """A table of biases for another grid, Float[entries,heads]; the three entries of a class token are kept.

    As BEiT's fine-tuning does it: near offsets keep their meaning in patches, far ones are stretched over the new grid.
    """
    if tuple(old) == tuple(new):
        return table
    offsets, kept = (table[:-3], table[-3:]) if prefix else (table, table[:0])
    rows, columns = (_stretch(2 * o - 1, 2 * n - 1).to(table) for o, n in zip(old, new, strict=True))
    offsets = offsets.unflatten(0, (2 * old[0] - 1, 2 * old[1] - 1))
    offsets = torch.einsum("ih,jw,hwn->ijn", rows, columns, offsets)
    return torch.cat([offsets.flatten(0, 1), kept])


@lru_cache
@torch.inference_mode(False)  # what is kept must serve training too
def _stretch(old: int, new: int) -> Tensor:
    """Float[new,old]: linear interpolation along one axis of a table, from offsets spaced geometrically to even ones.

    The old entries lie at 0, +-1, +-(1 + q), +-(1 + q + q^2) ..., with q such that the last falls on the new edge.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old // 2)) / (1 - q) > new // 2 else (q, high)
    steps = torch.tensor([q**i for i in range(old // 2)], dtype=torch.float64).cumsum(0)
    at = torch.cat([-steps.flip(0), steps.new_zeros(1), steps])
    wanted = torch.arange(new, dtype=torch.float64).sub(new // 2).clamp(at[0], at[-1])
    if old == 1:
        return torch.ones(new, 1)
    right = torch.searchsorted(at, wanted).clamp(1, old - 1)
    share = (wanted - at[right - 1]) / (at[right] - at[right - 1])
    weights = torch.zeros(new, old, dtype=torch.float64)
    weights.scatter_(1, right[:, None], share[:, None]).scatter_(1, right[:, None] - 1, 1 - share[:, None])
    return weights.float()


def to_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Float[B,h*w,W] -> Float[B*n,window*window,W], zeros where the grid ends within a window."""
    bottom, right = -grid[0] % window, -grid[1] % window
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, right, 0, bottom))
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)  # [B, n_h, n_w, window, window, W]
    return x.flatten(3, 4).flatten(0, 2)


def from_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of `to_windows`."""
    rows, columns = -(-grid[0] // window), -(-grid[1] // window)
    x = x.unflatten(1, (window, window)).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]].flatten(1, 2)
