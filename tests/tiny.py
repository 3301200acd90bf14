"""Models small enough for tests, through the public names."""

import torch

from addp_core.method.addp import ADDP, ADDPConfig, DenoiserConfig
from addp_core.method.diffusion import ProcessConfig
from addp_core.networks.decoder import DecoderConfig
from addp_core.networks.encoder import EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.tokenizer import TokenizerConfig, Vocabulary

TOKENIZER = TokenizerConfig(width=32, multipliers=(1, 1), blocks=1, codebook=24, dim=8)


def tiny_addp(image_size=(8, 12), dropout=0.0, seed=0, unused=5, **process) -> ADDP:
    """An ADDP of a few thousand parameters over a 4 x 6 grid of 24 codes, with weights spread enough to tell outputs
    apart.
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
