"""Runs a detector over a COCO dataset, and evaluates it there."""

import logging
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError
from addp_core.data.stream import ReadErrors, error_limit
from addp_core.training.evaluation import check_evaluation
from addp_core.training.pace import VALIDATION, mark_pace
from det.average_precision import coco_metrics
from det.coco import CocoDataset
from det.model import Detector

log = logging.getLogger("addp")


def detect_dataset(model: Detector, dataset: CocoDataset) -> list[dict[str, Any]]:
    """Return the detections on all images of a dataset that has the detector's categories, in COCO's results format.

    Under torchrun the processes share the images, and each returns all results. Unreadable images are logged and have
    no detections. Raises UserError if there are more of them than the dataset's `max_errors` allows, and
    EvaluationStopped if a signal asked the training run that evaluates to stop.
    """
    state, device = PartialState(), next(model.parameters()).device
    results: list[dict[str, Any]] = []
    errors: ReadErrors = []
    limit = error_limit(dataset.max_errors, len(dataset))
    rounds = range(0, len(dataset), state.num_processes)  # each process has an image in each round but the last
    hidden = None if state.is_main_process else True
    mark_pace(VALIDATION, 0)
    with tqdm(total=len(dataset), desc="detect", unit="img", disable=hidden) as bar:
        for first in rounds:
            if (index := first + state.process_index) < len(dataset):
                try:
                    image = dataset.open_image(index)[0].pixels()
                except ImageError as error:
                    log.warning("%s: %s; counted as an image without detections", dataset.name(index), error)
                    errors.append((dataset.name(index), str(error)))
                else:
                    (detections,) = model.detect([image.to(device)])
                    results += detections.to_results(dataset.ids[index], dataset.categories)
            dataset.check_errors(check_evaluation(errors, limit))
            bar.update(min(state.num_processes, len(dataset) - first))
            mark_pace(VALIDATION, min(state.num_processes, len(dataset) - first))
    return gather_object(results)


def evaluate_detector(
    model: Detector, dataset: CocoDataset, per_class: bool = False
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Return the metrics of `coco_metrics` and the detections.

    Masks are evaluated if both the detector and the dataset have them. Processes other than rank 0 return no metrics.
    """
    results = detect_dataset(model, dataset)
    if not PartialState().is_main_process:
        return {}, results
    masks = model.architecture.masks and dataset.masks
    return coco_metrics(dataset.to_coco(), results, per_class, masks), results


def check_categories(model: Detector, dataset: CocoDataset) -> None:
    """Raise UserError if the categories of the detector and of the dataset differ.

    A detector of detectron2 that does not tell its categories takes the dataset's, if it has as many.
    """
    if getattr(model, "names_assumed", False) and len(model.architecture.categories) == len(dataset.categories):
        log.info(
            "model: its config does not tell its %d categories; took those of the dataset", len(dataset.categories)
        )
        model.architecture = replace(model.architecture, categories=dataset.categories)
    ours, theirs = set(model.architecture.categories), set(dataset.categories)
    if ours != theirs:
        added, removed = (
            ", ".join(sorted(f"{c.id} {c.name}" for c in part)[:3]) or "none" for part in (theirs - ours, ours - theirs)
        )
        raise UserError(
            f"{dataset.path}: its {len(theirs)} categories differ from the detector's {len(ours)} "
            f"(only in the file: {added}; only in the detector: {removed}); expected the categories of its training"
        )
