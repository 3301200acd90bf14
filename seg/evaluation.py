"""What is measured: `ClassIoU` in METRICS; and `StoredMaps` in MODELS, which feeds class maps on the disk to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS, MODELS

from addp_core.data.images import write_png
from seg.scenes import numbered, palette, read_class_map


@METRICS.register_module()
class ClassIoU(IoUMetric):
    """mmseg's mIoU, mAcc and aAcc over all pixels but those labelled "other", and `constant_mIoU`: that of a map which
    shows the most frequent class everywhere. `per_class` keeps what the last evaluation found, in percent, NaN for
    classes that neither appear nor were predicted.

    maps: a folder for the class maps found, numbered as the annotations; each where its annotation lies in `root`.
    """

    per_class: dict[str, np.ndarray]

    def __init__(self, maps: str = "", root: str = "", **options: Any):
        super().__init__(**options)
        self.maps, self.root = maps, root

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        super().process(data_batch, data_samples)
        for sample in data_samples if self.maps else ():
            labels = sample["pred_sem_seg"]["data"].squeeze(0).cpu().numpy()
            colours = palette(len(self.dataset_meta["classes"]))
            place = Path(sample["seg_map_path"]).relative_to(self.root)
            write_png(numbered(labels, colours), Path(self.maps, place))

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
    """A "model" that answers with the class maps in `folder`, each where its annotation lies in `root`."""

    def __init__(self, folder: str, root: str, classes: int):
        super().__init__()
        self.folder, self.root, self.classes = Path(folder), root, classes

    def forward(self, inputs: Any, data_samples: list, mode: str = "predict") -> list:
        for sample in data_samples:
            path = self.folder / Path(sample.seg_map_path).relative_to(self.root)
            labels = read_class_map(path, sample.ori_shape, self.classes)
            sample.pred_sem_seg = PixelData(data=torch.from_numpy(labels).long()[None])
        return data_samples
