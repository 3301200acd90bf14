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
    about = (
        "Top-1 in per cent of a linear layer on frozen features; k-NN: of the nearest neighbors by the features of the "
        "same block."
    )
    task = "cls"
    datasets = (IMAGENET,)
    needs_labels = True
    verb = "linprobe"
    source = "data.source"
    metrics = (
        Metric("top1", "top-1 ↑", result="last.top1", curve="top1"),
        Metric("knn", "k-NN ↑", optional=True, result="best.knn"),
    )
    published: ClassVar = {
        "ADDP ViT-B": {"top1": 11.5},
        "ADDP ViT-L": {"top1": 23.8},
        "MAE ViT-B": {"top1": 68.0},
        "MAE ViT-L": {"top1": 75.8},
        "MAGE ViT-B": {"top1": 74.7},
        "MAGE ViT-L": {"top1": 78.9},
    }

    def measured(self, training: Any) -> tuple[Metric, ...]:
        """The fast mode trains many heads at once, selects the best one itself, and classifies by neighbors too."""
        top1, knn = self.metrics
        if training.mode == "full":
            return (top1,)
        probe = replace(top1, result="best.top1")
        return (probe, knn) if training.fast.knn else (probe,)

    def unlike_paper(self, chance: Mapping[str, float]) -> str:
        return unlike_imagenet(chance)
