"""`addp det train`: ViTDet's Mask R-CNN (arXiv 2203.16527) over an encoder, on COCO files.

The engine detectron2 is the paper's; torchvision needs nothing but a plain install. Both read the same keys and files,
and leave the same run folder.
"""

import contextlib
import logging
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import torch
import yaml
from annotated_types import Interval

from addp_core.base.errors import UserError
from addp_core.data.config import DataConfig
from addp_core.data.stream import Stream
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import Encoder
from addp_core.recipes.config import dump
from addp_core.training.engine import TrainConfig, prepare_out, train
from addp_core.weights.start import Start, check_positions
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
    recipe = replace(recipe, engine=settle_engine(recipe))
    text = dump(recipe)
    if prepare_out(recipe.out, text):
        return
    engine = choose_engine(recipe.engine)
    sets = open_sets(recipe.data)
    encoder = build_encoder(recipe)
    size, categories = recipe.data.size, sets["train"].categories
    parts = (encoder.config, encoder.attention, encoder.patch_size, size, recipe.detector, categories)
    file = DetectorFile(engine, *parts, recipe.normalisation)
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


def settle_engine(recipe: Recipe) -> str:
    """The engine for recipe.yaml: `auto` is that of the run in `out`, whatever was installed since, or of a new one."""
    if recipe.engine != "auto":
        return recipe.engine
    found = None
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):  # prepare_out says what is wrong with it
        found = yaml.safe_load((Path(recipe.out) / "recipe.yaml").read_text()).get("engine")
    return found or choose_engine("auto")


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
    """The recipe's encoder for squares of `data.size`. UserError for one that sees no pixels, or no positions."""
    torch.manual_seed(recipe.train.seed)
    options = {"drop_path": recipe.drop_path, "attention": recipe.attention, "dynamic": True}
    encoder = recipe.pixel_encoder(recipe.data.size, **options)
    check_positions(encoder, recipe.model, "attention.relative")
    encoder.checkpointing = recipe.checkpointing
    return encoder
