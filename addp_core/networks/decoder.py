"""The token decoder: from the encoder's features and the reliable ids to logits at every position (Sec. 3.3)."""

import torch
from torch import Tensor, nn

from addp_core.networks.config import DecoderConfig as DecoderConfig
from addp_core.networks.layers import (
    INIT_STD,
    LayerNorm,
    MaskPositions,
    TokenHead,
    init_transformer,
    normal_parameter,
    scatter_tokens,
    transformer_blocks,
)
from addp_core.networks.tokenizer import Vocabulary


class TokenDecoder(nn.Module):
    """A transformer over the class slot (always the mask token), N positions, and the embeddings of the visible ids."""

    def __init__(self, config: DecoderConfig, width: int, tokens: int, vocabulary: Vocabulary, append_ids: bool = True):
        """Build the decoder; append_ids = False is the paper's ablation that gives it no ids."""
        super().__init__()
        self.config, self.vocabulary, self.append_ids = config, vocabulary, append_ids
        self.token_emb = nn.Embedding(vocabulary.size, width)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = normal_parameter(1, 1, width)
        self.decoder_pos_embed_learned = normal_parameter(1, 1 + tokens, width)  # class slot and reliable positions
        self.decoder_pos_mask_embed = normal_parameter(1, 1 + tokens, width)  # unreliable positions
        if append_ids:
            self.decoder_pos_token_embed = normal_parameter(1, 1 + tokens, width)  # appended ids
        self.decoder_blocks = transformer_blocks(width, config.depth, config.heads, config.dropout)
        self.decoder_norm = LayerNorm(width)
        self.mlm_layer = TokenHead(width, vocabulary.size)
        init_transformer(self)
        nn.init.normal_(self.token_emb.weight, std=INIT_STD)
        # The head is tied to detached embeddings, so without appended ids nothing trains them.
        self.token_emb.weight.requires_grad_(append_ids)

    def forward(
        self,
        features: Tensor | None,
        ids: Tensor,
        mask: Tensor,
        masked_only: bool = False,
        vocabulary: int | None = None,
        positions: MaskPositions | None = None,
    ) -> Tensor:
        """Return logits of all positions, Float[B,N,V'], or of the unreliable ones only.

        Args:
            features: Float[B,E,W], the encoder's features of the reliable positions in order (padding of shorter rows
                is ignored); None if every position is unreliable.
            ids: Long[B,N]; values at unreliable positions are ignored.
            mask: Bool[B,N], True = unreliable.
            masked_only: return the logits of the unreliable positions only, Float[R,V'] in row-major order.
            vocabulary: compute the logits of the first `vocabulary` ids only (default: all).
            positions: those of the mask, if the caller has computed them.
        """
        batch, tokens = ids.shape
        positions = positions or MaskPositions.from_mask(mask)
        x = (self.mask_token + self.decoder_pos_mask_embed[:, 1:]).expand(batch, -1, -1)
        if features is not None:
            visible = self.decoder_embed(features) + self.decoder_pos_embed_learned[0, 1:][positions.visible]
            x = torch.where(mask.unsqueeze(-1), x.to(visible.dtype), scatter_tokens(visible, positions.visible, tokens))
        class_slot = (self.mask_token + self.decoder_pos_embed_learned[:, :1]).expand(batch, -1, -1)
        sequence = [class_slot.to(x.dtype), x]
        attn_mask = None
        if self.append_ids:
            id_embeddings, attn_mask = self.embed_visible_ids(ids, positions)
            sequence.append(id_embeddings.to(x.dtype))
        x = torch.cat(sequence, 1)
        for block in self.decoder_blocks[:-1]:
            x = block(x, attn_mask)
        wanted = positions.masked if masked_only else torch.arange(tokens, device=ids.device).expand(batch, -1)
        x = self.decoder_norm(self.decoder_blocks[-1](x, attn_mask, queries=1 + wanted))
        return self.mlm_layer(positions.unpad_masked(x) if masked_only else x, self.token_emb.weight[:vocabulary])

    def embed_visible_ids(self, ids: Tensor, positions: MaskPositions) -> tuple[Tensor, Tensor | None]:
        """Embed the reliable ids, Long[B,N] -> Float[B,E,W] in position order.

        If the rows differ in their number of reliable ids, the second result is an attention mask,
        Bool[B,1,1,1+N+E], which hides the padding of the shorter rows; otherwise it is None.
        """
        visible, valid = positions.visible, positions.visible_valid
        embeddings = self.token_emb(ids.gather(1, visible)) + self.decoder_pos_token_embed[0, 1:][visible]
        if valid is None:
            return embeddings, None
        return embeddings, torch.cat([valid.new_ones(len(ids), 1 + ids.shape[1]), valid], 1)[:, None, None]
