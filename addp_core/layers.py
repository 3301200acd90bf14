"""What encoder, decoder and token predictor share: transformer blocks, the head over token ids, and how both are
initialised.

The blocks are timm's. References: ViT (arXiv 2010.11929), MAE (2111.06377), MAGE (2211.09117).
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
INIT_STD = 0.02  # of positions, mask and class tokens, token embeddings


def transformer_blocks(
    width: int, depth: int, heads: int, dropout: float = 0.0, drop_path: float = 0.0
) -> nn.ModuleList:
    """`depth` pre-norm blocks (qkv bias, MLP ratio 4). `dropout` acts on attention and MLP; `drop_path` grows linearly
    from 0.
    """
    if width % heads:
        raise ValueError(f"heads: {heads} do not divide the width {width}; width/64 = {width // 64} is usual")
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    return nn.ModuleList(
        Block(width, heads, qkv_bias=True, proj_drop=dropout, attn_drop=dropout, drop_path=rate, norm_layer=LayerNorm)
        for rate in rates
    )


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
