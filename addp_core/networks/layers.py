"""What encoder, decoder and token predictor share: transformer blocks, the head over token ids, and how both are
initialised.

The blocks are timm's, with a forward pass of our own that can compute some positions alone. References: ViT (arXiv
2010.11929), MAE (2111.06377), MAGE (2211.09117).
"""

from dataclasses import dataclass
from functools import partial

import torch
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.networks.attention import (
    PLAIN_ATTENTION,
    AttentionConfig,
    DecomposedRelativePositions,
    RelativePositionTable,
    from_windows,
    to_windows,
)

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
INIT_STD = 0.02  # of positions, mask and class tokens, token embeddings


def check_heads(key: str, heads: int, width: int) -> None:
    """ValueError where the number of heads under this key does not divide the width."""
    if width % heads:
        raise ValueError(f"{key}: found {heads}, expected a divisor of the width {width}")


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
    """`depth` pre-norm blocks (qkv bias, MLP ratio 4). `dropout` acts on attention and MLP; `drop_path` grows linearly
    from 0. `attention` other than the plain one wants the `grid` (rows, columns) of the patches.
    """
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    blocks = nn.ModuleList(Block(width, heads, dropout, rate, layer_scale) for rate in rates)
    for block, window in zip(blocks, attention.windows(depth), strict=True):
        block.window, prefix = window, int(attention.class_token)
        sees = (window, window) if window else grid
        if attention.relative == "decomposed":
            block.relative = DecomposedRelativePositions(sees, width // heads, prefix)
        elif attention.relative == "table":
            block.relative = RelativePositionTable(sees, heads, prefix)
    return blocks


class Block(vision_transformer.Block):
    """timm's pre-norm block (its modules and parameter names), with windows and relative positions where wanted."""

    window = 0  # side of the windows in patches; 0: global

    def __init__(self, width: int, heads: int, dropout: float, drop_path: float, layer_scale: bool = False):
        options = {"qkv_bias": True, "proj_drop": dropout, "attn_drop": dropout, "drop_path": drop_path}
        super().__init__(width, heads, norm_layer=LayerNorm, init_values=1.0 if layer_scale else None, **options)
        self.relative: nn.Module | None = None  # not a class attribute, which would hide the submodule set later
        self.attn.attn_drop, self.attn.proj_drop = Dropout(dropout), Dropout(dropout)
        self.mlp.drop1, self.mlp.drop2 = Dropout(dropout), Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        at: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Float[B,L,W] -> the same, or Float[B,Q,W] for the positions `at` Long[B,Q] alone: a last block need not
        compute what nothing reads.

        attn_mask: Bool, broadcast to [B,heads,L,L]; True where a key may be looked at. grid: rows and columns of the
        patches, for windows and relative positions.
        """
        h = self.norm1(x)
        if at is not None:
            x = take_rows(x, at)
        if self.window:
            h = to_windows(h, grid, self.window)
            h = from_windows(self.attend(h, None, None, (self.window, self.window)), grid, self.window)
        else:
            h = self.attend(h, attn_mask, at, grid)
        x = x + self.drop_path1(self.ls1(h))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attend(self, h: Tensor, mask: Tensor | None, at: Tensor | None, grid: tuple[int, int] | None = None) -> Tensor:
        """Self-attention, Float[B,L,W] -> Float[B,L,W] or, of queries `at`, Float[B,Q,W]."""
        attn, width = self.attn, h.shape[-1]
        if at is None:
            q, k, v = attn.qkv(h).chunk(3, -1)
        else:
            (w_q, w_kv), (b_q, b_kv) = (p.split((width, 2 * width)) for p in (attn.qkv.weight, attn.qkv.bias))
            q = F.linear(take_rows(h, at), w_q, b_q)
            k, v = F.linear(h, w_kv, b_kv).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.relative is not None:
            mask = self.relative(q, grid).to(q.dtype)
        if h.device.type == "cpu" and attn.attn_drop.drops:
            # torch has no fused attention with dropout here, and draws its mask slowly
            scores = (q * attn.scale) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            x = attn.attn_drop(scores.softmax(-1)) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, mask, attn.attn_drop.p if attn.attn_drop.drops else 0.0)
        return attn.proj_drop(attn.proj(x.transpose(1, 2).flatten(2)))


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU four decisions come from one 64-bit random number, a quarter of the time of torch's own.

    The rate is rounded to 1/65536, and kept values are scaled by what it was rounded to.
    """

    @property
    def drops(self) -> bool:
        """Whether it does anything."""
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * 2**16)  # of 65536
        if not self.drops or x.device.type != "cpu" or not 0 < dropped < 2**16:
            return super().forward(x)
        size, last = x.numel(), dropped - 2**15 - 1  # the largest of the 16-bit integers that drop
        bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:size]
        keep = bits.clamp_(last, last + 1).to(x.dtype).sub_(last)  # 0 or 1
        return x * keep.mul_(2**16 / (2**16 - dropped)).view(x.shape)


def take_rows(x: Tensor, at: Tensor) -> Tensor:
    """Float[B,L,W], Long[B,Q] -> Float[B,Q,W], the rows of each batch item at these positions."""
    start = torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (start + at).flatten()).view(*at.shape, x.shape[-1])


@dataclass(frozen=True)
class MaskPositions:
    """Where a mask is False and where it is True, each in order: Long[B,E] and Long[B,M], E and M the largest numbers
    in a row. Where rows differ, Bool[B,E] and Bool[B,M] tell the real ones from padding, which points at positions of
    the other kind; elsewhere these are None.
    """

    visible: Tensor
    visible_real: Tensor | None
    masked: Tensor
    masked_real: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> "MaskPositions":
        """Of Bool[B,N]."""
        counts = (~mask).sum(1)
        least, most = torch.stack(counts.aminmax()).tolist()
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        if least == most:
            return cls(order[:, :most], None, order[:, most:], None)
        place = torch.arange(mask.shape[1], device=mask.device)
        is_visible = place < counts[:, None]
        return cls(order[:, :most], is_visible[:, :most], order[:, least:], ~is_visible[:, least:])

    def flat(self, x: Tensor) -> Tensor:
        """What stands at the masked positions, Float[B,M,W], as rows Float[R,W] without padding, in row-major order."""
        return x.flatten(0, 1) if self.masked_real is None else x[self.masked_real]


def put_rows(x: Tensor, at: Tensor, length: int) -> Tensor:
    """Float[B,Q,W], Long[B,Q] -> Float[B,L,W] with these rows at their positions and zeros elsewhere."""
    return x.new_zeros(len(x), length, x.shape[-1]).scatter(1, at.unsqueeze(-1).expand_as(x), x)


class TokenHead(nn.Module):
    """Linear, GELU, LayerNorm, then the transposed token embeddings plus a bias (MAGE's `mlm_layer`).

    The embeddings are passed in and detached: no gradient runs through the tie.
    """

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.ln = nn.LayerNorm(width)  # eps 1e-5, unlike every other norm
        self.bias = nn.Parameter(torch.zeros(1, 1, vocabulary))

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """Float[...,W] features and Float[V',W] embeddings -> Float[...,V'] logits for the first V' ids of the
        vocabulary.
        """
        x = self.ln(F.gelu(self.fc(x)))
        return F.linear(x, embeddings.detach()) + self.bias[0, 0, : len(embeddings)]


def init_transformer(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero biases, as the JAX ViT; norms keep torch's ones and zeros."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def learned(*shape: int) -> nn.Parameter:
    """A parameter drawn from N(0, 0.02)."""
    return nn.Parameter(torch.empty(shape).normal_(std=INIT_STD))
