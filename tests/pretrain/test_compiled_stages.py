"""`train.compile`: each stage is traced without a break, into few graphs for all mask ratios, with equal results."""

from copy import deepcopy

import pytest
import torch
from compiled import counted_graphs
from tiny import HEIGHT, TOKENS, WIDTH, tiny_addp

from addp_core.base.rng import generator
from addp_core.data.stream import Batch
from addp_core.networks.config import EncoderConfig, MaeConfig, PixelDecoderConfig
from addp_core.networks.mae import MaskedAutoencoder
from addp_core.training.compute import accelerate_model
from addp_core.training.stage import MicroStep, Stage
from pretrain import addp, predictor
from pretrain.addp import PretrainStage
from pretrain.mae import MaeStage
from pretrain.predictor import MaskingConfig, PredictorStage
from pretrain.tokenizer import LossConfig, TokenizerStage

ROWS = 3
MASKED = (13, 24, 18, 23, 15)  # of 24 positions in each step; fewer than two are reliable in two of the steps


def nested(
    _config, rows: int, tokens: int, generator: torch.Generator, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks with `number` positions, and the second one with up to two more."""
    rank = torch.rand(rows, tokens, generator=generator).argsort(1).argsort(1)
    return rank < number, rank < number + 2


def losses(stage: Stage, steps: int) -> list[float]:
    """Return the loss of each step, after its backward pass."""
    for module in stage.frozen:
        module.eval().requires_grad_(False)
    images = torch.rand(ROWS, 3, HEIGHT, WIDTH, generator=generator("compiled"))
    batch = Batch(images, torch.zeros(ROWS), torch.arange(ROWS), [])
    found = []
    for step in range(steps):
        terms = stage.loss(stage.model.train(), batch, MicroStep(0, step, step, 0, 1, ROWS, slice(0, ROWS)))
        terms["loss"].backward()
        found.append(terms["loss"].item())
    return found


def check_compiled(stage: Stage, steps: int, graphs: int) -> None:
    """Check that the compiled stage has the same losses, and the number of its graphs."""
    expected = losses(deepcopy(stage), steps)
    with counted_graphs() as found:
        for module in (*stage.frozen, stage.model):
            accelerate_model(module, compile=True)
        assert losses(stage, steps) == pytest.approx(expected, rel=1e-5)
    assert len(found) == graphs


def test_pretraining_has_five_graphs_for_all_mask_ratios(monkeypatch):
    """Tokenizer: encoder and decoder. Predictor: one. Denoiser: one, and one for steps without two reliable ids."""
    numbers = iter(2 * MASKED)
    monkeypatch.setattr(addp, "draw_masks", lambda *args: nested(*args, number=next(numbers)))
    check_compiled(PretrainStage(tiny_addp()), len(MASKED), graphs=5)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 makes three graphs")
def test_predictor_has_two_graphs_for_all_mask_ratios(monkeypatch):
    """The tokenizer's encoder, and the predictor with its loss."""
    numbers = iter(2 * MASKED)

    def draw(*args):
        mask, _ = nested(*args, number=next(numbers))
        return mask, nested(*args, number=TOKENS // 2)[0]

    monkeypatch.setattr(predictor, "draw_mage_masks", draw)
    model = tiny_addp()
    model.predictor.requires_grad_(True)
    parts = model.predictor, model.tokenizer, model.config.grid
    check_compiled(PredictorStage(*parts, MaskingConfig(), torch.zeros(0)), len(MASKED), graphs=2)


def test_tokenizer_is_one_graph():
    tokenizer = tiny_addp().tokenizer.requires_grad_(True)
    check_compiled(TokenizerStage(tokenizer, LossConfig(), torch.zeros(0)), 2, graphs=1)


def test_mae_is_one_graph():
    config = MaeConfig(EncoderConfig(16, 2, 2), 2, PixelDecoderConfig(8, 1, 2))
    stage = MaeStage(MaskedAutoencoder(config, (HEIGHT, WIDTH)), 0.75, True, torch.zeros(0))
    check_compiled(stage, 2, graphs=1)


def test_dropout_on_a_cpu_does_not_break_the_graph():
    encoder = tiny_addp(dropout=0.1).denoiser.encoder.train()
    with counted_graphs() as graphs:
        accelerate_model(encoder, compile=True)
        encoder(torch.rand(ROWS, 3, HEIGHT, WIDTH)).sum().backward()
    assert len(graphs) == 1
