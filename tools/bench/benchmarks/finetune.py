"""Fine-tuning on ImageNet."""

from collections.abc import Mapping
from typing import ClassVar

from tools.bench.benchmark import Transfer
from tools.bench.benchmarks.imagenet import IMAGENET, unlike_imagenet
from tools.bench.metric import Metric


class Finetune(Transfer):
    name = "finetune"
    title = "Fine-tuning"
    about = "Top-1 in per cent on validation images after training the whole encoder on labeled ones."
    task = "cls"
    datasets = (IMAGENET,)
    needs_labels = True
    verb = "finetune"
    source = "data.source"
    metrics = (Metric("top1", "top-1 ↑", result="last.top1", curve="top1"),)
    published: ClassVar = {
        "ADDP ViT-B": {"top1": 83.9},
        "ADDP ViT-L": {"top1": 85.9},
        "MAE ViT-B": {"top1": 83.6},
        "MAE ViT-L": {"top1": 85.9},
        "MAGE ViT-B": {"top1": 82.5},
        "MAGE ViT-L": {"top1": 83.9},
        "ADDP ResNet-50": {"top1": 79.7},  # after 100 epochs; 80.9 after 300
    }

    def unlike_paper(self, chance: Mapping[str, float]) -> str:
        return unlike_imagenet(chance)
