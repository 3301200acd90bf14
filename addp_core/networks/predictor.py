"""The token predictor: MAGE, which gives q(z | reliable ids), a distribution over the codebook at every position.

It is frozen while ADDP trains (Sec. 3.2); `addp predictor` trains it. Reference: MAGE (arXiv 2211.09117).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.networks.config import PredictorConfig as PredictorConfig
from addp_core.networks.layers import (
    INIT_STD,
    Dropout,
    LayerNorm,
    MaskPositions,
    TokenHead,
    gather_tokens,
    init_transformer,
    normal_parameter,
    scatter_tokens,
    transformer_blocks,
)
from addp_core.networks.tokenizer import Vocabulary


class TokenPredictor(nn.Module):
    """MAGE over `tokens` positions of ids from `vocabulary`."""

    compiled = False  # compute only: whether torch.compile has compiled this module or one around it

    def __init__(self, config: PredictorConfig, tokens: int, vocabulary: Vocabulary):
        super().__init__()
        self.config, self.tokens, self.vocabulary = config, tokens, vocabulary
        self.trained_on = ""  # fingerprint of the tokenizer whose ids it was trained on; empty if unknown
        width = config.width
        self.token_emb = TokenEmbeddings(vocabulary.size, 1 + tokens, width, config.dropout)
        self.blocks = transformer_blocks(width, config.depth, config.heads, config.dropout)
        self.norm = LayerNorm(width)

        self.decoder_embed = nn.Linear(width, width)
        self.decoder_pos_embed_learned = normal_parameter(1, 1 + tokens, width)
        self.decoder_blocks = transformer_blocks(width, config.decoder_depth, config.decoder_heads, config.dropout)
        self.decoder_norm = LayerNorm(width)
        self.mlm_layer = TokenHead(width, vocabulary.size)
        init_transformer(self)

    def forward(self, ids: Tensor, mask: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return q(z | reliable ids), Float[B,N,K], from ids Long[B,N] and mask Bool[B,N] (True = unreliable).

        visible: `MaskPositions.visible` of the mask, if the caller has computed it.
        """
        return self.logits(ids, mask, vocabulary=self.vocabulary.codebook, visible=visible).softmax(-1)

    def logits(
        self,
        ids: Tensor,
        mask: Tensor,
        dropped: Tensor | None = None,
        vocabulary: int | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of all positions: Long[B,N] ids, Bool[B,N] mask -> Float[B,N,V'].

        Args:
            dropped: Bool[B,N], the part of the mask that the encoder skips in training; the same number in every row.
            vocabulary: compute the logits of the first `vocabulary` ids only (default: all).
            visible: `MaskPositions.visible` of `dropped`, or else of the mask, if the caller has computed it.
        """
        hidden = ids.masked_fill(mask, self.vocabulary.mask_id)
        if visible is None:
            visible = MaskPositions.from_mask(mask if dropped is None else dropped).visible
        encoded = self.encode(hidden, queries=visible) if dropped is None else self.encode(hidden, kept=visible)
        x = self.decoder_embed(encoded)
        # MAGE pads unreliable positions with the class token's features rather than with a mask token.
        class_token, patches = x[:, :1], scatter_tokens(x[:, 1:], visible, ids.shape[1])
        patches = torch.where(mask.unsqueeze(-1), class_token, patches)
        x = torch.cat([class_token, patches], 1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        embeddings = self.token_emb.word_embeddings.weight[:vocabulary]
        return self.mlm_layer(self.decoder_norm(x[:, 1:]), embeddings)

    def encode(self, ids: Tensor, kept: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """Encode Long[B,N] ids (mask ids included) as Float[B,1+N',W], class slot first.

        Args:
            kept: Long[B,N'], the only positions that are in the sequence.
            queries: Long[B,N'], the only positions whose features are wanted.
        """
        x = self.token_emb(torch.cat([ids.new_full((len(ids), 1), self.vocabulary.class_id), ids], 1))
        if kept is not None:
            x = gather_tokens(x, F.pad(1 + kept, (1, 0)))
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, queries=None if queries is None else F.pad(1 + queries, (1, 0))))


class TokenEmbeddings(nn.Module):
    """BERT's embeddings: word plus position embedding, LayerNorm, dropout."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.LayerNorm = LayerNorm(width)
        self.dropout = Dropout(dropout)
        nn.init.normal_(self.word_embeddings.weight, std=INIT_STD)
        nn.init.normal_(self.position_embeddings.weight, std=INIT_STD)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embed ids, Long[B,L] -> Float[B,L,W].

        positions: Float[L,W], the position embeddings of these ids (default: all of them, in order).
        """
        positions = self.position_embeddings.weight if positions is None else positions
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + positions))
