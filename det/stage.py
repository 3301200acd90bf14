"""Training, previewing and evaluating a detector of either engine with the suite's training engine."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from addp_core.data.images import ImageError
from addp_core.training.stage import MicroStep, Stage
from det.augment import DetectionBatch
from det.average_precision import METRICS
from det.coco import CocoDataset
from det.drawing import draw_detections, fit_to_square
from det.inference import evaluate_detector
from det.model import Detector, save_detector

PREVIEW_IMAGES, PREVIEW_SCORE = 8, 0.3  # number of images, minimum score of a drawn detection


class DetStage(Stage):
    """Trains a `Detector` and evaluates it on a validation set."""

    name = "det"

    def __init__(self, model: Detector, val: CocoDataset):
        self.model, self.val = model, val
        kinds = ("box", "mask") if model.architecture.masks and val.masks else ("box",)
        self.metrics = {f"{kind}_{name}": True for kind in kinds for name in (*METRICS, "AR")}

    def loss(self, model: nn.Module, batch: DetectionBatch, micro_step: MicroStep) -> dict[str, Tensor]:
        """Return the sum of the detector's losses, and each loss by its name."""
        losses = model(batch.samples())
        return {"loss": sum(losses.values()), **losses}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return the average precision on the validation set, without the metrics that it has no objects for.

        Raises UserError if more validation images are unreadable than the dataset tolerates.
        """
        metrics, _ = evaluate_detector(cast(Detector, model), self.val)
        return {name: value for name, value in metrics.items() if value is not None}

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Return validation images with their detections drawn, Float[n,3,S,S] in [0,1]."""
        detector = cast(Detector, model)
        previews: list[Tensor] = []
        device = next(model.parameters()).device
        categories, size = detector.architecture.categories, detector.architecture.size
        for index in range(len(self.val)):
            if len(previews) == PREVIEW_IMAGES:
                break
            try:
                image = self.val.open_image(index)[0].pixels()
            except ImageError:  # logged by the evaluation
                continue
            (detections,) = detector.detect([image.to(device)])
            previews.append(fit_to_square(draw_detections(image, detections, categories, PREVIEW_SCORE), size))
        return {"detections": torch.stack(previews)} if previews else {}

    def export(self, model: nn.Module, path: Path) -> None:
        save_detector(cast(Detector, model), path)
