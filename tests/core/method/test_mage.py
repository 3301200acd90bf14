"""MAGE as a generator: which ids a step draws, keeps and masks, and when it decodes them."""

import math

import pytest
import torch
from tiny import random_images, tiny_addp

from addp_core import MAGE, inpaint, load_mage, sample, save_model
from addp_core.method.sampler import SampleConfig, denoise, sampling_noise
from addp_core.networks.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def mage(tmp_path_factory) -> MAGE:
    model, folder = tiny_addp(), tmp_path_factory.mktemp("mage")
    save_model(model.predictor, folder / "p.safetensors", grid=model.config.grid)
    save_model(model.tokenizer, folder / "t.safetensors")
    return load_mage(folder / "p.safetensors", tokenizer=folder / "t.safetensors")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 6, 40])
def test_a_step_masks_a_share_rounded_down_and_fewer_ids_than_the_one_before(mage, steps, schedule):
    tokens, masked = mage.config.tokens, mage.config.tokens
    known = torch.full((3, tokens), -1)
    for step, state in enumerate(
        denoise(mage, sampling_noise(steps, tokens, 0, range(3)), SampleConfig(steps, schedule))
    ):
        progress = (step + 1) / steps
        share = math.cos(math.pi / 2 * progress) if schedule == "cosine" else 1 - progress
        masked = max(min(math.floor(tokens * share), masked - 1), 1)
        assert state.mask.sum(1).tolist() == state.masked == [masked] * 3
        assert torch.equal(state.ids[known >= 0], known[known >= 0])
        known = torch.where(state.mask, known, state.ids)


def test_ids_are_drawn_from_the_predictors_distribution(mage):
    noise = sampling_noise(2, mage.config.tokens, 0, range(4))
    first, second = denoise(mage, noise, SampleConfig(2, temperature=0.0, top_p=0.0))
    for state, given, mask in (
        (first, torch.zeros_like(first.ids), torch.ones_like(first.mask)),
        (second, first.ids, first.mask),
    ):
        guessed = mage.predictor(given, mask).argmax(-1)
        assert torch.equal(state.ids[mask], guessed[mask])


def test_the_image_is_decoded_from_all_ids_at_the_end_or_when_it_is_asked_for(mage, monkeypatch):
    decoded = []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, x: decoded.append(len(x)) or decode(self, x))
    images = sample(mage, 5, steps=4, batch=2)
    assert decoded == [2, 2, 1]
    states = []
    assert torch.equal(sample(mage, 5, steps=4, batch=2, on_step=lambda step, state: states.append(state)), images)
    assert decoded[3:] == [2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1]
    assert torch.equal(mage.render(torch.empty(0), states[3].ids, states[3].mask).clamp(0, 1), images[:2])


def test_images_depend_on_seed_and_number_only(mage):
    images = sample(mage, 6, steps=5)
    assert images.shape == (6, 3, 8, 12)
    torch.testing.assert_close(sample(mage, 2, steps=5, first=3), images[3:5], atol=1e-5, rtol=0)
    assert not torch.allclose(sample(mage, 1, steps=5, seed=1), images[:1])


def test_a_hole_is_filled_and_the_rest_unchanged(mage):
    images, hole = random_images(), torch.zeros(3, 8, 12, dtype=torch.bool)
    hole[:, 2:6, 4:10] = True
    filled = inpaint(mage, images, hole, steps=5)
    outside = ~hole.unsqueeze(1).expand(-1, 3, -1, -1)
    assert torch.equal(filled[outside], images[outside])
    assert not torch.equal(filled, images)
    assert not torch.equal(inpaint(mage, images, hole, steps=5, seed=1), filled)
