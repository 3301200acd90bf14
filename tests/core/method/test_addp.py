"""The whole model: corruption, loss, every option that the paper ablates, and what the results must not depend on."""

import math

import pytest
import torch
from tiny import BATCH, TOKENIZER, TOKENS, nested_masks, tiny_addp

from addp_core.base.rng import generator
from addp_core.method.addp import ADDPConfig, Denoiser
from addp_core.method.diffusion import InputRows, draw_input_rows


def test_corruption_keeps_reliable_codes_and_replaces_the_rest(model, images):
    ids, (mask, later) = model.tokenizer.encode(images), nested_masks()
    decoded = {}
    model.tokenizer.decoder.register_forward_pre_hook(lambda module, inputs: decoded.update(z=inputs[0]))
    out = model.corrupt(ids, mask, later)
    assert out.images.shape == images.shape
    assert out.target.shape == (BATCH, TOKENS, TOKENIZER.codebook)
    z = decoded["z"].flatten(2).transpose(1, 2)
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
    untrained = [name for name, p in model.denoiser.named_parameters() if p.grad is None]
    # Without ids in any sequence nothing trains their embeddings, because the tie to the head is detached.
    assert untrained == (["decoder.token_emb.weight"] if ids_to == "none" else [])
    assert all(p.grad is None for part in (model.tokenizer, model.predictor) for p in part.parameters())


def test_condition_decides_which_ids_the_noisy_image_depends_on(images):
    ids, (mask, later) = tiny_addp().tokenizer.encode(images), nested_masks()
    default, ablation = (tiny_addp(condition=c).corrupt(ids, mask, later) for c in ("z_t+1", "z_t"))
    expected = tiny_addp().corrupt(ids, mask, mask)
    assert not torch.allclose(default.images, ablation.images)
    torch.testing.assert_close(ablation.images, expected.images)
    torch.testing.assert_close(default.target, ablation.target)


def test_images_that_keep_their_own_pixels_or_all_of_their_ids(images):
    """natural_share and clean_share change the noisy images of the rows drawn for them, and nothing else."""
    model = tiny_addp(natural_share=0.4, clean_share=0.3)
    ids, (mask, later) = model.tokenizer.encode(images), nested_masks()
    rows = InputRows(*torch.eye(BATCH, dtype=torch.bool)[:2])
    default, out = model.corrupt(ids, mask, later), model.corrupt(ids, mask, later, rows=rows, natural=images)
    height, width = (size // model.config.tokenizer.stride for size in images.shape[2:])
    reliable = ~mask[0].view(height, 1, width, 1).expand(-1, images.shape[2] // height, -1, images.shape[3] // width)
    reliable = reliable.reshape(1, *images.shape[2:])
    assert torch.equal(out.images[0], torch.where(reliable, images[0], default.images[0]))
    assert torch.equal(out.images[1], model.render(torch.zeros(1), ids, torch.zeros_like(mask))[1])
    assert torch.equal(out.images[2:], default.images[2:])
    assert torch.equal(out.target, default.target)
    drawn = [draw_input_rows(model.config.process, 1000, generator("rows", i)) for i in range(2)]
    assert not torch.equal(drawn[0].natural, drawn[1].natural)
    assert not (drawn[0].natural & drawn[0].clean).any()
    assert abs(drawn[0].natural.float().mean() - 0.4) < 0.05
    assert abs(drawn[0].clean.float().mean() - 0.3) < 0.05
    assert draw_input_rows(tiny_addp().config.process, 4, generator("rows")) is None
    loss = model(images, generator("step"))["loss"]
    loss.backward()
    assert not torch.equal(loss, tiny_addp()(images, generator("step"))["loss"])


def test_loss_at_masked_positions_equals_the_full_loss(model, images):
    ids, (mask, later) = model.tokenizer.encode(images), nested_masks()
    out = model.corrupt(ids, mask, later)
    expected = model.loss(model.logits(out.images, ids, mask), out.target, mask)
    torch.testing.assert_close(model.denoiser(out.images, ids, mask, out.target), expected)


def test_logits_do_not_depend_on_unreliable_ids_or_on_other_rows(model, images):
    ids, (mask, _) = model.tokenizer.encode(images), nested_masks()
    logits = model.logits(images, ids, mask)
    assert logits.shape == (BATCH, TOKENS, model.config.vocabulary.size)
    torch.testing.assert_close(model.logits(images, torch.where(mask, 0, ids), mask), logits)
    torch.testing.assert_close(model.logits(images[1:2], ids[1:2], mask[1:2]), logits[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ids_to", ["decoder", "encoder+decoder", "none"])
def test_rows_with_different_numbers_of_reliable_ids(images, ids_to):
    """Rows with 3, 0 and 24 reliable ids get the same logits in one batch as alone.

    (With ids in the encoder, only the fullest row does, because the others are padded with mask ids.)
    """
    model = tiny_addp(ids_to=ids_to)
    ids = model.tokenizer.encode(images)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[0, [2, 5, 9]] = False
    mask[2] = False
    together = model.logits(images, ids, mask)
    separate = torch.cat([model.logits(images[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(BATCH)])
    rows = [2] if ids_to == "encoder+decoder" else [0, 1, 2]
    torch.testing.assert_close(together[rows], separate[rows], atol=1e-5, rtol=1e-4)


def test_images_are_clamped_before_the_encoder(model, images):
    ids, (mask, _) = model.tokenizer.encode(images), nested_masks()
    unclamped = images * 4 - 1.5
    torch.testing.assert_close(model.logits(unclamped, ids, mask), model.logits(unclamped.clamp(0, 1), ids, mask))


def test_frozen_parts_stay_in_eval_mode(images):
    model = tiny_addp(dropout=0.5).train()
    assert model.denoiser.training
    assert not model.tokenizer.training
    assert not model.predictor.training
    ids, (mask, later) = model.tokenizer.encode(images), nested_masks()
    assert torch.equal(model.corrupt(ids, mask, later).target, model.corrupt(ids, mask, later).target)


def test_corrupting_needs_a_predictor(model, images):
    model.predictor = None
    with pytest.raises(ValueError, match="predictor=<file>"):
        model(images)


def test_published_count_of_trainable_parameters():
    """The published count is 146.9 M; it includes tensors that nothing uses."""
    denoiser = Denoiser(ADDPConfig())
    unused = 2 * 257 * 768 + (768 + 1) * 768  # pos_token_embed, pos_mask_embed, decoder_pred
    assert (sum(p.numel() for p in denoiser.parameters()) + unused) / 1e6 == pytest.approx(146.9, abs=0.05)
