"""Features of images for probes: pooled tokens after any blocks of a frozen encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from addp_core.networks.classifier import FeatureNorm, Pooling, check_pooling, pool_tokens
from addp_core.networks.encoder import FeatureEncoder


class PooledFeatures(nn.Module):
    """Images -> pooled tokens after some blocks of a frozen encoder.

    Args:
        blocks: counted from 1.
        poolings: "avg" (mean of the patch tokens), "token" (class token), or both.
        mirrored: compute the features of the mirror image too, as a second view.
        norm: of the tokens or features, as the classifier's `feature_norm`.
    """

    def __init__(
        self,
        encoder: FeatureEncoder,
        blocks: Sequence[int],
        poolings: Sequence[Pooling],
        mirrored: bool = False,
        norm: FeatureNorm = "none",
    ):
        super().__init__()
        for pooling in poolings:
            check_pooling(encoder, pooling)
        self.encoder, self.blocks, self.poolings = encoder, tuple(blocks), tuple(poolings)
        self.mirrored, self.norm = mirrored, norm

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(views, blocks, poolings, width) of an image's features."""
        return 1 + self.mirrored, len(self.blocks), len(self.poolings), self.encoder.width

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] normalized -> Float[B,V,K,P,W] in float32: views, blocks, poolings."""
        views = [images, images.flip(-1)] if self.mirrored else [images]
        return torch.stack([self._pooled(view) for view in views], 1)

    def _pooled(self, images: Tensor) -> Tensor:
        tokens = self.encoder.forward_tokens(images, [block - 1 for block in self.blocks])
        if self.norm == "pretrained":
            tokens = [self.encoder.norm(x) for x in tokens]
        return torch.stack([self._pool(x.float()) for x in tokens], 1)

    def _pool(self, x: Tensor) -> Tensor:
        """Tokens Float[B,1+N,W] -> Float[B,P,W]."""
        prefix = self.encoder.num_prefix_tokens
        return torch.stack([pool_tokens(x, name, self.norm, prefix) for name in self.poolings], 1)
