"""Trained detectors of either engine: their one file, and what they find on images, in COCO's results format."""

import json
import logging
import os
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from pycocotools import mask as coco_mask
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace
from addp_core.data.images import ImageError
from addp_core.networks.encoder import Encoder
from addp_core.weights.checkpoint import METADATA_KEY, Source, read_weights
from addp_core.weights.layouts import ARCHITECTURES
from det.coco import CocoSet
from det.config import Category, DetectorFile

log = logging.getLogger("addp")

KIND = "detector"
ARCHITECTURES[KIND] = DetectorFile  # so that read_weights knows our files
ENGINES = {"torchvision": "det.engines.torchvision", "detectron2": "det.engines.detectron2"}


@dataclass
class Detections:
    """What was found on one image of H x W pixels, the surest first."""

    boxes: Tensor  # Float[n,4], left, top, right, bottom in pixels of the image as it was given
    scores: Tensor  # Float[n], in [0,1]
    labels: Tensor  # Long[n], places in the detector's categories
    masks: list[dict[str, Any]]  # n of COCO's compressed codes (size [H,W], counts bytes)

    def results(self, image_id: int, categories: tuple[Category, ...]) -> list[dict[str, Any]]:
        """In COCO's results format."""
        found = []
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.masks, strict=True)
        for (left, top, right, bottom), score, label, mask in rows:
            code = {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}
            box = [left, top, right - left, bottom - top]
            found.append(
                {"image_id": image_id, "category_id": categories[label].id, "bbox": box, "score": score}
                | {"segmentation": code}
            )
        return found

    def pixels(self, i: int) -> Tensor:
        """The mask of one of them, Bool[H,W]."""
        return torch.from_numpy(coco_mask.decode(self.masks[i])).bool()


def build(file: DetectorFile, encoder: Encoder) -> nn.Module:
    """A detector of the file's architecture and engine around an encoder; its other parts are freshly drawn.

    It has `.file` and, in eval mode, `.detect(images)`: UInt8[3,H,W] RGB, of any sizes, on its device -> `Detections`
    of each.
    """
    try:
        engine = import_module(ENGINES[file.engine])
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "detectron2":
            raise
        raise UserError(
            "model: was trained with detectron2, which is not installed; `addp doctor` names the command that adds it"
        ) from error
    return engine.build(file, encoder)


def save_detector(model: nn.Module, path: str | os.PathLike) -> None:
    """All weights as one safetensors file, `model.file` in its metadata. OSError where it cannot be written."""
    text = json.dumps({"kind": KIND, "architecture": asdict(model.file)})
    state = {key: value.detach().to("cpu").contiguous() for key, value in model.state_dict().items()}
    with atomic_replace(Path(path)) as temporary:
        try:
            save_file(state, temporary, metadata={METADATA_KEY: text})
        except SafetensorError as error:  # how its writer reports a full disk
            raise OSError(str(error)) from error


def load_detector(source: Source) -> nn.Module:
    """The detector of a run of `addp det train` or its file; eval mode, float32, CPU. UserError for anything else."""
    weights = read_weights(source)
    if weights.kind != KIND:
        raise UserError(f"model: {weights.where} is no detector; expected a run of `addp det train` or its file")
    file: DetectorFile = weights.architecture
    encoder = Encoder(file.encoder, (file.size, file.size), file.patch_size, file.attention, dynamic=True)
    model = build(file, encoder)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    found = {key: value.shape for key, value in weights.state.items()}
    strange = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if strange:
        names = ", ".join(strange[:5])
        raise UserError(f"{weights.where}: {len(strange)} tensors do not fit its own description: {names}")
    model.load_state_dict(weights.state)
    return model.eval()


def detect_all(model: nn.Module, coco: CocoSet) -> list[dict[str, Any]]:
    """COCO results of all images of a set with the detector's categories, complete on every process; under torchrun the
    processes share the images. Images that cannot be read are named; nothing is found on them.
    """
    state, device = PartialState(), next(model.parameters()).device
    results: list[dict[str, Any]] = []
    mine = range(state.process_index, len(coco), state.num_processes)
    for index in tqdm(mine, desc="detect", unit="img", disable=None if state.is_main_process else True):
        try:
            image = to_tensor(coco.open_image(index)[0].decode())
        except ImageError as error:
            log.warning("%s: %s; it counts as an image on which nothing is found", coco.name(index), error)
            continue
        (found,) = model.detect([image.to(device)])
        results += found.results(coco.ids[index], coco.categories)
    return gather_object(results)


def check_categories(model: nn.Module, coco: CocoSet) -> None:
    """UserError where a detector's categories are not the set's."""
    ours, theirs = set(model.file.categories), set(coco.categories)
    if ours != theirs:
        only = [sorted(f"{c.id} {c.name}" for c in part)[:3] for part in (theirs - ours, ours - theirs)]
        more, fewer = (", ".join(names) or "none" for names in only)
        raise UserError(
            f"{coco.path}: its {len(theirs)} categories are not the {len(ours)} that the detector knows "
            f"(only here: {more}; only there: {fewer}); expected those it was trained on"
        )


def to_tensor(image: Any) -> Tensor:
    """A Pillow RGB image -> UInt8[3,H,W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
