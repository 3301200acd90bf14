"""`train.compile`: fine-tuning and linear probing are traced without a break, with the same results."""

import pytest
import torch
from compiled import counted_graphs

from addp_core.data.stream import Batch
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.training.compute import accelerate_model
from addp_core.training.stage import MicroStep
from cls import finetune
from cls.finetune import FinetuneStage
from cls.probing import recipe as probing
from cls.probing.full import LinearProbeStage

ROWS, CLASSES, SIZE = 4, 3, (16, 16)


def stage_of(task: str) -> FinetuneStage | LinearProbeStage:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(16, 2, 2, drop_path=0.2 if task == "finetune" else 0.0), SIZE, 8)
    if task == "finetune":
        return FinetuneStage(Classifier(encoder, CLASSES), finetune.Recipe(model="tiny", out="run"), [], 1.0)
    return LinearProbeStage(
        Classifier(encoder, CLASSES, norm="batch"), probing.Recipe(model="tiny", out="run", mode="full"), [], 1.0
    )


@pytest.mark.parametrize(("task", "graphs"), [("finetune", 1), ("linprobe", 2)])  # frozen features and head
def test_no_graph_breaks(task, graphs):
    batch = Batch(torch.rand(ROWS, 3, *SIZE), torch.arange(ROWS) % CLASSES, torch.arange(ROWS), [])
    step, stage = MicroStep(0, 0, 0, 0, 1, ROWS, slice(0, ROWS)), stage_of(task)
    with counted_graphs() as found:
        for module in (*stage.frozen, stage.model):
            accelerate_model(module, compile=True)
        for _ in range(2):
            stage.loss(stage.model.train(), batch, step)["loss"].backward()
    assert len(found) == graphs
