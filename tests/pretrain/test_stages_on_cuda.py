"""A step of each stage on a CUDA device that computes nothing: no tensor is on the wrong device, and the host waits for
none of them.
"""

import pytest
import torch
from fake_cuda import fake_cuda, on_fake_cuda
from tiny import HEIGHT, WIDTH, tiny_addp

from addp_core.data.stream import Batch
from addp_core.networks.config import EncoderConfig, MaeConfig, PixelDecoderConfig
from addp_core.networks.mae import MaskedAutoencoder
from addp_core.training.stage import MicroStep, Stage
from pretrain.addp import PretrainStage
from pretrain.mae import MaeStage
from pretrain.predictor import MaskingConfig, PredictorStage
from pretrain.tokenizer import LossConfig, TokenizerStage

ROWS = 4
ADVERSARIAL = {"adversarial": 1.0, "discriminator_width": 32, "discriminator_layers": 1}


def loss_terms(stage: Stage, step: int = 0) -> dict[str, torch.Tensor]:
    """Return what a stage, which is on the fake device, returns for a batch."""
    pixels = torch.rand(ROWS, 3, HEIGHT, WIDTH)
    tensors = (each.to("cuda", non_blocking=True) for each in (pixels, torch.zeros(ROWS), torch.arange(ROWS)))
    batch = Batch(*tensors, [])
    return stage.loss(stage.model.train(), batch, MicroStep(0, step, step, 0, 1, ROWS, slice(0, ROWS)))


@pytest.mark.parametrize("ids_to", ["decoder", "encoder+decoder"])
@pytest.mark.parametrize("condition", ["z_t+1", "z_t"])
def test_pretraining(ids_to, condition):
    with fake_cuda():
        stage = PretrainStage(on_fake_cuda(tiny_addp(dropout=0.1, ids_to=ids_to, condition=condition)))
        assert loss_terms(stage)["loss"].device.type == "cuda"


def test_predictor():
    with fake_cuda():
        addp = on_fake_cuda(tiny_addp(dropout=0.1))
        stage = PredictorStage(addp.predictor, addp.tokenizer, addp.config.grid, MaskingConfig(), torch.zeros(0))
        assert {value.device.type for value in loss_terms(stage).values()} == {"cuda"}


def test_tokenizer_and_its_codebook():
    with fake_cuda():
        stage = TokenizerStage(tiny_addp().tokenizer, LossConfig(**ADVERSARIAL), torch.zeros(0))
        training = on_fake_cuda(stage.model)
        assert {value.device.type for value in loss_terms(stage).values()} == {"cuda"}
        counts, sums = training.statistics(stage.quantized)
        metrics = training.update_codebook(counts, sums, sums, decay=0.9, revive_after=2)
        assert {value.device.type for value in metrics.values()} == {"cuda"}


def test_mae():
    with fake_cuda():
        config = MaeConfig(EncoderConfig(16, 2, 2), 2, PixelDecoderConfig(8, 1, 2))
        stage = MaeStage(MaskedAutoencoder(config, (HEIGHT, WIDTH)), 0.75, True, torch.zeros(0))
        on_fake_cuda(stage.model)
        assert {value.device.type for value in loss_terms(stage).values()} == {"cuda"}
