"""The diffusion process: mask ratios, masks, mappings, targets and the loss function."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from addp_core.base.rng import generator
from addp_core.method.diffusion import (
    ProcessConfig,
    draw_masks,
    map_tokens,
    mask_ratios,
    soft_cross_entropy,
    training_target,
)


def test_map_tokens():
    q = torch.tensor([[[0.1, 0.9], [1.0, 0.0]]])
    codes = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(map_tokens(q, codes, "weighted"), torch.tensor([[[0.1, 1.8], [1.0, 0.0]]]))
    assert torch.equal(map_tokens(q, codes, "argmax"), codes[torch.tensor([[1, 0]])])
    torch.manual_seed(0)
    draws = torch.stack([map_tokens(q, codes, "sample")[0] for _ in range(400)])
    assert (draws[:, 1] == codes[0]).all()
    assert 0.85 < (draws[:, 0, 1] == 2).float().mean() < 0.95


def test_training_targets():
    q, ids = torch.tensor([[[0.2, 0.8]]]), torch.tensor([[0]])
    assert torch.equal(training_target(q, ids, "q(z|z_t)"), q)
    assert training_target(q, ids, "z_0").tolist() == [[[1.0, 0.0]]]
    torch.testing.assert_close(training_target(q, ids, "both"), torch.tensor([[[0.6, 0.4]]]))


@given(st.integers(2, 9), st.integers(0, 5), st.floats(0, 0.9), st.integers(0, 1000))
def test_soft_cross_entropy_matches_torch(codes, unused, smoothing, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, codes + unused, generator=g, dtype=torch.double).float() * 3
    target = torch.rand(4, codes, generator=g).softmax(-1)
    padded = F.pad(target, (0, unused))
    expected = F.cross_entropy(logits, padded, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, target, smoothing), expected, rtol=1e-4, atol=1e-5)


def test_published_mask_ratios():
    ratios, probabilities = mask_ratios(ProcessConfig())
    expected = [math.cos(math.pi / 2 * i / 100) for i in range(100, -1, -1)]
    expected = [r for r in expected if 0.5 <= r < 1.0]
    torch.testing.assert_close(ratios, torch.tensor(expected), atol=1e-6, rtol=0)
    density = torch.tensor([math.exp(-0.5 * ((r - 0.55) / 0.25) ** 2) for r in expected], dtype=torch.double)
    torch.testing.assert_close(probabilities, density / density.sum(), atol=1e-6, rtol=1e-5)


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 10**6), st.sampled_from(["truncnorm", "fixed"]))
def test_masks_are_nested_and_reproducible_with_equal_counts(batch, tokens, seed, ratios):
    config = ProcessConfig(ratios=ratios, ratio_mean=0.5 if ratios == "fixed" else 0.55)
    mask, later = draw_masks(config, batch, tokens, torch.Generator().manual_seed(seed))
    assert mask.shape == later.shape == (batch, tokens)
    assert not (mask & ~later).any()
    assert len(set(mask.sum(1).tolist())) == 1
    assert int(mask[0].sum()) >= math.ceil(tokens * 0.5)
    if ratios == "fixed":
        assert int(mask[0].sum()) == math.ceil(tokens * 0.5)
    repeated, _ = draw_masks(config, batch, tokens, torch.Generator().manual_seed(seed))
    assert torch.equal(mask, repeated)


def test_mask_ratios_follow_their_distribution():
    config = ProcessConfig()
    ratios, probabilities = mask_ratios(config)
    counts = [int(draw_masks(config, 1, 1000, generator("ratio", i))[0].sum()) for i in range(2000)]
    expected = float((probabilities * torch.ceil(ratios.double() * 1000)).sum())
    assert sum(counts) / len(counts) == pytest.approx(expected, rel=0.02)
    jumps = {
        int(later.sum()) - int(mask.sum())
        for mask, later in (draw_masks(config, 1, 1000, generator("j", i)) for i in range(200))
    }
    assert min(jumps) >= 0
    assert len(jumps) > 20


@pytest.mark.parametrize("options", [{"ratio_min": 0.8, "ratio_max": 0.7}, {"timesteps": 1, "ratio_min": 0.5}])
def test_impossible_ratios_are_rejected(options):
    with pytest.raises(ValueError, match=r"ratio_min|timesteps"):
        ProcessConfig(**options)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ProcessConfig().target = "z_0"
