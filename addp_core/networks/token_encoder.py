"""The encoder over token ids instead of pixels: MAGE's input in front of the blocks of `Encoder` (Tab. 1 of the paper).

Reference: MAGE (arXiv 2211.09117).
"""

from dataclasses import dataclass

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F

from addp_core.networks.attention import PLAIN_ATTENTION, AttentionConfig
from addp_core.networks.encoder import EncoderConfig, TransformerEncoder, padded_grid
from addp_core.networks.predictor import PredictorConfig, TokenEmbeddings, TokenPredictor
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig, Vocabulary

RGB = tuple[float, float, float]  # one value per color channel

# Without gradients, the published VQGAN needs 3 GiB for an image of 1024 x 1024 pixels, and as much again for each
# further one. Larger images than this are tokenized one at a time.
LARGE_IMAGE = 512 * 512


@dataclass(frozen=True)
class TokenInput:
    """The ids that an encoder reads, and the VQGAN that they come from."""

    vocabulary: Vocabulary
    tokenizer: TokenizerConfig


@dataclass(frozen=True)
class TokenEncoderArchitecture:
    """Architecture of an encoder over token ids, including its tokenizer, as files store it."""

    predictor: PredictorConfig
    vocabulary: Vocabulary
    tokenizer: TokenizerConfig
    image_size: tuple[int, int]
    attention: AttentionConfig = PLAIN_ATTENTION
    mean: RGB = IMAGENET_DEFAULT_MEAN  # of the normalization of the images, which the tokenizer needs undone
    std: RGB = IMAGENET_DEFAULT_STD

    @property
    def patch_size(self) -> int:
        """Side in pixels of the square that a token covers."""
        return self.tokenizer.stride

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens; those at the lower and the right edge may lie half in the padding."""
        return padded_grid(self.image_size, self.tokenizer.stride)

    def build(self, image_size: tuple[int, int] | None = None, dynamic: bool = False) -> "TokenEncoder":
        """Build the encoder, with random weights, for images of this size (default: its own)."""
        return TokenEncoder(
            self.predictor,
            self.vocabulary,
            self.tokenizer,
            image_size or self.image_size,
            mean=self.mean,
            std=self.std,
            attention=self.attention,
            dynamic=dynamic,
        )


class TokenEncoder(TransformerEncoder):
    """A frozen tokenizer, and an encoder over its ids, with the class slot first.

    Images whose sides are no multiples of the tokenizer's stride are padded to the next ones, at the bottom and at the
    right, with zeros after normalization, as detection pads images. The ids of padded places are tokens like any other.

    Args:
        config: MAGE's architecture; its dropout acts in embeddings, attention and MLP.
        vocabulary: ids of the encoder.
        tokenizer: architecture of the VQGAN.
        image_size: height and width in pixels.
        drop_path: stochastic depth of the last block; it grows linearly from 0.
        mean, std: with which the input images are normalized; the tokenizer needs them undone.
        attention, dynamic: as in `Encoder`.
    """

    kind = "token_encoder"
    stem = r"(?:token_emb|tokenizer)"
    position_name = "token_emb.position_embeddings.weight"

    def __init__(
        self,
        config: PredictorConfig,
        vocabulary: Vocabulary,
        tokenizer: TokenizerConfig,
        image_size: tuple[int, int],
        drop_path: float = 0.0,
        mean: RGB = IMAGENET_DEFAULT_MEAN,
        std: RGB = IMAGENET_DEFAULT_STD,
        attention: AttentionConfig = PLAIN_ATTENTION,
        dynamic: bool = False,
    ):
        blocks = EncoderConfig(config.width, config.depth, config.heads, config.dropout, drop_path)
        super().__init__(blocks, image_size, tokenizer.stride, attention, dynamic)
        self.predictor_config, self.vocabulary = config, vocabulary
        self.mean, self.std = (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])  # from any kind of sequence
        self.token_emb = TokenEmbeddings(vocabulary.size, 1 + self.grid[0] * self.grid[1], config.width, config.dropout)
        self._add_blocks()
        self.tokenizer = Tokenizer(tokenizer).requires_grad_(False)
        del self.tokenizer.decoder  # nothing is decoded back to pixels

    @classmethod
    def of_predictor(
        cls, predictor: TokenPredictor, tokenizer: Tokenizer, image_size: tuple[int, int]
    ) -> "TokenEncoder":
        """Return the encoder of a predictor behind its tokenizer, in eval mode; it shares their weights."""
        with torch.device("meta"):
            encoder = cls(predictor.config, predictor.vocabulary, tokenizer.config, image_size)
        encoder.token_emb, encoder.blocks, encoder.norm = predictor.token_emb, predictor.blocks, predictor.norm
        encoder.tokenizer = tokenizer
        return encoder.eval()

    @property
    def architecture(self) -> TokenEncoderArchitecture:
        """Everything that builds the encoder again."""
        return TokenEncoderArchitecture(
            self.predictor_config,
            self.vocabulary,
            self.tokenizer.config,
            self.image_size,
            self.attention,
            self.mean,
            self.std,
        )

    @property
    def positions(self) -> Tensor:
        """The absolute positions, Float[1,1+N,W]."""
        return self.token_emb.position_embeddings.weight.unsqueeze(0)

    def embed(self, images: Tensor) -> Tensor:
        """Embed the class slot and the ids of normalized images: Float[B,3,H,W] -> Float[B,1+N,W].

        Raises ValueError if the images are of another size than the encoder's, which is not dynamic.
        """
        grid = self.grid_of(images)
        if grid != self.grid and not self.dynamic:
            found, expected = (" x ".join(map(str, size)) for size in (images.shape[-2:], self.image_size))
            raise ValueError(f"images of {found} pixels, expected {expected}, or an encoder with dynamic=True")
        ids, positions = self.tokenize(images), self.positions_of(grid)[0]
        if not self.attention.class_token:
            return self.token_emb(ids, positions[1:])
        class_slot = ids.new_full((ids.shape[0], 1), self.vocabulary.class_id)
        return self.token_emb(torch.cat([class_slot, ids], 1), positions)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Return the ids of normalized images, row by row: Float[B,3,H,W] -> Long[B,N].

        Images of more pixels than `LARGE_IMAGE` are tokenized one at a time.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        images = (images * std + mean).clamp(0, 1)
        if height * width <= LARGE_IMAGE:
            return self.tokenizer.encode(images)
        return torch.cat([self.tokenizer.encode(image) for image in images.split(1)])

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return the rows and columns of tokens of images Float[B,3,H,W]."""
        return padded_grid((images.shape[-2], images.shape[-1]), self.patch_size)
