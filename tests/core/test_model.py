"""The model's parts at their public names: shapes, every option the paper ablates, and what must not depend on what."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOKENIZER, tiny_addp
from torch.nn import functional as F

from addp_core.base.rng import generator
from addp_core.method.addp import ADDPConfig, Denoiser
from addp_core.method.diffusion import (
    ProcessConfig,
    draw_masks,
    map_tokens,
    mask_ratios,
    soft_cross_entropy,
    training_target,
)
from addp_core.networks.encoder import VIT_SIZES, Encoder, EncoderConfig
from addp_core.networks.predictor import PredictorConfig, TokenPredictor
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig, Upsample, Vocabulary
from pretrain.predictor import MaskedTokenModel

B, H, W = 3, 8, 12
N = 24  # a 4 x 6 grid


@pytest.fixture
def model():
    return tiny_addp()


@pytest.fixture
def images():
    return torch.rand(B, 3, H, W, generator=generator("images"))


def masks(rows=B, tokens=N, t=14, later=18):
    rank = torch.rand(rows, tokens, generator=generator("masks")).argsort(1).argsort(1)
    return rank < t, rank < later


# -------------------- tokenizer


def test_tokenizer_round_trip_shapes(model, images):
    ids = model.tokenizer.encode(images)
    assert ids.shape == (B, N)
    assert ids.dtype == torch.long
    codes = model.tokenizer.lookup(ids)
    assert codes.shape == (B, TOKENIZER.dim, 4, 6)
    assert torch.equal(codes[1, :, 2, 3], model.tokenizer.quantize.embedding.weight[ids[1, 2 * 6 + 3]])  # row-major
    assert model.tokenizer.decode(codes).shape == (B, 3, H, W)


def test_lookup_says_which_grid_is_missing(model):
    with pytest.raises(ValueError, match="found 23 ids, expected 4 x 6"):
        model.tokenizer.lookup(torch.zeros(1, 23, dtype=torch.long))


def test_nearest_code_is_nearest(model, images):
    h = model.tokenizer.encoder(images).flatten(2).transpose(1, 2)
    distances = torch.cdist(h, model.tokenizer.quantize.embedding.weight.expand(B, -1, -1))
    assert torch.equal(model.tokenizer.encode(images), distances.argmin(-1))


def test_upsample_equals_enlarging_then_convolving():
    torch.manual_seed(0)
    up = Upsample(5).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.double)
    expected = up.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(up(x), expected)


def test_published_tokenizer_has_the_published_size():
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig())
    assert sum(p.numel() for p in tokenizer.parameters()) / 1e6 == pytest.approx(54.5, abs=0.05)


@pytest.mark.parametrize("bad", [{"width": 33}, {"multipliers": ()}])
def test_impossible_tokenizers_are_refused(bad):
    with pytest.raises(ValueError, match="found"):
        TokenizerConfig(**bad)


def test_image_sizes_must_fit_the_stride():
    assert TokenizerConfig().grid((256, 192)) == (16, 12)
    with pytest.raises(ValueError, match="multiples of the tokenizer's stride 16"):
        TokenizerConfig().grid((250, 192))


# -------------------- predictor


def test_predictor_gives_distributions_that_ignore_unreliable_ids(model, images):
    ids, (mask, _) = model.tokenizer.encode(images), masks()
    q = model.predictor(ids, mask)
    assert q.shape == (B, N, TOKENIZER.codebook)
    torch.testing.assert_close(q.sum(-1), torch.ones(B, N))
    scrambled = torch.where(mask, (ids + 7) % TOKENIZER.codebook, ids)
    assert torch.equal(model.predictor(scrambled, mask), q)
    assert not torch.equal(model.predictor(torch.where(mask, ids, (ids + 7) % TOKENIZER.codebook), mask), q)


def test_predictor_without_dropped_positions_equals_itself(model, images):
    ids, (mask, _) = model.tokenizer.encode(images), masks()
    nothing = torch.zeros_like(mask)
    torch.testing.assert_close(model.predictor.logits(ids, mask, nothing), model.predictor.logits(ids, mask))
    hidden = masks(t=10)[0]
    assert model.predictor.encode(ids, hidden).shape == (B, 1 + N - 10, 16)


def test_published_predictor_sizes():
    assert Vocabulary(1024).size == 2025
    assert (Vocabulary(1024).class_id, Vocabulary(1024).mask_id) == (1100, 2024)
    with torch.device("meta"):
        predictor = TokenPredictor(PredictorConfig(), 256, Vocabulary(1024))
    assert predictor.token_emb.word_embeddings.weight.shape == (2025, 768)


# -------------------- encoder


@pytest.mark.parametrize(("size", "millions"), [("tiny", 5.5), ("small", 21.7), ("base", 85.8), ("large", 303.3)])
def test_encoder_sizes(size, millions):
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(**VIT_SIZES[size]), (224, 224))
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_encoder_maps_are_its_tokens():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(16, 3, 2), (8, 12), 2).eval()
    images = torch.randn(2, 3, 8, 12)
    first, last = encoder.forward_maps(images, (0, -1))
    assert first.shape == (2, 16, 4, 6)
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), encoder.forward_features(images)[:, 1:])
    torch.testing.assert_close(encoder(images), encoder.norm(encoder.forward_features(images)))


def test_encoder_refuses_sizes_that_its_patches_do_not_divide():
    with pytest.raises(ValueError, match="multiples of the patch size 16"):
        Encoder(EncoderConfig(16, 1, 2), (200, 224))


# -------------------- the whole model


def test_corruption_keeps_reliable_codes_and_replaces_the_rest(model, images):
    ids, (mask, later) = model.tokenizer.encode(images), masks()
    seen = {}
    model.tokenizer.decoder.register_forward_pre_hook(lambda module, inputs: seen.update(z=inputs[0]))
    out = model.corrupt(ids, mask, later)
    assert out.images.shape == images.shape
    assert out.target.shape == (B, N, TOKENIZER.codebook)
    z = seen["z"].flatten(2).transpose(1, 2)
    codebook = model.tokenizer.quantize.embedding.weight
    torch.testing.assert_close(z[~mask], codebook[ids[~mask]])
    torch.testing.assert_close(z[mask], (model.predictor(ids, later) @ codebook)[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.target, model.predictor(ids, mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("condition", ["z_t+1", "z_t"])
@pytest.mark.parametrize("mapping", ["weighted", "argmax", "sample"])
@pytest.mark.parametrize("ids_to", ["decoder", "encoder+decoder", "none"])
@pytest.mark.parametrize("target", ["q(z|z_t)", "z_0", "both"])
def test_every_ablation_trains(images, condition, mapping, ids_to, target):
    model = tiny_addp(condition=condition, mapping=mapping, ids_to=ids_to, target=target)
    loss = model(images, generator("step"))["loss"]
    loss.backward()
    assert math.isfinite(loss.item())
    without = [name for name, p in model.denoiser.named_parameters() if p.grad is None]
    # Without ids in any sequence nothing trains their embeddings: the tie to the head is detached.
    assert without == (["decoder.token_emb.weight"] if ids_to == "none" else [])
    assert all(p.grad is None for part in (model.tokenizer, model.predictor) for p in part.parameters())


def test_condition_decides_which_ids_the_noisy_image_has_seen(images):
    ids, (mask, later) = tiny_addp().tokenizer.encode(images), masks()
    default, ablation = (tiny_addp(condition=c).corrupt(ids, mask, later) for c in ("z_t+1", "z_t"))
    same = tiny_addp().corrupt(ids, mask, mask)
    assert not torch.allclose(default.images, ablation.images)
    torch.testing.assert_close(ablation.images, same.images)
    torch.testing.assert_close(default.target, ablation.target)


def test_mappings():
    q = torch.tensor([[[0.1, 0.9], [1.0, 0.0]]])
    codes = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(map_tokens(q, codes, "weighted"), torch.tensor([[[0.1, 1.8], [1.0, 0.0]]]))
    assert torch.equal(map_tokens(q, codes, "argmax"), codes[torch.tensor([[1, 0]])])
    torch.manual_seed(0)
    draws = torch.stack([map_tokens(q, codes, "sample")[0] for _ in range(400)])
    assert (draws[:, 1] == codes[0]).all()
    assert 0.85 < (draws[:, 0, 1] == 2).float().mean() < 0.95


def test_targets():
    q, ids = torch.tensor([[[0.2, 0.8]]]), torch.tensor([[0]])
    assert torch.equal(training_target(q, ids, "q(z|z_t)"), q)
    assert training_target(q, ids, "z_0").tolist() == [[[1.0, 0.0]]]
    torch.testing.assert_close(training_target(q, ids, "both"), torch.tensor([[[0.6, 0.4]]]))


@given(st.integers(2, 9), st.integers(0, 5), st.floats(0, 0.9), st.integers(0, 1000))
def test_soft_cross_entropy_is_torchs(codes, unused, smoothing, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, codes + unused, generator=g, dtype=torch.double).float() * 3
    target = torch.rand(4, codes, generator=g).softmax(-1)
    padded = F.pad(target, (0, unused))
    expected = F.cross_entropy(logits, padded, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, target, smoothing), expected, rtol=1e-4, atol=1e-5)


def test_loss_at_masked_positions_is_the_whole_loss(model, images):
    ids, (mask, later) = model.tokenizer.encode(images), masks()
    out = model.corrupt(ids, mask, later)
    whole = model.loss(model.logits(out.images, ids, mask), out.target, mask)
    torch.testing.assert_close(model.denoiser(out.images, ids, mask, out.target), whole)


def test_logits_do_not_depend_on_unreliable_ids_or_on_other_rows(model, images):
    ids, (mask, _) = model.tokenizer.encode(images), masks()
    logits = model.logits(images, ids, mask)
    assert logits.shape == (B, N, model.config.vocabulary.size)
    torch.testing.assert_close(model.logits(images, torch.where(mask, 0, ids), mask), logits)
    torch.testing.assert_close(model.logits(images[1:2], ids[1:2], mask[1:2]), logits[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ids_to", ["decoder", "encoder+decoder", "none"])
def test_rows_with_different_numbers_of_reliable_ids(images, ids_to):
    """A batch whose rows see 3, 0 and 24 ids gives each row what it gets alone (the encoder's extra ids are padded with
    mask ids).
    """
    model = tiny_addp(ids_to=ids_to)
    ids = model.tokenizer.encode(images)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, [2, 5, 9]] = False
    mask[2] = False
    together = model.logits(images, ids, mask)
    alone = torch.cat([model.logits(images[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(B)])
    rows = [2] if ids_to == "encoder+decoder" else [0, 1, 2]
    torch.testing.assert_close(together[rows], alone[rows], atol=1e-5, rtol=1e-4)


def test_images_are_clamped_before_the_encoder(model, images):
    ids, (mask, _) = model.tokenizer.encode(images), masks()
    wild = images * 4 - 1.5
    torch.testing.assert_close(model.logits(wild, ids, mask), model.logits(wild.clamp(0, 1), ids, mask))


def test_train_mode_leaves_the_frozen_parts_alone(images):
    model = tiny_addp(dropout=0.5).train()
    assert model.denoiser.training
    assert not model.tokenizer.training
    assert not model.predictor.training
    ids, (mask, later) = model.tokenizer.encode(images), masks()
    assert torch.equal(model.corrupt(ids, mask, later).target, model.corrupt(ids, mask, later).target)


def test_corrupting_without_a_predictor_says_what_is_missing(model, images):
    model.predictor = None
    with pytest.raises(ValueError, match="predictor=<file>"):
        model(images)


def test_published_count_of_trainable_parameters():
    """146.9 M by the published count, which includes tensors that nothing uses."""
    denoiser = Denoiser(ADDPConfig())
    unused = 2 * 257 * 768 + (768 + 1) * 768  # pos_token_embed, pos_mask_embed, decoder_pred
    assert (sum(p.numel() for p in denoiser.parameters()) + unused) / 1e6 == pytest.approx(146.9, abs=0.05)


# -------------------- mask ratios


def test_published_mask_ratios():
    ratios, weights = mask_ratios(ProcessConfig())
    expected = [math.cos(math.pi / 2 * i / 100) for i in range(100, -1, -1)]
    expected = [r for r in expected if 0.5 <= r < 1.0]
    torch.testing.assert_close(ratios, torch.tensor(expected), atol=1e-6, rtol=0)
    density = torch.tensor([math.exp(-0.5 * ((r - 0.55) / 0.25) ** 2) for r in expected], dtype=torch.double)
    torch.testing.assert_close(weights, density / density.sum(), atol=1e-6, rtol=1e-5)


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 10**6), st.sampled_from(["truncnorm", "fixed"]))
def test_masks_are_nested_equal_counts_and_stateless(batch, tokens, seed, ratios):
    config = ProcessConfig(ratios=ratios, ratio_mean=0.5 if ratios == "fixed" else 0.55)
    mask, later = draw_masks(config, batch, tokens, torch.Generator().manual_seed(seed))
    assert mask.shape == later.shape == (batch, tokens)
    assert not (mask & ~later).any()
    assert len(set(mask.sum(1).tolist())) == 1
    assert int(mask[0].sum()) >= math.ceil(tokens * 0.5)
    if ratios == "fixed":
        assert int(mask[0].sum()) == math.ceil(tokens * 0.5)
    again, _ = draw_masks(config, batch, tokens, torch.Generator().manual_seed(seed))
    assert torch.equal(mask, again)


def test_mask_ratios_follow_their_distribution():
    config = ProcessConfig()
    ratios, weights = mask_ratios(config)
    counts = [int(draw_masks(config, 1, 1000, generator("ratio", i))[0].sum()) for i in range(2000)]
    expected = float((weights * torch.ceil(ratios.double() * 1000)).sum())
    assert sum(counts) / len(counts) == pytest.approx(expected, rel=0.02)
    jumps = {
        int(later.sum()) - int(mask.sum())
        for mask, later in (draw_masks(config, 1, 1000, generator("j", i)) for i in range(200))
    }
    assert min(jumps) >= 0
    assert len(jumps) > 20


@pytest.mark.parametrize("bad", [{"ratio_min": 0.8, "ratio_max": 0.7}, {"timesteps": 1, "ratio_min": 0.5}])
def test_impossible_ratios_are_refused(bad):
    with pytest.raises(ValueError, match=r"ratio_min|timesteps"):
        ProcessConfig(**bad)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ProcessConfig().target = "z_0"


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
