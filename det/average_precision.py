"""Average precision and recall of detections, by COCO's own evaluation (pycocotools)."""

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from det.config import Category, distinct_names

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCOeval.stats
# The area in pixels, both ends included, of the objects that a metric is about, as in COCOeval; of others, all.
AREAS = {"APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, 1e5**2)}
RECALL_INDEX = 8  # position in COCOeval.stats of the recall with 100 detections per image


def coco_metrics(
    ground_truth: dict[str, Any], results: list[dict[str, Any]], per_class: bool = False, masks: bool = True
) -> dict[str, float | None]:
    """Compute COCO's average precision and recall of boxes and masks.

    Args:
        ground_truth: annotations as returned by `CocoDataset.to_coco()`; left unchanged.
        results: detections in COCO's results format, each with `bbox` and, for masks, compressed `segmentation`.
        per_class: add the average precision of each category.
        masks: evaluate masks too; the ground truth and the results must have them.

    Returns:
        box_AP, box_AP50, box_AP75, box_APs, box_APm, box_APl, box_AR, the same with mask_, and with `per_class`
        box_AP/<name> and mask_AP/<name>, with the id if several categories have the name; in [0, 1], or None if the
        ground truth has no object for a metric.
    """
    metrics: dict[str, float | None] = {}
    for prefix, iou_type in (("box", "bbox"), ("mask", "segm")) if masks else (("box", "bbox"),):
        stats, class_ap = _run_cocoeval(ground_truth, results, iou_type)
        metrics |= {f"{prefix}_{name}": _none_if_undefined(stats[i]) for i, name in enumerate(METRICS)}
        metrics[f"{prefix}_AR"] = _none_if_undefined(stats[RECALL_INDEX])
        if per_class:
            metrics |= {f"{prefix}_AP/{category}": value for category, value in class_ap.items()}
    return metrics


def _run_cocoeval(
    ground_truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str
) -> tuple[np.ndarray, dict[str, float | None]]:
    """Return (COCOeval.stats, category name -> average precision)."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth, detections = COCO(), COCO()
        # COCOeval writes into the annotations
        truth.dataset = {**ground_truth, "annotations": [dict(entry) for entry in ground_truth["annotations"]]}
        truth.createIndex()
        annotations = [_to_annotation(result, i, iou_type) for i, result in enumerate(results, 1)]
        detections.dataset = {**ground_truth, "annotations": annotations}
        detections.createIndex()
        evaluation = COCOeval(truth, detections, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]  # thresholds x recalls x categories, all areas, 100 detections
    categories = [Category(category["id"], category["name"]) for category in ground_truth["categories"]]
    names = dict(zip((category.id for category in categories), distinct_names(categories), strict=True))
    class_ap: dict[str, float | None] = {}
    for position, category_id in enumerate(evaluation.params.catIds):
        values = precision[:, :, position]
        class_ap[names[category_id]] = float(values.mean()) if (values > -1).all() else None
    return evaluation.stats, class_ap


def _to_annotation(result: dict[str, Any], number: int, iou_type: str) -> dict[str, Any]:
    """Convert a detection to the annotation that COCOeval expects; its area decides between small, medium and large."""
    if iou_type == "bbox":
        area = result["bbox"][2] * result["bbox"][3]
        geometry = {"bbox": result["bbox"]}
    else:
        area = float(coco_mask.area(result["segmentation"]))
        geometry = {"segmentation": result["segmentation"], "bbox": result["bbox"]}
    common = {key: result[key] for key in ("image_id", "category_id", "score")}
    return {**common, **geometry, "area": area, "id": number, "iscrowd": 0}


def _none_if_undefined(value: float) -> float | None:
    """Return None for the -1 that COCOeval reports if the ground truth has no object for a metric."""
    return None if value < 0 else float(value)
