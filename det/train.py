"""`addp det train`: ViTDet's Mask R-CNN (arXiv 2203.16527) over a pretrained encoder, on COCO files.

The engine detectron2 is the one used in the paper; torchvision works in a plain install. Both read the same keys and
files and write the same run folder.
"""

import contextlib
import logging
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import yaml
from annotated_types import Interval

from addp_core.base.errors import UserError
from addp_core.data.config import DataConfig
from addp_core.data.stream import Stream
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import Encoder
from addp_core.training.engine import train
from addp_core.training.run_folder import prepare_out
from addp_core.training.stage import TrainConfig
from addp_core.weights.pretrained import EncoderKeys, check_positions
from det.augment import LargeScaleJitter, collate
from det.coco import CocoDataset, open_coco
from det.config import CocoConfig, DetectorArchitecture, DetectorConfig, EngineChoice, EngineName, vitdet_attention
from det.model import build_detector
from det.stage import DetStage

log = logging.getLogger("addp")


@dataclass(kw_only=True)
class Recipe(EncoderKeys):
    """Keys of `addp det train`."""

    out: Annotated[str, "run folder"]
    engine: Annotated[EngineChoice, "auto: detectron2 if it is installed, else torchvision"] = "auto"
    data: CocoConfig = field(default_factory=CocoConfig)
    drop_path: Annotated[
        float, Interval(ge=0, lt=1), "stochastic depth rate of the last block; earlier blocks have less, the first 0"
    ] = 0.1
    attention: AttentionConfig = field(default_factory=vitdet_attention)
    checkpointing: Annotated[bool, "activation checkpointing in the encoder: less memory, more computation"] = False
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def run(recipe: Recipe) -> None:
    """Train, or continue a run; the result is `<out>/model.safetensors`, which `addp det eval` and `predict` read."""
    recipe = replace(recipe, engine=engine_of_run(recipe))
    if prepare_out(recipe.out, recipe):
        return
    engine = resolve_engine(recipe.engine)
    train_set, val_set = open_datasets(recipe.data)
    encoder = build_encoder(recipe)
    architecture = DetectorArchitecture(
        engine=engine,
        encoder=encoder.config,
        attention=encoder.attention,
        patch_size=encoder.patch_size,
        size=recipe.data.size,
        detector=recipe.detector,
        categories=train_set.categories,
        normalisation=recipe.normalisation,
    )
    log.info("det: engine %s", engine)
    torch.manual_seed(recipe.train.seed)
    stage = DetStage(build_detector(architecture, encoder), val_set)
    train(stage, make_stream(recipe, train_set), recipe.train, recipe.out, recipe)


def make_stream(recipe: Recipe, dataset: CocoDataset) -> Stream:
    """Return an endless stream of batches with large-scale jitter."""
    data = recipe.data
    loading = DataConfig(max_errors=data.max_errors, workers=data.workers, prefetch=data.prefetch)
    jitter = LargeScaleJitter(data.size, data.scale, data.flip)
    return Stream(dataset, jitter, loading, seed=recipe.train.seed, batch=recipe.train.micro_batch, collate=collate)


def engine_of_run(recipe: Recipe) -> EngineChoice:
    """Return the engine to record in recipe.yaml.

    `auto` keeps the engine of an existing run in `out`, even if detectron2 was installed or removed since.
    """
    if recipe.engine != "auto":
        return recipe.engine
    recorded = None
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):  # prepare_out reports a broken recipe.yaml
        recorded = yaml.safe_load((Path(recipe.out) / "recipe.yaml").read_text()).get("engine")
    return recorded or resolve_engine("auto")


def resolve_engine(choice: EngineChoice) -> EngineName:
    """Return the engine to use. Raises UserError if detectron2 is requested and not installed."""
    installed = find_spec("detectron2") is not None
    if choice == "detectron2" and not installed:
        raise UserError(
            "engine=detectron2: it is not installed; `addp doctor` shows the command to install it, or use "
            "engine=torchvision"
        )
    if choice == "auto":
        return "detectron2" if installed else "torchvision"
    return choice


def open_datasets(config: CocoConfig) -> tuple[CocoDataset, CocoDataset]:
    """Open the training and the validation split. Raises UserError if their categories differ."""
    train_set, val_set = open_coco(config, "train", config.empty), open_coco(config, "val")
    if train_set.categories != val_set.categories:
        raise UserError(f"{val_set.path}: its categories differ from those of {train_set.path}; expected the same")
    return train_set, val_set


def build_encoder(recipe: Recipe) -> Encoder:
    """Build the recipe's encoder for square images of `data.size` pixels.

    Raises UserError if the encoder does not take pixels or has no position information.
    """
    torch.manual_seed(recipe.train.seed)
    encoder = recipe.load_pixel_encoder(
        recipe.data.size, drop_path=recipe.drop_path, attention=recipe.attention, dynamic=True
    )
    check_positions(encoder, recipe.model, "attention.relative")
    encoder.checkpointing = recipe.checkpointing
    return encoder
