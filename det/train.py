"""`addp det train`: ViTDet's Mask R-CNN (arXiv 2203.16527) over a pretrained encoder, on COCO files; Faster R-CNN for
boxes without masks.

The engine detectron2 is the one used in the paper; torchvision works in a plain install. Both read the same keys and
files and write the same run folder.
"""

import contextlib
import functools
import logging
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml

from addp_core.base.errors import UserError
from addp_core.base.launch import rank
from addp_core.base.paths import RECIPE_FILE
from addp_core.data.config import DataConfig
from addp_core.data.stream import Stream
from addp_core.networks.cnn import CnnEncoder
from addp_core.training.engine import train
from addp_core.training.run_folder import prepare_out
from addp_core.weights.pretrained import check_positions
from det.augment import LargeScaleJitter, collate
from det.average_precision import AREAS
from det.coco import CocoDataset, open_coco
from det.config import (
    CocoConfig,
    DetectorArchitecture,
    DetectorConfig,
    DetEncoder,
    EngineChoice,
    EngineName,
    Interpolation,
    MaskChoice,
    describe_encoder,
)
from det.model import build_detector
from det.recipe import TrainRecipe as Recipe
from det.stage import DetStage

log = logging.getLogger("addp")

FORMER_INTERPOLATION: Interpolation = "bicubic"  # of all runs before the key data.interpolation existed


def run(recipe: Recipe) -> None:
    """Train, or continue a run; the result is `<out>/model.safetensors`, which `addp det eval` and `predict` read."""
    recipe = keep_settings_of_run(recipe)

    @functools.cache
    def datasets() -> tuple[CocoDataset, CocoDataset]:
        train_set, val_set = open_datasets(recipe.data, recipe.detector.masks)
        check_best_metric(recipe.train.keep_best, val_set)
        return train_set, val_set

    if prepare_out(recipe.out, recipe, lambda: dict(zip(("train", "val"), datasets(), strict=True))):
        return
    engine = resolve_engine(recipe.engine)
    train_set, val_set = datasets()
    if rank() == 0:
        val_set.check_readable()  # all of them: the evaluation would otherwise find out at the end
    encoder = build_encoder(recipe)
    architecture = DetectorArchitecture(
        engine=engine,
        **describe_encoder(encoder),
        size=recipe.data.size,
        detector=replace(recipe.detector, masks=train_set.masks),
        categories=train_set.categories,
        normalisation=recipe.normalisation,
        interpolation=recipe.data.interpolation,
    )
    log.info("det: engine %s, %s", engine, "boxes and masks" if train_set.masks else "boxes alone (Faster R-CNN)")
    torch.manual_seed(recipe.train.seed)
    stage = DetStage(build_detector(architecture, encoder), val_set)
    train(stage, make_stream(recipe, train_set), recipe.train, recipe.out, recipe)


def make_stream(recipe: Recipe, dataset: CocoDataset) -> Stream:
    """Return an endless stream of batches with large-scale jitter."""
    data = recipe.data
    loading = DataConfig(max_errors=data.max_errors, workers=data.workers, prefetch=data.prefetch)
    jitter = LargeScaleJitter(data.size, data.scale, data.flip, dataset.masks, data.interpolation)
    return Stream(dataset, jitter, loading, seed=recipe.train.seed, batch=recipe.train.micro_batch, collate=collate)


def keep_settings_of_run(recipe: Recipe) -> Recipe:
    """Return the recipe to record in recipe.yaml, with what an existing run in `out` has decided.

    `engine=auto` keeps the run's engine, even if detectron2 was installed or removed since. A run that was begun before
    `data.interpolation` existed goes on as it began, although the named recipes have another one now.
    """
    recorded: dict = {}
    interpolation = recipe.data.interpolation
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError, TypeError, KeyError):  # prepare_out reports it
        recorded = dict(yaml.safe_load((Path(recipe.out) / RECIPE_FILE).read_text()))
        if "interpolation" not in recorded["data"] and interpolation != FORMER_INTERPOLATION:
            log.info("out=%s: goes on with data.interpolation=%s, as it began", recipe.out, FORMER_INTERPOLATION)
            interpolation = FORMER_INTERPOLATION
    engine = recipe.engine
    if engine == "auto":
        engine = recorded.get("engine") or resolve_engine("auto")
    return replace(recipe, engine=engine, data=replace(recipe.data, interpolation=interpolation))


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


def open_datasets(config: CocoConfig, masks: MaskChoice = "auto") -> tuple[CocoDataset, CocoDataset]:
    """Open the training and the validation split; `masks` is the recipe's `detector.masks`.

    Raises UserError if their categories differ, if one has no object, or if its images cannot be read, as far as a look
    at a hundred of them shows.
    """
    train_set = open_coco(config, "train", config.empty, masks)
    val_set = open_coco(config, "val", masks="auto" if train_set.masks else False)
    if train_set.categories != val_set.categories:
        raise UserError(f"{val_set.path}: its categories differ from those of {train_set.path}; expected the same")
    if train_set.masks and not val_set.masks:
        log.warning("data: %s has no masks: the evaluation reports box AP alone", val_set.path)
    for dataset in (train_set, val_set):
        dataset.check_readable(samples=100)
    return train_set, val_set


def check_best_metric(metric: str, dataset: CocoDataset) -> None:
    """Raise UserError if the best model is to be kept by the AP of a size of which the dataset has no object."""
    smallest, largest = AREAS.get(metric.partition("_")[2], (0, math.inf))
    if not any(smallest <= area <= largest for area in dataset.areas()):
        raise UserError(
            f"train.keep_best={metric}: {dataset.path} has no object of {smallest:,.0f} to {largest:,.0f} pixels, and "
            "without one this metric has no value; expected another one, such as box_AP"
        )


def build_encoder(recipe: Recipe) -> DetEncoder:
    """Build the recipe's encoder for square images of `data.size` pixels.

    Raises UserError if the encoder is a ViT without position information, or a CNN with scales of ViTs.
    """
    torch.manual_seed(recipe.train.seed)
    encoder = recipe.load_encoder(
        recipe.data.size, drop_path=recipe.drop_path, attention=recipe.attention, dynamic=True, stages=True
    )
    if isinstance(encoder, CnnEncoder):
        _check_stages(recipe, encoder)
    else:
        check_positions(encoder, recipe.model, "attention.relative")
    encoder.checkpointing = recipe.checkpointing
    return encoder


def _check_stages(recipe: Recipe, encoder: CnnEncoder) -> None:
    """Say how a CNN is read. Raises UserError if `detector.scales` are set, which a ViT's single map needs."""
    arch, strides = encoder.config.arch, ", ".join(map(str, encoder.config.strides))
    if recipe.detector.scales != DetectorConfig().scales:
        raise UserError(
            f"detector.scales: found {list(recipe.detector.scales)}, but the maps of {arch} have strides {strides}; "
            "leave the key out"
        )
    log.info("det: %s: FPN over its stages of strides %s; the key attention is for ViTs", arch, strides)
