"""The token decoder: from the encoder's features and the reliable ids to a distribution over ids at every position
(Sec. 3.3).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from addp_core.networks.layers import (
    INIT_STD,
    LayerNorm,
    MaskPositions,
    TokenHead,
    init_transformer,
    learned,
    put_rows,
    transformer_blocks,
)
from addp_core.networks.tokenizer import Vocabulary


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture of the decoder; its width is the encoder's."""

    depth: Annotated[int, Ge(1), "blocks"] = 8
    heads: Annotated[int, Ge(1), "attention heads"] = 16
    dropout: Annotated[float, Interval(ge=0, lt=1), "in attention and MLP"] = 0.1


class TokenDecoder(nn.Module):
    """Sequence: class slot (always the mask token), N positions, then the visible ids' embeddings in position order."""

    def __init__(self, config: DecoderConfig, width: int, tokens: int, vocabulary: Vocabulary, see_ids: bool = True):
        """see_ids: append the visible (reliable) ids; False is the paper's ablation in which no tokens are given."""
        super().__init__()
        self.config, self.vocabulary, self.see_ids = config, vocabulary, see_ids
        self.token_emb = nn.Embedding(vocabulary.size, width)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = learned(1, 1, width)
        self.decoder_pos_embed_learned = learned(1, 1 + tokens, width)  # class slot and reliable positions
        self.decoder_pos_mask_embed = learned(1, 1 + tokens, width)  # unreliable positions
        if see_ids:
            self.decoder_pos_token_embed = learned(1, 1 + tokens, width)  # appended ids
        self.decoder_blocks = transformer_blocks(width, config.depth, config.heads, config.dropout)
        self.decoder_norm = LayerNorm(width)
        self.mlm_layer = TokenHead(width, vocabulary.size)
        init_transformer(self)
        nn.init.normal_(self.token_emb.weight, std=INIT_STD)
        # The head's tie to the embeddings is detached: where no ids are seen, nothing trains them.
        self.token_emb.weight.requires_grad_(see_ids)

    def forward(
        self,
        features: Tensor | None,
        ids: Tensor,
        mask: Tensor,
        masked_only: bool = False,
        vocabulary: int | None = None,
        positions: MaskPositions | None = None,
    ) -> Tensor:
        """Encoder features of the reliable positions in order, Float[B,E,W] (padding of shorter rows is not read),
        Long[B,N] ids, Bool[B,N] mask (True = unreliable) -> Float[B,N,V'] logits.

        features may be None where every position is masked: none would be read.
        masked_only: logits of the unreliable positions alone, Float[R,V'] in row-major order.
        vocabulary: compute only the first `vocabulary` ids (all by default). positions: those of the mask, where known.
        """
        batch, tokens = ids.shape
        positions = positions or MaskPositions.of(mask)
        x = (self.mask_token + self.decoder_pos_mask_embed[:, 1:]).expand(batch, -1, -1)
        if features is not None:
            seen = self.decoder_embed(features) + self.decoder_pos_embed_learned[0, 1:][positions.visible]
            x = torch.where(mask.unsqueeze(-1), x.to(seen.dtype), put_rows(seen, positions.visible, tokens))
        slot = (self.mask_token + self.decoder_pos_embed_learned[:, :1]).expand(batch, -1, -1)
        sequence = [slot.to(x.dtype), x]
        attention = None
        if self.see_ids:
            visible, attention = self.visible_tokens(ids, positions)
            sequence.append(visible.to(x.dtype))
        x = torch.cat(sequence, 1)
        for block in self.decoder_blocks[:-1]:
            x = block(x, attention)
        read = positions.masked if masked_only else torch.arange(tokens, device=ids.device).expand(batch, -1)
        x = self.decoder_norm(self.decoder_blocks[-1](x, attention, at=1 + read))
        return self.mlm_layer(positions.flat(x) if masked_only else x, self.token_emb.weight[:vocabulary])

    def visible_tokens(self, ids: Tensor, positions: MaskPositions) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the reliable ids, Float[B,E,W] in position order, and where rows differ in number a
        Bool[B,1,1,1+N+E] attention mask that hides the padding of the shorter rows."""
        order, real = positions.visible, positions.visible_real
        embeddings = self.token_emb(ids.gather(1, order)) + self.decoder_pos_token_embed[0, 1:][order]
        if real is None:
            return embeddings, None
        return embeddings, torch.cat([real.new_ones(len(ids), 1 + ids.shape[1]), real], 1)[:, None, None]
