"""The evaluation of a classifier on one part of a dataset after the other."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from addp_core.base.addresses import refuse_address
from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.paths import expand_home
from addp_core.data.config import DataConfig
from addp_core.data.corruptions import CORRUPTIONS, SEVERITIES, VERSION
from addp_core.data.images import eval_transform
from addp_core.data.listing import FolderTree
from addp_core.data.sources import HubDataset, ImageSource, list_of_split, open_source
from addp_core.data.stream import ReadErrors
from addp_core.training.evaluation import check_unreadable
from addp_core.training.processes import process_state
from addp_core.weights.fingerprint import fingerprint
from cls.data import CROP_FRACTION
from cls.evaluation import Scores, compute_outputs
from cls.variants.classes import competing_logits, has_class_folders, logit_names, match_classes, named_classes
from cls.variants.classifiers import EvaluatedClassifier
from cls.variants.datasets import DatasetPart, complete_parts, count_images, find_imagenet_c
from cls.variants.generated import CorruptedImages
from cls.variants.recipe import Recipe

log = logging.getLogger("addp")

RENAMED_KEYS = {"data.split": "split", "data.max_errors": "max_errors"}  # in messages: a section's key -> this recipe's


@dataclass(frozen=True)
class Counts:
    """The correct predictions on one part of a dataset; the fields are keys of cells.json."""

    images: int
    classes: int
    right: int
    right5: int  # images whose class is among the five highest logits
    unreadable: list[int] = field(default_factory=list)  # indices of the images that are not counted

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.right / max(self.images, 1)

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * self.right5 / max(self.images, 1)


class Evaluator:
    """A classifier and the datasets that it is evaluated on."""

    def __init__(self, recipe: Recipe, classifier: EvaluatedClassifier):
        self.recipe, self.classifier = recipe, classifier
        names = classifier.class_names
        if recipe.classes:
            names = named_classes(recipe.classes, names, classifier.classes)
        self.names = logit_names(names, classifier.classes)
        self.has_names = names not in ((), tuple(map(str, range(classifier.classes))))
        self.hw, self.crop = classifier.hw, classifier.crop
        interface = (*classifier.interface[:2], self.names, classifier.mean, classifier.std, *classifier.interface[2:])
        content = f"{fingerprint(classifier.model)} {interface}"
        self.digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        self.sources: dict[str, ImageSource] = {}  # all datasets but ImageNet-C, whose parts are opened one by one

    def parts(self, keys: Sequence[str]) -> list[DatasetPart]:
        """Open the datasets of these keys and list their parts.

        Raises UserError if a dataset does not open, is incomplete, or has classes that the model does not have.
        """
        parts: list[DatasetPart] = []
        for key in keys:
            location = getattr(self.recipe, key)
            if key == "imagenet_c":
                refuse_address(location, key)
                parts += self._imagenet_c_parts(expand_home(location))
                continue
            with renaming_keys(RENAMED_KEYS | {"data.source": key}):
                source = self.sources[key] = open_source(DataConfig(source=location, split=self.recipe.split))
            self.logits_and_targets(key, source)
            if key == "corrupt":
                parts += [DatasetPart(key, name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
            else:
                parts.append(DatasetPart(key))
        return parts

    def _imagenet_c_parts(self, root: Path) -> list[DatasetPart]:
        """Raise UserError if a part has classes that the model does not have, or lacks images of other parts."""
        parts = find_imagenet_c(root, self.recipe.allow_missing)
        for part in parts:
            assert part.path is not None
            classes = FolderTree(part.path).folders()
            if classes:  # otherwise it is empty
                match_classes(part.key, str(part.path), classes, self.names, numbers=not self.has_names)
        listed: list[list[Counter[str]]] = [[]]
        if process_state().is_main_process:  # millions of files, perhaps on a network disk
            listed = [count_images(parts)]
        broadcast_object_list(listed)
        return complete_parts(dict(zip(parts, listed[0], strict=True)), self.recipe.allow_missing)

    def open(self, part: DatasetPart) -> ImageSource:
        """Return the images of a part."""
        if part.path is not None:
            with renaming_keys(RENAMED_KEYS | {"data.source": part.key}):
                return open_source(str(part.path), self.recipe.split)
        source = self.sources[part.key]
        if part.key != "corrupt":
            return source
        return CorruptedImages(source, self.hw, part.corruption, part.severity, self.recipe.seed)

    def indices(self, part: DatasetPart, source: ImageSource) -> list[int]:
        """Return the indices of the images to evaluate: all, or `corrupt_n` evenly spaced ones."""
        n = self.recipe.corrupt_n
        if part.key != "corrupt" or not 0 < n < len(source):
            return list(range(len(source)))
        return [i * len(source) // n for i in range(n)]

    def logits_and_targets(self, key: str, source: ImageSource) -> tuple[Tensor, Tensor]:
        """Return the logits that compete on a dataset, Long[k], and for each of its labels which of these is correct.

        The second is Long[labels] with values in 0..k-1, or -1 for a label without images.

        Raises UserError if the classes or labels do not match the model's.
        """
        location = getattr(self.recipe, key)
        is_list = list_of_split(expand_home(location), self.recipe.split).is_file()
        numbers = not self.has_names or is_list or not has_class_folders(source)
        logits = match_classes(key, location, source.classes, self.names, isinstance(source, HubDataset), numbers)
        if source.labels is not None and (source.labels.min() < 0 or source.labels.max() >= len(logits)):
            invalid = source.labels.min() if source.labels.min() < 0 else source.labels.max()
            raise UserError(f"{key}: {location} has label {invalid}, expected 0 to {len(logits) - 1}")
        labels = range(len(logits)) if source.labels is None else np.unique(source.labels).tolist()
        competing = competing_logits(key, location, [self.names[logits[label]] for label in labels], self.names)
        positions = {logit: position for position, logit in enumerate(competing)}
        return torch.tensor(competing), torch.tensor([positions.get(logit, -1) for logit in logits])

    def evaluate(
        self,
        part: DatasetPart,
        source: ImageSource,
        indices: list[int],
        title: str,
        errors: ReadErrors | None = None,
    ) -> Counts:
        """Count the correct predictions on these images; the processes share the work, and each gets the result.

        errors: as in `compute_outputs`.
        """
        competing, targets = self.logits_and_targets(part.key, source)
        scores, read = Scores.zero(len(competing)), []
        recipe = self.recipe
        with renaming_keys(RENAMED_KEYS | {"data.source": part.key}):
            for batch in compute_outputs(
                self.classifier.model,
                source,
                eval_transform(self.hw, 1.0 if part.corruption else self.crop),
                mean=self.classifier.mean,
                std=self.classifier.std,
                indices=indices,
                batch=recipe.batch,
                precision=recipe.precision,
                workers=recipe.workers,
                max_errors=recipe.max_errors,
                title=title,
                errors=errors,
            ):
                scores.add(batch.outputs[:, competing], targets[batch.labels])
                read += batch.indices.tolist()
        scores = scores.gather()
        unreadable = sorted(set(indices).difference(*gather_object([read])))
        return Counts(scores.images, len(competing), int(scores.confusion.trace()), scores.top5, unreadable)

    def evaluate_unreadable(self, part: DatasetPart, source: ImageSource, before: Counts, title: str) -> Counts:
        """Return a result on a part with those of its images that could not be read before and can be now."""
        errors: ReadErrors = []
        more = self.evaluate(part, source, before.unreadable, title, errors)
        with renaming_keys(RENAMED_KEYS):
            check_unreadable(errors, self.recipe.max_errors, before.images + len(before.unreadable))
        right, right5 = before.right + more.right, before.right5 + more.right5
        return Counts(before.images + more.images, before.classes, right, right5, more.unreadable)

    def settings(self, part: DatasetPart, source: ImageSource, images: int) -> dict[str, Any]:
        """Return everything that the result on this many of a part's images depends on."""
        path = part.path or getattr(self.recipe, part.key)
        settings = {"model": self.digest, "set": part.key, "path": os.path.realpath(path), "images": images}
        settings["listing"] = source.digest()
        settings |= {"size": self.hw, "crop": self.crop, "precision": self.recipe.precision, "split": self.recipe.split}
        if part.corruption:
            settings |= {"corruption": part.corruption, "severity": part.severity}
        if part.key == "corrupt":
            settings |= {"seed": self.recipe.seed, "crop": CROP_FRACTION, "corruptions": VERSION}
        return settings
