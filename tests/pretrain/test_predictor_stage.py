"""Stage 2: the masks of MAGE, and the metric `context`."""

import math
from collections import Counter

import pytest
import torch
from tiny import tiny_addp

from pretrain.predictor import MaskedTokenModel, MaskingConfig, draw_mage_masks


def test_masks_have_one_ratio_within_the_bounds_and_contain_the_dropped_positions():
    config = MaskingConfig(ratio_min=0.4, ratio_max=0.9)
    shares = []
    for seed in range(200):
        mask, dropped = draw_mage_masks(config, 3, 50, torch.Generator().manual_seed(seed))
        assert mask.shape == dropped.shape == (3, 50)
        assert len(set(mask.sum(1).tolist())) == 1
        assert (dropped.sum(1) == 20).all()
        assert not (dropped & ~mask).any()
        shares.append(mask.float().mean().item())
    assert min(shares) >= 0.4
    assert max(shares) <= 0.9 + 1e-6
    assert abs(sum(shares) / 200 - 0.62) < 0.03  # the mean of the truncated normal, rounded up to whole positions
    mask, _ = draw_mage_masks(config, 3, 50, torch.Generator().manual_seed(0))
    assert len({tuple(row.tolist()) for row in mask}) == 3  # each image has positions of its own


def test_context_is_what_the_predictor_knows_beyond_frequencies():
    """Computed by hand: the entropy of the smoothed frequencies of the masked ids, minus the loss."""
    model = tiny_addp()
    assert model.predictor is not None
    ids = torch.randint(24, (3, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[:, ::2] = True
    metrics = MaskedTokenModel(model.predictor, 0.1)(ids, mask, mask)
    vocabulary = model.predictor.logits(ids, mask, mask).shape[-1]
    counts = Counter(ids[mask].tolist())
    frequencies = [0.9 * counts[code] / 36 + 0.1 / vocabulary for code in range(vocabulary)]
    entropy = -sum(p * math.log(p) for p in frequencies)
    assert metrics["context"].item() == pytest.approx(entropy - metrics["loss"].item(), abs=1e-4)
    assert metrics["context"] < 0  # random weights know less than the frequencies
