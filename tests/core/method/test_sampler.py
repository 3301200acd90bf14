"""Generation and inpainting with every schedule and number of steps; images are independent of each other."""

import math

import pytest
import torch
from compiled import counted_graphs
from fake_cuda import fake_cuda, on_fake_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOKENS, nested_masks, tiny_addp

from addp_core import inpaint, sample
from addp_core.base.rng import generator
from addp_core.method.sampler import (
    SampleConfig,
    SamplerState,
    composite,
    denoise,
    draw_ids,
    halton_order,
    sampling_noise,
)
from addp_core.training.compute import accelerate_model


@pytest.fixture(scope="module")
def model():
    return tiny_addp()


def test_images_depend_on_seed_and_number_only(model):
    images = sample(model, 7, steps=5)
    assert images.shape == (7, 3, 8, 12)
    assert images.min() >= 0
    assert images.max() <= 1
    for batch in (1, 2, 3):
        torch.testing.assert_close(sample(model, 7, steps=5, batch=batch), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(sample(model, 2, steps=5, first=4), images[4:6], atol=1e-5, rtol=0)
    assert not torch.allclose(sample(model, 1, steps=5, seed=1), images[:1])
    assert not torch.allclose(images[0], images[1])
    torch.manual_seed(5)
    assert torch.equal(sample(model, 7, steps=5), images)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 30),
    st.sampled_from(["cosine", "linear"]),
    st.floats(0, 8),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0, 3]),
    st.sampled_from(["confidence", "halton"]),
)
def test_every_step_keeps_the_known_ids(steps, schedule, temperature, top_p, top_k, order):
    model = tiny_addp()
    n, tokens = 2, model.config.tokens
    known = torch.full((n, tokens), -1)
    count = 0
    config = SampleConfig(steps, schedule, temperature, top_p, top_k, order)
    for step, state in enumerate(denoise(model, sampling_noise(steps, tokens, 0, range(n)), config)):
        progress = (step + 1) / steps
        ratio = math.cos(math.pi / 2 * progress) if schedule == "cosine" else 1 - progress
        assert state.mask.sum(1).tolist() == [min(max(math.ceil(tokens * ratio), 1), tokens)] * n
        is_known = known >= 0
        assert torch.equal(state.ids[is_known], known[is_known])
        assert not (state.mask & is_known).any()
        known = torch.where(state.mask, known, state.ids)
        count += 1
    assert count == steps


def test_intermediate_images_on_request(model):
    steps = []
    final = sample(
        model, 3, steps=4, batch=2, on_step=lambda number, state: steps.append((number, state.image, state.mask))
    )
    assert [number for number, *_ in steps] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert torch.equal(steps[3][1].clamp(0, 1), final[:2])
    assert steps[0][2].sum() > steps[3][2].sum()


def test_ids_follow_the_distribution_and_the_nucleus():
    q = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = torch.rand(1, 20000, generator=generator("u")).clamp(1e-6, 1 - 1e-6)
    distributions = q.expand(1, 20000, 4)

    def frequencies(ids: torch.Tensor) -> torch.Tensor:
        return torch.bincount(ids[0], minlength=4) / 20000

    torch.testing.assert_close(frequencies(draw_ids(distributions, uniform, 1.0)), q, atol=0.015, rtol=0)
    torch.testing.assert_close(
        frequencies(draw_ids(distributions, uniform, 0.6)), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0
    )
    assert (draw_ids(distributions, uniform, 0.0) == 0).all()
    # The id that crosses the mass belongs to the nucleus, so at least one id remains.
    assert (draw_ids(distributions, uniform, 1e-9) == 0).all()


def test_top_k_draws_the_most_probable_ids():
    q = torch.tensor([0.1, 0.4, 0.2, 0.3]).expand(1, 20000, 4)
    uniform = torch.rand(1, 20000, generator=generator("k")).clamp(1e-6, 1 - 1e-6)
    frequencies = torch.bincount(draw_ids(q, uniform, top_p=1.0, top_k=2)[0], minlength=4) / 20000
    torch.testing.assert_close(frequencies, torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.015, rtol=0)
    # The nucleus is that of the remaining ids: 0.4 of 0.7 is more than half.
    assert (draw_ids(q, uniform, 0.5, top_k=2) == 1).all()
    assert (draw_ids(q, uniform, 1.0, top_k=1) == 1).all()
    assert torch.equal(draw_ids(q, uniform, 1.0, top_k=9), draw_ids(q, uniform, 1.0, top_k=4))


@pytest.mark.parametrize("grid", [(16, 16), (4, 6), (1, 1), (7, 3)])
def test_halton_order_visits_every_position_and_spreads(grid):
    order = halton_order(grid)
    assert sorted(order) == list(range(grid[0] * grid[1]))
    for known in range(8, len(order), 8):
        rows = [position // grid[1] for position in order[:known]]
        # Both halves of the grid hold about half of the known positions at any time.
        assert abs(sum(row < grid[0] / 2 for row in rows) - known / 2) <= known / 8 + 2


def test_halton_order_depends_on_the_image_number_and_not_on_confidence(model):
    def masks(**options):
        states = []
        sample(model, 3, steps=4, on_step=lambda _, state: states.append(state.mask), **options)
        return torch.stack(states)

    halton = masks(order="halton")
    assert torch.equal(halton, masks(order="halton", temperature=0.0, top_p=0.3))
    assert not torch.equal(halton[0, 0], halton[0, 1])  # each image has its own offset
    assert not torch.equal(halton, masks())
    images = sample(model, 3, steps=4, order="halton", top_k=3)
    torch.testing.assert_close(sample(model, 1, steps=4, order="halton", top_k=3, first=2)[0], images[2])


@pytest.mark.parametrize("options", [{"top_k": -1}, {"order": "random"}])
def test_impossible_settings_are_rejected(model, options):
    with pytest.raises(ValueError, match=r"top_k, order: found"):
        sample(model, 1, steps=2, **options)


@pytest.mark.parametrize("edge", [1e-6, 1 - 1e-6])
def test_extreme_random_numbers_draw_possible_ids(edge):
    q = torch.tensor([[[0.0, 0.5, 0.5, 0.0]]])
    assert draw_ids(q, torch.full((1, 1), edge), 1.0).item() in (1, 2)
    assert draw_ids(q, torch.full((1, 1), edge), 0.4).item() in (1, 2)


def test_argmax_without_noise_ignores_the_seed(model):
    torch.testing.assert_close(*(sample(model, 1, steps=6, temperature=0.0, top_p=0.0, seed=s) for s in (0, 1)))


def test_sampling_needs_no_predictor():
    model = tiny_addp()
    expected = sample(model, 2, steps=3)
    model.predictor = None
    assert torch.equal(sample(model, 2, steps=3), expected)


@pytest.mark.parametrize("ids_to", ["encoder+decoder", "none"])
def test_ablated_models_sample(ids_to):
    assert sample(tiny_addp(ids_to=ids_to), 2, steps=3).isfinite().all()


@pytest.mark.parametrize("ids_to", ["decoder", "encoder+decoder"])
def test_compiled_sampling_has_few_graphs_for_all_steps(ids_to):
    """The tokenizer's decoder is one, and the denoiser one, or two with steps that know fewer than two ids."""
    model = tiny_addp(ids_to=ids_to)
    expected = sample(model, 2, steps=12)
    with counted_graphs() as graphs:
        for part in (model.tokenizer, model.denoiser):
            accelerate_model(part, compile=True)
        torch.testing.assert_close(sample(model, 2, steps=12), expected, atol=1e-5, rtol=0)
        assert len(graphs) <= 3
        sample(model, 2, steps=9, seed=1)
        assert len(graphs) <= 3


# -------------------- inpainting


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 12, generator=generator("images"))


def test_pixels_outside_the_hole_come_back_unchanged(model, images):
    hole = torch.zeros(3, 8, 12, dtype=torch.bool)
    hole[0, 2:5, 3:9] = True
    hole[1, :, 6:] = True
    out = inpaint(model, images, hole, steps=6)
    outside = (~hole).unsqueeze(1).expand_as(images)
    assert torch.equal(out[outside], images[outside])
    assert torch.equal(out[2], images[2])
    assert not torch.equal(out[0], images[0])
    assert out.min() >= 0
    assert out.max() <= 1


def test_pixels_under_the_hole_are_never_read(model, images):
    hole = torch.zeros(3, 8, 12, dtype=torch.bool)
    hole[:, 1:6, 2:10] = True
    other = torch.where(hole.unsqueeze(1), torch.rand(1, generator=generator("x")), images)
    assert torch.equal(inpaint(model, images, hole, steps=4), inpaint(model, other, hole, steps=4))


def test_a_hole_over_everything_is_generation(model, images):
    hole = torch.ones(3, 8, 12, dtype=torch.bool)
    for options in ({}, {"order": "halton", "top_k": 4}):
        filled, generated = inpaint(model, images, hole, 5, 3, **options), sample(model, 3, 5, seed=3, **options)
        torch.testing.assert_close(filled, generated, atol=1e-5, rtol=0)


def test_rows_with_holes_of_different_size_are_independent(model, images):
    hole = torch.zeros(3, 8, 12, dtype=torch.bool)
    hole[0, :2, :2] = True
    hole[1, :6] = True
    hole[2] = True
    together = inpaint(model, images, hole, steps=6)
    for i in range(3):
        separate = inpaint(model, images[i : i + 1], hole[i : i + 1], steps=6, first=i)
        torch.testing.assert_close(together[i : i + 1], separate, atol=1e-5, rtol=0)


def test_wrong_shapes_are_rejected(model, images):
    with pytest.raises(ValueError, match=r"H x W = 8 x 12"):
        inpaint(model, images, torch.zeros(3, 8, 8, dtype=torch.bool))


def test_seam_fades_into_the_hole():
    images, generated = torch.full((1, 3, 1, 12), 0.8), torch.full((1, 3, 1, 12), 0.4)
    hole = torch.zeros(1, 1, 12, dtype=torch.bool)
    hole[..., 4:] = True
    row = composite(images, generated, hole, blend=3)[0, 0, 0]
    torch.testing.assert_close(row, torch.tensor([0.8] * 4 + [0.7, 0.6, 0.5] + [0.4] * 5))
    assert torch.equal(composite(images, generated, hole, blend=0)[0, 0, 0, 4:], generated[0, 0, 0, 4:])


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_the_host_waits_for_no_step(order):
    with fake_cuda():
        model = on_fake_cuda(tiny_addp())
        assert sample(model, 3, steps=4, batch=2, order=order, top_p=0.9, top_k=5).device.type == "cuda"
        noise = sampling_noise(4, TOKENS, 0, range(2)).to("cuda", non_blocking=True)
        ids, mask = torch.zeros(2, TOKENS, dtype=torch.long), nested_masks(2)[0]
        mask[0, :] = True
        rows = (each.to("cuda", non_blocking=True) for each in (torch.rand(2, 3, 8, 12), ids, mask))
        state = SamplerState(*rows, mask.sum(1).tolist())
        states = denoise(model, noise, SampleConfig(4, order=order), state, 1)
        assert [len(each.masked) for each in states] == [2, 2, 2]
