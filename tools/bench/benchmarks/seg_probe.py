"""Frozen probes of segmentation on ADE20K."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tools.bench.benchmark import Transfer
from tools.bench.benchmarks.seg import ADE20K
from tools.bench.metric import Metric


class SegmentationProbe(Transfer):
    name = "seg_probe"
    title = "Frozen segmentation"
    about = (
        "mIoU in per cent of a linear layer and of k-NN on the patch tokens of the frozen encoder, on ADE20K's format. "
        "Chance is the best map of one class everywhere."
    )
    task = "seg"
    datasets = (ADE20K,)
    verb = "seg probe"
    source = "data.source"
    of_paper = False
    metrics = (
        Metric("linear", "linear mIoU ↑", optional=True, result="best.linear.mIoU"),
        Metric("knn", "k-NN mIoU ↑", optional=True, result="best.knn.mIoU"),
    )

    def measured(self, training: Any) -> tuple[Metric, ...]:
        measured = (metric for metric in self.metrics if metric.key in training.probes)
        return tuple(replace(metric, optional=False) for metric in measured)

    def chance_level(self, results: Mapping[str, Any]) -> float:
        return results["constant_mIoU"]
