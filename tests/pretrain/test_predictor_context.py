"""The token predictor's metric `context`."""

import math
from collections import Counter

import pytest
import torch
from tiny import tiny_addp

from pretrain.predictor import MaskedTokenModel


def test_the_predictors_context_is_what_it_knows_beyond_frequencies():
    """By hand: entropy of the smoothed frequencies of the masked ids, minus the loss."""
    model = tiny_addp()
    ids = torch.randint(24, (3, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[:, ::2] = True
    found = MaskedTokenModel(model.predictor, 0.1)(ids, mask, mask)
    size = model.predictor.logits(ids, mask, mask).shape[-1]
    counts = Counter(ids[mask].tolist())
    guess = [0.9 * counts[code] / 36 + 0.1 / size for code in range(size)]
    assert found["context"].item() == pytest.approx(
        -sum(p * math.log(p) for p in guess) - found["loss"].item(), abs=1e-4
    )
    assert found["context"] < 0  # random weights know less than frequencies
