"""Linear probing on ImageNet."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from tools.bench.benchmark import Transfer
from tools.bench.benchmarks.imagenet import IMAGENET, unlike_imagenet
from tools.bench.metric import Metric


class LinearProbe(Transfer):
    name = "linprobe"
    title = "Linear probe"
    about = "Top-1 in per cent of a linear layer on frozen features."
    task = "cls"
    datasets = (IMAGENET,)
    needs_labels = True
    verb = "linprobe"
    source = "data.source"
    metrics = (Metric("top1", "top-1 ↑", result="last.top1", curve="top1"),)
    published: ClassVar = {
        "ADDP ViT-B": {"top1": 11.5},
        "ADDP ViT-L": {"top1": 23.8},
        "MAE ViT-B": {"top1": 68.0},
        "MAE ViT-L": {"top1": 75.8},
        "MAGE ViT-B": {"top1": 74.7},
        "MAGE ViT-L": {"top1": 78.9},
    }

    def measured(self, training: Any) -> tuple[Metric, ...]:
        """The fast mode trains many heads at once and selects the best one itself."""
        if training.mode == "fast":
            return tuple(replace(metric, result="best.top1") for metric in self.metrics)
        return self.metrics

    def unlike_paper(self, chance: Mapping[str, float]) -> str:
        return unlike_imagenet(chance)
