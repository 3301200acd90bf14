"""Models small enough for tests, and inputs for them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from addp_core.base.rng import generator
from addp_core.method.addp import ADDP, ADDPConfig, DenoiserConfig
from addp_core.method.diffusion import ProcessConfig
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.cnn import CnnConfig
from addp_core.networks.decoder import DecoderConfig
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.tokenizer import TokenizerConfig, Vocabulary

TOKENIZER = TokenizerConfig(width=32, multipliers=(1, 1), blocks=1, codebook=24, dim=8)
WINDOWED = AttentionConfig(window=3, global_blocks=2, class_token=False)

BATCH, HEIGHT, WIDTH = 3, 8, 12
TOKENS = 24  # a 4 x 6 grid


def tiny_addp(
    image_size: tuple[int, int] = (HEIGHT, WIDTH),
    dropout: float = 0.0,
    seed: int = 0,
    unused: int = 5,
    **process: Any,
) -> ADDP:
    """Return an ADDP of a few thousand parameters over a grid of 4 x 6 tokens with 24 codes.

    The codes are spread widely enough for different ids to give different outputs.
    """
    torch.manual_seed(seed)
    config = ADDPConfig(
        image_size=image_size,
        tokenizer=TOKENIZER,
        vocabulary=Vocabulary(TOKENIZER.codebook, unused=unused, class_slot=1),
        predictor=PredictorConfig(width=16, depth=2, heads=2, decoder_depth=1, decoder_heads=2, dropout=dropout),
        denoiser=DenoiserConfig(
            EncoderConfig(16, 2, 2, dropout=dropout, input_dropout=dropout, tokenizer_norm=True),
            DecoderConfig(2, 2, dropout),
        ),
        process=ProcessConfig(**process),
    )
    model = ADDP(config).eval()
    with torch.no_grad():
        model.tokenizer.quantize.embedding.weight.normal_()
    return model


def tiny_cnn_addp(arch: str = "test_resnet", image_size: tuple[int, int] = (HEIGHT, WIDTH), **process: Any) -> ADDP:
    """Return the model of `tiny_addp` with a CNN of timm in place of the ViT."""
    vit = tiny_addp(image_size).config
    torch.manual_seed(0)
    denoiser = DenoiserConfig(CnnConfig(arch, width=16), DecoderConfig(2, 2, 0.0))
    return ADDP(replace(vit, denoiser=denoiser, process=ProcessConfig(**process)))


def tiny_encoder(
    attention: AttentionConfig,
    size: tuple[int, int] = (32, 40),
    dynamic: bool = False,
    depth: int = 4,
    **options: Any,
) -> Encoder:
    """Return an encoder over 4 x 5 patches whose relative positions are not zero."""
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(16, depth, 2, **options), size, 8, attention, dynamic)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".relative." in name:
                parameter.normal_()
    return model.eval()


def random_images() -> Tensor:
    """Return images for `tiny_addp`, Float[BATCH,3,HEIGHT,WIDTH] in [0,1]."""
    return torch.rand(BATCH, 3, HEIGHT, WIDTH, generator=generator("images"))


def random_tensor(*shape: int, seed: str = "x") -> Tensor:
    """Return normal numbers of this shape."""
    return torch.randn(*shape, generator=generator(seed))


def nested_masks(rows: int = BATCH, tokens: int = TOKENS, t: int = 14, later: int = 18) -> tuple[Tensor, Tensor]:
    """Return masks Bool[rows,tokens] with `t` and with `later` unreliable positions; the first lies in the second."""
    rank = torch.rand(rows, tokens, generator=generator("masks")).argsort(1).argsort(1)
    return rank < t, rank < later
