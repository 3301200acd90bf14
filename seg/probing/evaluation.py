"""mIoU of a probe: of its class maps in the images' own sizes, by the metric of `addp seg test`; and of patches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import MMLogger
from torch import Tensor
from torch.nn.functional import interpolate

from seg.evaluation import ClassIoU
from seg.probing.features import PatchBank
from seg.scenes import IGNORED, ScenePair, class_colors, read_class_map

CLASSES_AT_ONCE = 16  # whose scores are enlarged together, to bound the memory for large images


@dataclass
class Evaluation:
    """mIoU, mAcc, aAcc and constant_mIoU in percent, the IoU of each class, and the first class maps."""

    means: dict[str, float]
    iou: list[float | None]  # None for classes that neither occur nor were predicted
    previews: list[Tensor]  # UInt8[H,W] each


def evaluate(
    score: Callable[[Tensor], Tensor],
    bank: PatchBank,
    block: int,
    pairs: Sequence[ScenePair],
    classes: Sequence[str],
    grid: tuple[int, int],
    device: torch.device,
    *,
    maps: Path | None,
    root: Path,
    preview: int,
) -> Evaluation:
    """Predict the class map of every image and evaluate it.

    Args:
        score: features [n,W] -> scores Float[n,C].
        bank: the features of all patches of the images.
        block: whose features are scored.
        pairs: the images and their class maps.
        classes: the names of the classes.
        grid: rows and columns of patches.
        maps: folder to write the class maps to.
        root: folder of the annotations.
        preview: number of class maps to return.
    """
    MMLogger.get_instance("addp seg probe", log_level="ERROR")  # otherwise the metric prints a table for each probe
    metric = ClassIoU(maps=str(maps or ""), root=str(root), ignore_index=IGNORED)
    metric.dataset_meta = {"classes": tuple(classes), "palette": class_colors(len(classes)).tolist()}
    previews: list[Tensor] = []
    remaining = iter(pairs)
    for number in range(bank.shards):
        features = bank.load_shard(number, block).to(device)
        for patches in features.split(grid[0] * grid[1]):
            pair = next(remaining)
            truth = torch.from_numpy(read_class_map(pair.class_map, None, len(classes)))
            scores = score(patches).t().unflatten(1, grid)
            predicted = enlarged_argmax(scores, (truth.shape[0], truth.shape[1]))
            if len(previews) < preview:
                previews.append(predicted.byte().cpu())
            metric.process(None, [_data_sample(predicted, truth, pair)])
    means = metric.compute_metrics(metric.results)
    return Evaluation(means, [None if np.isnan(iou) else float(iou) for iou in metric.per_class["IoU"]], previews)


def _data_sample(predicted: Tensor, truth: Tensor, pair: ScenePair) -> dict[str, Any]:
    return {
        "pred_sem_seg": {"data": predicted[None]},
        "gt_sem_seg": {"data": truth[None]},
        "seg_map_path": str(pair.class_map),
    }


def enlarged_argmax(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge scores bilinearly and return the best class of each pixel: Float[C,h,w] -> Long[H,W]."""
    best_scores = scores.new_full(size, -torch.inf)
    best = torch.zeros(size, dtype=torch.long, device=scores.device)
    for first in range(0, len(scores), CLASSES_AT_ONCE):
        part = scores[None, first : first + CLASSES_AT_ONCE]
        values, indices = interpolate(part, size, mode="bilinear", align_corners=False)[0].max(0)
        better = values > best_scores
        best[better], best_scores[better] = indices[better] + first, values[better]
    return best


def patch_miou(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Return the mIoU of Long[n] predictions for patches with Long[n] labels in percent."""
    areas = ClassIoU.intersect_and_union(predicted, labels, classes, IGNORED)
    return 100 * float(np.nanmean(ClassIoU.total_area_to_metrics(*areas)["IoU"]))
