"""An encoder over token ids rather than pixels: MAGE's, as a contestant in recognition (Tab. 1 of the paper).

References: MAGE (arXiv 2211.09117).
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
    """A frozen tokenizer and MAGE's encoder over its ids, with the class slot in front; images come in normalised.

    mean, std: of those images. `config.dropout` acts in embeddings, attention and MLP. ValueError where the tokenizer's
    stride does not divide the image size (height, width).
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
        self.predictor_config, self.vocabulary, self.image_size = config, vocabulary, tuple(image_size)
        self.config = EncoderConfig(config.width, config.depth, config.heads, config.dropout, drop_path)
        self.mean, self.std = mean, std
        self.patch_size = tokenizer.stride
        self.grid = tokenizer.grid(self.image_size)
        self.token_emb = TokenEmbeddings(vocabulary.size, 1 + self.grid[0] * self.grid[1], config.width, config.dropout)
        self.blocks = transformer_blocks(config.width, config.depth, config.heads, config.dropout, drop_path)
        self.norm = LayerNorm(config.width)
        init_transformer(self)
        self.tokenizer = Tokenizer(tokenizer).requires_grad_(False)
        del self.tokenizer.decoder  # no pixels are wanted back

    def embed(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] normalised -> Float[B,1+N,W]: the class slot and the embedded ids."""
        ids = self.tokenize(images)
        return self.token_emb(torch.cat([ids.new_full((ids.shape[0], 1), self.vocabulary.class_id), ids], 1))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] normalised -> Long[B,N] ids."""
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return self.tokenizer.encode((images * std + mean).clamp(0, 1))

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay spares, beside one-dimensional ones."""
        return {"token_emb.position_embeddings.weight"}

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict[str, str]:
        """timm's description of the layers for layer-wise decay, as that of `Encoder`."""
        start = "^" + re.escape(prefix)
        return {
            "stem": f"{start}(?:token_emb|tokenizer)",
            "blocks": start + (r"blocks" if coarse else r"blocks\.(\d+)"),
        }
