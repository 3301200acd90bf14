"""A step of fine-tuning and of linear probing on a CUDA device that computes nothing: no tensor is on the wrong device,
and the host waits for none of them.
"""

import pytest
import torch
from fake_cuda import fake_cuda, on_fake_cuda

from addp_core.data.stream import Batch
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.training.stage import MicroStep, TrainConfig
from cls import finetune
from cls.finetune import AugmentConfig, FinetuneStage
from cls.probing import recipe as probing
from cls.probing.full import LinearProbeStage

ROWS, CLASSES, SIZE = 4, 3, (16, 16)


def classifier(norm: str = "layer") -> Classifier:
    return Classifier(Encoder(EncoderConfig(16, 2, 2, dropout=0.1, drop_path=0.2), SIZE, 8), CLASSES, norm=norm)


def batch_on_cuda() -> Batch:
    tensors = torch.rand(ROWS, 3, *SIZE), torch.arange(ROWS) % CLASSES, torch.arange(ROWS)
    return Batch(*(each.to("cuda", non_blocking=True) for each in tensors), [])


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_finetuning(mixup, loss):
    recipe = finetune.Recipe(model="tiny", out="run", loss=loss, augment=AugmentConfig(mixup=mixup, cutmix=mixup))
    stage = FinetuneStage(classifier(), recipe, [], 1.0)
    with fake_cuda():
        terms = stage.loss(
            on_fake_cuda(stage.model).train(), batch_on_cuda(), MicroStep(0, 0, 0, 0, 1, ROWS, slice(0, ROWS))
        )
        assert terms["loss"].device.type == "cuda"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_linear_probing(accumulate):
    train = TrainConfig(batch=ROWS * accumulate, accumulate=accumulate)
    recipe = probing.Recipe(model="tiny", out="run", mode="full", batch_norm=ROWS // 2, train=train)
    stage = LinearProbeStage(classifier("batch"), recipe, [], 1.0)
    with fake_cuda():
        on_fake_cuda(stage.features)
        model = on_fake_cuda(stage.model).train()
        for index in range(accumulate):
            terms = stage.loss(model, batch_on_cuda(), MicroStep(0, 0, index, 0, 1, ROWS, slice(0, ROWS)))
        assert {value.device.type for value in terms.values()} == {"cuda"}
