"""`addp det train`: ViTDet's Mask R-CNN (arXiv 2203.16527) over an encoder, on COCO files.

The engine detectron2 is the paper's; torchvision needs nothing but a plain install. Both read the same keys and files,
and leave the same run folder.
"""

import logging
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Literal

import torch
from annotated_types import Interval

from addp_core.config import dump
from addp_core.data import DataConfig, Stream
from addp_core.encoder import AttentionConfig, Encoder
from addp_core.engine import TrainConfig, prepare_out, train
from addp_core.errors import UserError
from addp_core.start import Start
from det.augment import ScaleJitter, collate
from det.coco import CocoSet, open_coco
from det.config import CocoConfig, DetectorConfig, DetectorFile, vitdet_attention
from det.model import build
from det.stage import DetStage

log = logging.getLogger("addp")


@dataclass(kw_only=True)
class Recipe(Start):
    """Keys of `addp det train`."""

    out: Annotated[str, "run folder"]
    engine: Annotated[
        Literal["auto", "detectron2", "torchvision"], "auto: detectron2 where it is installed, else torchvision"
    ] = "auto"
    data: CocoConfig = field(default_factory=CocoConfig)
    drop_path: Annotated[float, Interval(ge=0, lt=1), "stochastic depth of the last block, growing from 0"] = 0.1
    attention: AttentionConfig = field(default_factory=vitdet_attention)
    checkpointing: Annotated[bool, "compute the blocks' activations twice rather than keep them"] = False
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def run(recipe: Recipe) -> None:
    """Train, or continue; ends with `<out>/model.safetensors`, which `addp det eval` and `predict` read."""
    text = dump(recipe)
    if prepare_out(recipe.out, text):
        return
    engine = choose_engine(recipe.engine)
    sets = open_sets(recipe.data)
    encoder = build_encoder(recipe)
    size, categories = recipe.data.size, sets["train"].categories
    file = DetectorFile(
        engine, encoder.config, encoder.attention, encoder.patch_size, size, recipe.detector, categories
    )
    log.info("det: engine %s", engine)
    torch.manual_seed(recipe.train.seed)
    stage = DetStage(build(file, encoder), sets["val"])
    train(stage, make_stream(recipe, sets["train"]), recipe.train, recipe.out, text)


def make_stream(recipe: Recipe, coco: CocoSet) -> Stream:
    """Batches of jittered scenes, for ever."""
    data = recipe.data
    loading = DataConfig(max_errors=data.max_errors, workers=data.workers, prefetch=data.prefetch)
    jitter = ScaleJitter(data.size, data.scale, data.flip)
    return Stream(coco, jitter, loading, seed=recipe.train.seed, batch=recipe.train.micro_batch, collate=collate)


def choose_engine(wanted: str) -> str:
    """The engine's name; UserError where detectron2 is asked for and missing."""
    installed = find_spec("detectron2") is not None
    if wanted == "detectron2" and not installed:
        raise UserError(
            "engine=detectron2: it is not installed; `addp doctor` names the command, or take engine=torchvision"
        )
    if wanted == "auto":
        return "detectron2" if installed else "torchvision"
    return wanted


def open_sets(config: CocoConfig) -> dict[str, CocoSet]:
    """Both parts; UserError where their categories differ."""
    sets = {"train": open_coco(config, "train", config.empty), "val": open_coco(config, "val")}
    if sets["train"].categories != sets["val"].categories:
        raise UserError(f"{sets['val'].path}: its categories are not those of {sets['train'].path}; expected the same")
    return sets


def build_encoder(recipe: Recipe) -> Encoder:
    """The recipe's encoder for squares of `data.size`."""
    torch.manual_seed(recipe.train.seed)
    encoder = recipe.encoder(recipe.data.size, drop_path=recipe.drop_path, attention=recipe.attention, dynamic=True)
    if not isinstance(encoder, Encoder):
        raise UserError(
            f"model: {recipe.model} sees token ids, not pixels; expected an encoder of pixels (ADDP, MAE, ViT)"
        )
    encoder.checkpointing = recipe.checkpointing
    return encoder
