"""The small tokenizer whose training the tests of stage 1 check, and its images."""

import torch
from torch.nn import functional as F

from addp_core.networks.tokenizer import TokenizerConfig

MODEL = TokenizerConfig(width=32, multipliers=(1, 1), blocks=1, codebook=16, dim=4)
SIZE = 24  # pixels, 12 x 12 tokens


def smooth_images(n: int = 4, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    """Return smooth color noise, which a few codes can describe."""
    coarse = torch.rand(n, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bilinear")
