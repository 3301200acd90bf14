"""Trained detectors of either engine: their common interface, their file, and their detections."""

import contextlib
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.base.errors import UserError
from addp_core.weights.architectures import ARCHITECTURES
from addp_core.weights.files import MODEL_FILE, Source
from addp_core.weights.reading import read_weights
from addp_core.weights.saving import save_state
from det.config import Category, DetectorArchitecture, DetEncoder, Interpolation

KIND = "detector"
DETECTRON2_CONFIG, DETECTRON2_WEIGHTS = "config.yaml", "model_final.pth"  # which its trainers write into their folder
ARCHITECTURES[KIND] = DetectorArchitecture  # lets read_weights load detectors
ENGINES = {  # engine -> the module and the class that implement it
    "torchvision": ("det.engines.torchvision", "TorchvisionDetector"),
    "detectron2": ("det.engines.detectron2", "Detectron2Detector"),
}


@dataclass
class Detections:
    """The n objects detected on one image of H x W pixels, highest score first."""

    boxes: Tensor  # Float[n,4], left, top, right, bottom in pixels of the input image
    scores: Tensor  # Float[n], in [0,1]
    labels: Tensor  # Long[n], positions in the detector's categories
    masks: list[dict[str, Any]] | None  # n in COCO's compressed code (size [H,W], counts bytes); None: boxes alone

    def to_results(self, image_id: int, categories: tuple[Category, ...]) -> list[dict[str, Any]]:
        """Convert to COCO's results format."""
        results: list[dict[str, Any]] = []
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        for (left, top, right, bottom), score, label in rows:
            box = [left, top, right - left, bottom - top]
            results.append(
                {"image_id": image_id, "category_id": categories[label].id, "bbox": box, "score": score},
            )
        for result, mask in zip(results, self.masks or (), strict=self.masks is not None):
            result["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}
        return results

    def mask(self, i: int) -> Tensor:
        """Decode the mask of detection i, Bool[H,W]. Not for detections of boxes alone."""
        assert self.masks is not None
        return torch.from_numpy(coco_mask.decode(self.masks[i])).bool()


class Detector(nn.Module):
    """A detector around a pretrained encoder. In training, `model(samples)` returns the losses by name."""

    architecture: DetectorArchitecture

    def detect(self, images: list[Tensor]) -> list[Detections]:
        """Detect objects on UInt8[3,H,W] RGB images of any sizes, on the model's device; requires eval mode."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Return the names of the encoder's parameters that are exempt from weight decay."""
        raise NotImplementedError

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups for layer decay: the encoder's stem, then its blocks; the rest comes last."""
        raise NotImplementedError


def build_detector(architecture: DetectorArchitecture, encoder: DetEncoder) -> Detector:
    """Build a detector around an encoder; all other parts are randomly initialized.

    Raises UserError if the architecture needs detectron2 and it is not installed.
    """
    module, name = ENGINES[architecture.engine]
    return getattr(_import_detectron2(module), name)(architecture, encoder)


def _import_detectron2(module: str) -> Any:
    """Import a module that may need detectron2. Raises UserError if that is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "detectron2":
            raise
        raise UserError(
            "model: was trained with detectron2, which is not installed; `addp doctor` shows the command to install it"
        ) from error


def resize_to_longer_side(image: Tensor, size: int, interpolation: Interpolation) -> Tensor:
    """Float[3,H,W] -> Float[3,h,w] whose longer side is `size`, with antialiasing."""
    factor = size / max(image.shape[-2:])
    hw = [max(1, round(side * factor)) for side in image.shape[-2:]]
    return F.interpolate(image[None], hw, mode=interpolation, antialias=True)[0]


def save_detector(model: Detector, path: str | os.PathLike) -> None:
    """Save all weights as one safetensors file with the architecture in its metadata.

    Raises OSError if the file cannot be written.
    """
    save_state(model.state_dict(), path, KIND, model.architecture)


def load_detector(source: Source) -> Detector:
    """Load the detector from a run of `addp det train` or its file, in eval mode, float32, on the CPU.

    The source can also be the folder of detectron2's own trainers with our backbone, or a checkpoint in it.
    Raises UserError if the source is not a detector or its tensors do not match its architecture.
    """
    if (path := _find_detectron2_checkpoint(source)) is not None:
        return _import_detectron2("det.native.trained").load_trained(path)
    weights = read_weights(source)
    if weights.kind != KIND:
        raise UserError(f"model: {weights.source} is not a detector; expected a run of `addp det train` or its file")
    architecture: DetectorArchitecture = weights.architecture
    model = build_detector(architecture, architecture.build_encoder())
    mismatched = mismatched_tensors(model, weights.state)
    if mismatched:
        names = ", ".join(mismatched[:5])
        raise UserError(f"{weights.source}: {len(mismatched)} tensors do not match its stored architecture: {names}")
    model.load_state_dict(weights.state)
    return model.eval()


def _find_detectron2_checkpoint(source: Source) -> Path | None:
    """Return the checkpoint if the source is the folder of detectron2's trainer or a checkpoint in it, and not ours."""
    if not isinstance(source, str | os.PathLike):
        return None
    path = Path(source)
    if path.is_dir() and not (path / MODEL_FILE).exists():
        with contextlib.suppress(OSError):
            path /= (path / "last_checkpoint").read_text(encoding="utf-8").strip()
        path = path / DETECTRON2_WEIGHTS if path.is_dir() else path
    is_theirs = path.suffix == ".pth" and path.is_file() and (path.parent / DETECTRON2_CONFIG).is_file()
    return path if is_theirs else None


def mismatched_tensors(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Return the sorted names of tensors that are missing, unexpected or of another shape than the model's."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
