"""Runs a detector over a COCO dataset."""

import logging
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError
from det.coco import CocoDataset
from det.model import Detector

log = logging.getLogger("addp")


def detect_dataset(model: Detector, dataset: CocoDataset) -> list[dict[str, Any]]:
    """Return the detections on all images of a dataset that has the detector's categories, in COCO's results format.

    Under torchrun the processes share the images, and each returns all results. Unreadable images are logged and have
    no detections.
    """
    state, device = PartialState(), next(model.parameters()).device
    results: list[dict[str, Any]] = []
    indices = range(state.process_index, len(dataset), state.num_processes)
    for index in tqdm(indices, desc="detect", unit="img", disable=None if state.is_main_process else True):
        try:
            image = image_to_tensor(dataset.open_image(index)[0].decode())
        except ImageError as error:
            log.warning("%s: %s; counted as an image without detections", dataset.name(index), error)
            continue
        (detections,) = model.detect([image.to(device)])
        results += detections.to_results(dataset.ids[index], dataset.categories)
    return gather_object(results)


def check_categories(model: Detector, dataset: CocoDataset) -> None:
    """Raise UserError if the categories of the detector and of the dataset differ."""
    ours, theirs = set(model.architecture.categories), set(dataset.categories)
    if ours != theirs:
        added, removed = (
            ", ".join(sorted(f"{c.id} {c.name}" for c in part)[:3]) or "none" for part in (theirs - ours, ours - theirs)
        )
        raise UserError(
            f"{dataset.path}: its {len(theirs)} categories differ from the detector's {len(ours)} "
            f"(only in the file: {added}; only in the detector: {removed}); expected the categories of its training"
        )


def image_to_tensor(image: Image.Image) -> Tensor:
    """Pillow RGB image -> UInt8[3,H,W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
