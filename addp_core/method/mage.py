"""MAGE as a generator (arXiv 2211.09117): the tokenizer and the token predictor alone, ADDP's baseline in Table 2.

Ids are drawn from what the predictor makes of the ids that are known; pixels come last. Training is `addp predictor`.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from addp_core.method.config import MAGEConfig as MAGEConfig
from addp_core.networks.layers import MaskPositions
from addp_core.networks.predictor import TokenPredictor
from addp_core.networks.tokenizer import Tokenizer


class MAGE(nn.Module):
    """The tokenizer and the token predictor, both frozen."""

    reads_images: ClassVar[bool] = False

    def __init__(self, config: MAGEConfig):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config.tokenizer, config.grid)
        self.predictor = TokenPredictor(config.predictor, config.tokens, config.vocabulary)
        self.requires_grad_(False)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the ids of the images: Float[B,3,H,W] in [0,1] -> Long[B,N]."""
        return self.tokenizer.encode(images)

    @torch.no_grad()
    def next_probabilities(self, images: Tensor, ids: Tensor, mask: Tensor, masked: Sequence[int]) -> Tensor:
        """Return the distribution over the codebook at the masked positions, Float[B,N,K]; elsewhere undefined.

        Args:
            images: not read.
            ids: Long[B,N].
            mask: Bool[B,N], True where the id is not known.
            masked: how many ids of each image are not.
        """
        counts = [mask.shape[1] - count for count in masked]
        visible = MaskPositions.from_mask(mask, counts, self.predictor.compiled).visible
        logits = self.predictor.logits(ids, mask, vocabulary=self.config.vocabulary.codebook, visible=visible)
        return logits.float().softmax(-1)

    def masked_after(self, share: float, masked: int) -> int:
        """Return how many ids a step leaves masked: this share of all, rounded down, but at least one, and one less
        than before.
        """
        return max(min(math.floor(self.config.tokens * share), masked - 1), 1)

    @torch.no_grad()
    def render(self, embeddings: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Decode all ids Long[B,N], those that the next step would draw again too, into Float[B,3,H,W], unclamped.

        embeddings, mask: not read.
        """
        return self.tokenizer.decode(self.tokenizer.lookup(ids, self.config.grid))
