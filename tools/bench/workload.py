"""How much a command of a bench has to do: which images go through which phase, without doing anything."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from addp_core.base.errors import UserError
from addp_core.base.paths import expand_home
from addp_core.recipes.config import dump
from addp_core.recipes.verbs import VERBS
from addp_core.training.pace import FEATURES, HEADS, SAMPLING, VALIDATION
from tools.bench.arguments import verb_recipe

TRAINING = "training"  # a phase whose pace is in metrics.jsonl
REFERENCE = "reference"  # images whose features are extracted once
PHASES = (TRAINING, VALIDATION, SAMPLING, FEATURES)  # that count images
PREDICTING = ("det predict", "seg predict", "inpaint")  # on a few sample images, which takes seconds

# Keys that change what a run computes, but neither how much nor how fast,
RESULT_KEYS = (
    *("out", "model", "init", "seed", "reference_resize", "extractor", "augment.smoothing"),
    *("train.seed", "train.lr", "train.base_lr", "train.min_lr", "train.layer_decay", "train.weight_decay"),
    *("train.warmup_epochs", "train.warmup_steps", "train.momentum", "train.betas", "train.schedule"),
    *("train.checkpoint_every", "train.log_every", "train.preview_every", "train.export_every", "train.keep"),
    *("train.trackers", "train.tracker_project"),
)
# and those that change how much, but not how fast.
AMOUNT_KEYS = ("n", "train.epochs", "train.steps", "train.evaluate_every")


@dataclass(frozen=True)
class Workload:
    """What a command has to do.

    Attributes:
        verb: The verb of addp.
        arguments: Its arguments, with the verb.
        recipe: The resolved recipe of the verb.
        amounts: Phase -> number of images, with those that are processed several times counted as often.
        speed: Equal for two commands that work equally fast on encoders of the same architecture.
    """

    verb: str
    arguments: list[str]
    recipe: Any
    amounts: Mapping[str, float]
    speed: str

    @property
    def main_phase(self) -> str:
        """The phase whose speed `estimate.img_s` gives."""
        return next(iter(self.amounts))


class Workloads:
    """Finds out what commands have to do. Counts each dataset once, and once what is done once for several commands."""

    def __init__(self) -> None:
        self._amounts: dict[str, Mapping[str, float]] = {}
        self._references: set[str] = set()  # whose features have been counted; they are kept

    def of(self, arguments: list[str], benchmark: str) -> Workload | None:
        """Return what `addp <arguments>` has to do, None if that is next to nothing.

        Raises UserError if the verb's cost is not known here, or if it refuses its arguments or its data.
        """
        verb = next((name for name in (" ".join(arguments[:2]), arguments[0]) if name in VERBS), arguments[0])
        if verb in PREDICTING:
            return None
        if verb not in AMOUNTS:
            raise UserError(f"nothing is known of the cost of addp {verb}")
        recipe = verb_recipe(arguments, benchmark)
        if verb == "seg train":
            from seg.mmseg_config import read_config
            from seg.train import resolve

            recipe = resolve(recipe, read_config(recipe.config))
        key = _settings_without(RESULT_KEYS, verb, recipe)
        if key not in self._amounts:
            self._amounts[key] = AMOUNTS[verb](recipe)
        amounts = dict(self._amounts[key])
        if references := amounts.pop(REFERENCE, 0):
            amounts[FEATURES] += 0 if recipe.reference in self._references else references
            self._references.add(recipe.reference)
        return Workload(verb, arguments, recipe, amounts, _settings_without(RESULT_KEYS + AMOUNT_KEYS, verb, recipe))


def _settings_without(keys: Sequence[str], verb: str, recipe: Any) -> str:
    tree = yaml.safe_load(dump(recipe))
    for key in keys:
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section.get(name) or {}
        if not isinstance(section.get(last), dict):  # `model` of pretraining is its architecture
            section.pop(last, None)
    return f"{verb} {tree}"


def _training(train: Any, images: int, validated: int) -> dict[str, float]:
    """Return the amounts of a training, given its section `train`, the training images and the validation images."""
    steps = train.steps or math.ceil(train.epochs * images / train.batch)
    evaluations = 1 + ((steps - 1) // train.evaluate_every if train.evaluate_every else 0)
    return {TRAINING: steps * train.batch, **({VALIDATION: evaluations * validated} if validated else {})}


def _of_pretraining(recipe: Any) -> dict[str, float]:
    from addp_core.data.sources import open_source

    return _training(recipe.train, len(open_source(recipe.data)), 0)


def _of_classification(recipe: Any) -> dict[str, float]:
    from cls.data import open_splits

    train_set, val_set = open_splits(recipe.data, recipe.val, recipe.val_share, recipe.train.seed, recipe.label_share)
    if getattr(recipe, "mode", "full") == "fast":
        return {VALIDATION: len(train_set) + len(val_set), HEADS: 1.0}
    return _training(recipe.train, len(train_set), len(val_set))


def _of_detection(recipe: Any) -> dict[str, float]:
    from det.coco import open_coco

    val_set = open_coco(recipe.data, "val")
    # the annotations for training are hundreds of megabytes
    images = 0 if recipe.train.steps else len(open_coco(recipe.data, "train", recipe.data.empty, recipe.detector.masks))
    return _training(recipe.train, images, len(val_set))


def _of_segmentation(recipe: Any) -> dict[str, float]:
    from seg.scenes import find_pairs

    return _training(recipe.train, 0, len(find_pairs(recipe.data.source, "val")))


def _of_segmentation_probe(recipe: Any) -> dict[str, float]:
    from seg.scenes import find_pairs

    images = sum(len(find_pairs(recipe.data.source, split)) for split in ("train", "val"))
    return {VALIDATION: images, HEADS: 1.0}


def _of_robustness(recipe: Any) -> dict[str, float]:
    from addp_core.data.sources import open_source
    from cls.variants.datasets import TOP1_KEYS, find_imagenet_c

    images = sum(len(open_source(path, recipe.split)) for key in ("val", *TOP1_KEYS) if (path := getattr(recipe, key)))
    if recipe.imagenet_c:
        parts = find_imagenet_c(expand_home(recipe.imagenet_c), recipe.allow_missing)
        images += len(parts) * len(open_source(str(parts[0].path), recipe.split))  # all have the same images
    if recipe.corrupt:
        from addp_core.data.corruptions import CORRUPTIONS, SEVERITIES

        clean = len(open_source(recipe.corrupt, recipe.split))
        images += len(CORRUPTIONS) * len(SEVERITIES) * min(recipe.corrupt_n or clean, clean)
    return {VALIDATION: images}


def _of_evaluation(recipe: Any) -> dict[str, float]:
    """Sampling counts images of as many steps as the setting with the fewest has."""
    from gen.evaluate import sampling_settings
    from gen.reference import open_reference

    settings = [each for each in sampling_settings(recipe).values() if each is not None]
    steps = [each.steps for each in settings]
    reference = open_reference(recipe.reference, recipe.split)
    sampled = {SAMPLING: recipe.n * sum(steps) / min(steps)} if steps else {}
    extracted = {FEATURES: recipe.n * max(len(settings), 1)}
    return {**sampled, **extracted, REFERENCE: 0 if isinstance(reference, Path) else len(reference)}


AMOUNTS: dict[str, Callable[[Any], dict[str, float]]] = {  # verb -> amounts of a recipe
    "tokenizer": _of_pretraining,
    "predictor": _of_pretraining,
    "pretrain": _of_pretraining,
    "finetune": _of_classification,
    "linprobe": _of_classification,
    "det train": _of_detection,
    "seg train": _of_segmentation,
    "seg probe": _of_segmentation_probe,
    "robustness": _of_robustness,
    "evaluate": _of_evaluation,
}
