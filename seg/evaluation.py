"""What is measured: `ClassIoU` in METRICS; and `StoredMaps` in MODELS, which feeds class maps on the disk to it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS, MODELS

from seg.scenes import read_class_map


@METRICS.register_module()
class ClassIoU(IoUMetric):
    """mmseg's mIoU, mAcc and aAcc over all pixels but those labelled "other", and `constant_mIoU`: that of a map which
    shows the most frequent class everywhere. `per_class` keeps what the last evaluation found, in percent, NaN for
    classes that neither appear nor were predicted.
    """

    per_class: dict[str, np.ndarray]

    def compute_metrics(self, results: list) -> dict[str, float]:
        figures = super().compute_metrics(results)
        intersect, union, predicted, labelled = (torch.stack(area).sum(0) for area in zip(*results, strict=True))
        found = self.total_area_to_metrics(intersect, union, predicted, labelled, self.metrics, None, self.beta)
        self.per_class = {key: 100 * np.asarray(found[key]) for key in ("IoU", "Acc")}
        share = labelled.max() / labelled.sum().clamp(min=1)
        constant = 100 * float(share) / max(int((labelled > 0).sum()), 1)
        return {key: round(float(value), 2) for key, value in (figures | {"constant_mIoU": constant}).items()}


@MODELS.register_module()
class StoredMaps(BaseModel):
    """A "model" that answers with the class maps that lie in a folder under the names of the annotations."""

    def __init__(self, folder: str, classes: int):
        super().__init__()
        self.folder, self.classes = Path(folder), classes

    def forward(self, inputs: Any, data_samples: list, mode: str = "predict") -> list:
        for sample in data_samples:
            path = self.folder / Path(sample.seg_map_path).name
            labels = read_class_map(path, sample.ori_shape, self.classes)
            sample.pred_sem_seg = PixelData(data=torch.from_numpy(labels).long()[None])
        return data_samples
