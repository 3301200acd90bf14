"""Evaluation of class maps: the metrics, and a stand-in for a model that reads class maps from files.

Registers `ClassIoU` in METRICS and `StoredMaps` in MODELS.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS, MODELS
from torch import Tensor

from addp_core.data.images import write_png
from seg.scenes import class_colors, read_class_map, to_class_map


@METRICS.register_module()
class ClassIoU(IoUMetric):
    """mmseg's mIoU, mAcc and aAcc over all pixels except those labeled "other", and `constant_mIoU`.

    `constant_mIoU` is the chance level: the mIoU of predicting the most frequent class everywhere.

    Args:
        maps: folder to write the predicted class maps to; empty to write none. They have the labels of the annotations,
            and each has the relative path that its annotation has in `root`.
        root: folder of the annotations.

    Attributes:
        per_class: IoU and Acc of each class in the last evaluation, in percent; NaN for classes that neither occur nor
            were predicted.
    """

    per_class: dict[str, np.ndarray]

    def __init__(self, maps: str = "", root: str = "", **options: Any):
        super().__init__(**options)
        self.maps, self.root = maps, root

    @staticmethod
    def intersect_and_union(
        pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the pixels of each class, Double[num_classes]: intersection, union, predicted, labeled.

        mmseg counts in float32, in which 16,777,216 + 1 is 16,777,216.
        """
        known = label != ignore_index
        predicted, labeled = pred_label[known].long(), label[known].long()

        def count(labels: Tensor) -> Tensor:
            return torch.bincount(labels[labels < num_classes], minlength=num_classes).cpu().double()

        areas = count(predicted[predicted == labeled]), count(predicted), count(labeled)
        return areas[0], areas[1] + areas[2] - areas[0], areas[1], areas[2]

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        super().process(data_batch, data_samples)
        for sample in data_samples if self.maps else ():
            labels = sample["pred_sem_seg"]["data"].squeeze(0).cpu().numpy()
            colors = class_colors(len(self.dataset_meta["classes"]))
            relative_path = Path(sample["seg_map_path"]).relative_to(self.root)
            write_png(to_class_map(labels, colors), Path(self.maps, relative_path))

    def compute_metrics(self, results: list) -> dict[str, float]:
        metrics = super().compute_metrics(results)
        intersection, union, predicted, labeled = (torch.stack(area).sum(0) for area in zip(*results, strict=True))
        per_class = self.total_area_to_metrics(intersection, union, predicted, labeled, self.metrics, None, self.beta)
        self.per_class = {key: 100 * np.asarray(per_class[key]) for key in ("IoU", "Acc")}
        largest_share = labeled.max() / labeled.sum().clamp(min=1)
        constant = 100 * float(largest_share) / max(int((labeled > 0).sum()), 1)
        return {key: round(float(value), 2) for key, value in (metrics | {"constant_mIoU": constant}).items()}


@MODELS.register_module()
class StoredMaps(BaseModel):
    """A stand-in for a model: its predictions are the class maps in `folder`.

    Each has the relative path that its annotation has in `root`.
    """

    def __init__(self, folder: str, root: str, classes: int):
        super().__init__()
        self.folder, self.root, self.classes = Path(folder), root, classes

    def forward(self, inputs: Any, data_samples: list, mode: str = "predict") -> list:
        for sample in data_samples:
            path = self.folder / Path(sample.seg_map_path).relative_to(self.root)
            labels = read_class_map(path, sample.ori_shape, self.classes)
            sample.pred_sem_seg = PixelData(data=torch.from_numpy(labels).long()[None])
        return data_samples
