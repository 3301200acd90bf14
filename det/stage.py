"""How a detector of either engine is trained, looked at and evaluated by the suite's engine."""

from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn

from addp_core.data.images import ImageError
from addp_core.training.engine import Draw, Stage
from det.augment import SceneBatch
from det.coco import CocoSet, evaluate
from det.drawing import draw, square
from det.model import detect_all, save_detector, to_tensor

PREVIEWS, SURE = 8, 0.3  # images, and the lowest score that is drawn


class DetStage(Stage):
    """`model(scenes)` in training gives losses by name; the rest is `det.model`'s."""

    name = "det"

    def __init__(self, model: nn.Module, val: CocoSet):
        self.model, self.val = model, val

    def loss(self, model: nn.Module, batch: SceneBatch, draw: Draw) -> dict[str, Tensor]:
        """The sum of the detector's losses, and each on its own."""
        losses = model(batch.scenes())
        return {"loss": sum(losses.values()), **losses}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Average precision on the validation set; figures that it has no object for are left out."""
        results = detect_all(model, self.val)
        if not PartialState().is_main_process:
            return {}
        figures = evaluate(self.val.dataset(), results)
        return {name: value for name, value in figures.items() if value is not None}

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Validation images with what is found on them."""
        shown, device = [], next(model.parameters()).device
        for index in range(len(self.val)):
            if len(shown) == PREVIEWS:
                break
            try:
                image = to_tensor(self.val.open_image(index)[0].decode())
            except ImageError:  # evaluation names it
                continue
            (found,) = model.detect([image.to(device)])
            shown.append(square(draw(image, found, model.file.categories, SURE), model.file.size))
        return {"detections": torch.stack(shown)} if shown else {}

    def export(self, model: nn.Module, path: Path) -> None:
        save_detector(model, path)
