"""MAGE's encoder over token ids instead of pixels, for comparison in recognition (Tab. 1 of the paper).

Reference: MAGE (arXiv 2211.09117).
"""

import re

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from addp_core.networks.encoder import EncoderConfig, FeatureEncoder
from addp_core.networks.layers import LayerNorm, init_transformer, transformer_blocks
from addp_core.networks.predictor import PredictorConfig, TokenEmbeddings
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig, Vocabulary


class TokenEncoder(FeatureEncoder):
    """A frozen tokenizer followed by MAGE's encoder over its ids, with the class slot first.

    Args:
        config: MAGE's architecture; its dropout acts in embeddings, attention and MLP.
        vocabulary: ids of the encoder.
        tokenizer: architecture of the VQGAN.
        image_size: height and width in pixels, multiples of the tokenizer's stride (ValueError otherwise).
        drop_path: stochastic depth of the last block; it grows linearly from 0.
        mean, std: with which the input images are normalized; the tokenizer needs them undone.
    """

    def __init__(
        self,
        config: PredictorConfig,
        vocabulary: Vocabulary,
        tokenizer: TokenizerConfig,
        image_size: tuple[int, int],
        drop_path: float = 0.0,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__()
        self.predictor_config, self.vocabulary = config, vocabulary
        self.image_size = (image_size[0], image_size[1])
        self.config = EncoderConfig(config.width, config.depth, config.heads, config.dropout, drop_path)
        self.mean, self.std = mean, std
        self.patch_size = tokenizer.stride
        self.grid = tokenizer.grid(self.image_size)
        self.token_emb = TokenEmbeddings(vocabulary.size, 1 + self.grid[0] * self.grid[1], config.width, config.dropout)
        self.blocks = transformer_blocks(config.width, config.depth, config.heads, config.dropout, drop_path)
        self.norm = LayerNorm(config.width)
        init_transformer(self)
        self.tokenizer = Tokenizer(tokenizer).requires_grad_(False)
        del self.tokenizer.decoder  # nothing is decoded back to pixels

    def embed(self, images: Tensor) -> Tensor:
        """Embed the class slot and the ids of normalized images: Float[B,3,H,W] -> Float[B,1+N,W]."""
        ids = self.tokenize(images)
        return self.token_emb(torch.cat([ids.new_full((ids.shape[0], 1), self.vocabulary.class_id), ids], 1))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Return the ids of normalized images: Float[B,3,H,W] -> Long[B,N]."""
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return self.tokenizer.encode((images * std + mean).clamp(0, 1))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides one-dimensional ones, without weight decay."""
        return {"token_emb.position_embeddings.weight"}

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict[str, str]:
        """Describe the layers to timm for layer-wise learning rate decay, as `Encoder.group_matcher` does."""
        start = "^" + re.escape(prefix)
        return {
            "stem": f"{start}(?:token_emb|tokenizer)",
            "blocks": start + (r"blocks" if coarse else r"blocks\.(\d+)"),
        }
