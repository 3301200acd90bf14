"""Stage 2: the masks and the losses of MAGE, and the metric `context`."""

import math
from collections import Counter

import pytest
import torch
from tiny import tiny_addp

from addp_core.data.stream import Batch
from addp_core.recipes.config import load, recipes_of
from addp_core.training.stage import MicroStep
from pretrain import predictor as predictor_stage
from pretrain.predictor import MaskedTokenModel, MaskingConfig, PredictorStage, Recipe, draw_mage_masks


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


def test_loss_over_the_codebook_leaves_out_ids_that_never_occur():
    """Computed by hand: softmax and smoothing over the codebook's logits alone."""
    predictor = tiny_addp().predictor
    assert predictor is not None
    codebook = predictor.vocabulary.codebook
    ids = torch.randint(codebook, (3, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[:, ::2] = True
    metrics = MaskedTokenModel(predictor, 0.1, codebook_only=True)(ids, mask, mask)
    log_p = predictor.logits(ids, mask, mask)[..., :codebook].log_softmax(-1)[mask]
    true = log_p.gather(1, ids[mask][:, None]).mean()
    assert metrics["loss"].item() == pytest.approx(-(0.9 * true + 0.1 * log_p.mean()).item(), rel=1e-5)
    assert metrics["loss"] < MaskedTokenModel(predictor, 0.1)(ids, mask, mask)["loss"]


class RecordMasks(torch.nn.Module):
    def forward(self, ids, mask, *_):
        return {"loss": torch.zeros(()), "masks": mask}


@pytest.mark.parametrize("draw", ["batch", "process"])
def test_each_process_draws_its_mask_ratio_if_asked_to(draw):
    addp = tiny_addp()
    assert addp.predictor is not None
    stage = PredictorStage(addp.predictor, addp.tokenizer, addp.config.grid, MaskingConfig(), torch.zeros(0), draw)
    pixels = torch.rand(2, 3, *addp.config.image_size)
    batch = Batch(pixels, torch.zeros(2), torch.arange(2), [])
    counts = []
    for rank in (0, 1):
        micro_step = MicroStep(0, 0, 0, rank, 2, 4, slice(2 * rank, 2 * rank + 2))
        counts.append(stage.loss(RecordMasks(), batch, micro_step)["masks"].sum(1).tolist())
    assert counts[0][0] == counts[0][1]
    assert (counts[0] == counts[1]) == (draw == "batch")


@pytest.mark.parametrize("name", ["mage_vit_b_1600ep", "mage_vit_l_1600ep"])
def test_published_recipes_follow_mages_own_training(name):
    recipes = recipes_of(predictor_stage)
    recipe = load(Recipe, recipes[name], ["out=run", "tokenizer=vqgan.ckpt"], recipes)
    assert (recipe.masking.loss_over, recipe.draw, recipe.interpolation) == ("codebook", "process", "bilinear")
    assert (recipe.unused_ids, recipe.masking.label_smoothing) == (1000, 0.1)
