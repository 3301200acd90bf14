"""`addp robustness`: top-1 on ImageNet-A, -R and -Sketch, 1 - mCE on ImageNet-C, and their mean, as the paper has it.

Sets lie as their authors publish them, <class>/<image>, and ImageNet-C as <corruption>/<severity>/<class>/<image>,
perhaps below blur/, digital/, noise/ and weather/. Folder names say which classes are meant; on ImageNet-A and -R only
the logits of the set's own classes compete. Without ImageNet-C, `corrupt` makes its corruptions from clean images; such
results are called generated. Every set, and every corruption at every severity, is measured once and kept in
<out>/cells.json; the table goes to stdout, <out>/robustness.md, .csv and results.json.
"""

import csv
import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from annotated_types import Ge, Gt, Le
from timm.data import ImageNetInfo
from torch import Tensor

from addp_core.base.errors import UserError, did_you_mean, renaming_keys
from addp_core.base.files import write_atomically
from addp_core.base.rng import seed_for
from addp_core.data.config import DataConfig
from addp_core.data.corruptions import CORRUPTIONS, REFERENCE_SIDE, SEVERITIES, corrupted_jpeg
from addp_core.data.images import LazyImage, eval_transform
from addp_core.data.sources import HubDataset, ImageSource, open_source
from addp_core.networks.classifier import Classifier
from addp_core.recipes.config import dump
from addp_core.training.compute import Precision, accelerate_model
from addp_core.training.engine import process_state
from addp_core.weights.loading import load_classifier
from addp_core.weights.modules import fingerprint
from cls.data import CROP_SHARE, classifier_crop
from cls.evaluation import Scores, compute_outputs

log = logging.getLogger("addp")

SETS = {  # key: name
    "val": "clean validation",
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
    "sketch": "ImageNet-Sketch",
    "imagenet_c": "ImageNet-C",
    "corrupt": "ImageNet-C (generated)",
}
OF_C = ("imagenet_c", "corrupt")
AVERAGED = ("imagenet_a", "imagenet_r", "sketch")  # and one of OF_C
PUBLISHED = {"imagenet_a": "imagenet_a_synsets.txt", "imagenet_r": "imagenet_r_synsets.txt"}  # timm's class lists
KEYS = {"data.split": "split", "data.max_errors": "max_errors"}  # of a set -> of this recipe
CELLS = "cells.json"  # in `out`: what was measured
GROUPS = ("noise", "blur", "weather", "digital")  # folders that ImageNet-C's archives unpack to
ALEXNET = {  # mean errors over the severities, by which mCE divides (Hendrycks and Dietterich, 2019)
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


@dataclass
class Recipe:
    """Keys of `addp robustness`. At least one set is needed."""

    model: Annotated[str, "a run of `addp finetune` or `addp linprobe`, or its file"]
    out: Annotated[str, "folder for results.json, robustness.md, robustness.csv and cells.json, by which it continues"]
    val: Annotated[str, "clean validation images, for comparison: ImageNet root, class folders, .tar or hub set"] = ""
    imagenet_a: Annotated[str, "folder of ImageNet-A"] = ""
    imagenet_r: Annotated[str, "folder of ImageNet-R"] = ""
    sketch: Annotated[str, "folder of ImageNet-Sketch"] = ""
    imagenet_c: Annotated[str, "folder of ImageNet-C"] = ""
    corrupt: Annotated[str, "instead of imagenet_c: clean images, as for val, to corrupt on the fly"] = ""
    corrupt_n: Annotated[int, Ge(0), "of `corrupt`: this many images, evenly spread; 0: all"] = 0
    seed: Annotated[int, "of generated corruptions"] = 0
    allow_missing: Annotated[bool, "take the mean over what imagenet_c holds, and say what it lacks"] = False
    split: Annotated[str, "part of a set that has parts"] = "val"
    size: Annotated[int | None, Ge(8), "pixels of the model's images (default: those it was trained on)"] = None
    crop: Annotated[
        float | None,
        Gt(0),
        Le(1),
        "share of the shorter side to crop (default: the model's own, else 0.875 up to 224 px and 1 above); "
        "ImageNet-C's pictures come cropped",
    ] = None
    batch: Annotated[int, Ge(1), "images at a time on each process"] = 64
    workers: Annotated[int | None, Ge(0), "loading processes of each process (default: by the machine)"] = None
    max_errors: Annotated[float, Ge(0), "unreadable images to leave out: a count, or below 1 a share of a set"] = 0.01
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Cell:
    """What is measured in one go: a set, or one corruption at one severity."""

    key: str  # of the recipe
    corruption: str = ""
    severity: int = 0
    path: Path | None = None  # of the severity's folder, where it is on the disk

    @property
    def title(self) -> str:
        return f"{SETS[self.key]} {self.corruption} {self.severity}" if self.corruption else SETS[self.key]


@dataclass(frozen=True)
class Measured:
    """Counts of one cell."""

    images: int
    classes: int
    right: int
    right5: int

    @property
    def top1(self) -> float:
        """In per cent."""
        return 100 * self.right / max(self.images, 1)


def run(recipe: Recipe) -> None:
    """Measure what is not in `out` yet, then write the table.

    UserError, before anything is measured, where no set is given, a set's classes are not the model's, or ImageNet-C
    is incomplete.
    """
    given = [key for key in SETS if getattr(recipe, key)]
    if not given:
        raise UserError(f"no set given; expected at least one of {', '.join(f'{key}=<folder>' for key in SETS)}")
    if all(getattr(recipe, key) for key in OF_C):
        raise UserError(f"{', '.join(OF_C)}: found both, expected one: results on the two are never mixed")
    state = process_state()
    model = load_classifier(recipe.model, recipe.size)
    names = names_of(model)
    bench = Bench(recipe, model, names)
    cells = bench.cells(given)
    store = Store(Path(recipe.out), state)
    store.claim(dump(recipe))
    model.to(state.device)
    accelerate_model(model)

    found: dict[Cell, Measured] = {}
    for number, cell in enumerate(cells, 1):
        source = bench.open(cell)
        indices = bench.indices(cell, source)
        key = store.key(bench.settings(cell, len(indices)))
        if key not in store.known:
            title = f"{cell.title} ({number}/{len(cells)})"
            store.add(key, cell, bench.measure(cell, source, indices, title))
        found[cell] = store.known[key]
    if state.is_main_process:
        report = summary(recipe, found)
        store.report(report)
        sys.stdout.write(table(report))


# -------------------- the errors of ImageNet-C


def corruption_errors(errors: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    """Top-1 errors in [0,1] by corruption and severity -> for each corruption its mean `error` and `ce`, in per cent.

    ce: the error over AlexNet's; mCE is its mean over the fifteen.
    """
    means = {name: float(np.mean(list(row.values()))) for name, row in errors.items()}
    return {name: {"error": 100 * mean, "ce": 100 * mean / ALEXNET[name]} for name, mean in means.items()}


def cells_on_disk(root: Path, allow_missing: bool) -> list[Cell]:
    """The severities of ImageNet-C below `root`. UserError that names what lacks, unless `allow_missing`."""
    if not root.is_dir():
        raise UserError(f"imagenet_c: {root} does not exist; expected a folder with <corruption>/<severity>/<class>/")
    places = [root, *(root / group for group in GROUPS)]
    cells, missing = [], []
    for name in CORRUPTIONS:
        base = next((place / name for place in places if (place / name).is_dir()), root / name)
        there = [severity for severity in SEVERITIES if (base / str(severity)).is_dir()]
        cells += [Cell("imagenet_c", name, severity, base / str(severity)) for severity in there]
        missing += [(name, severity) for severity in SEVERITIES if severity not in there]
    if missing and (not allow_missing or not cells):
        others = {entry.name for place in places if place.is_dir() for entry in os.scandir(place)} - set(CORRUPTIONS)
        near = did_you_mean(missing[0][0], others)
        raise UserError(
            f"imagenet_c: {root} lacks {lacking(missing)}{near}; the mean needs {len(CORRUPTIONS)} corruptions at "
            f"{len(SEVERITIES)} severities: add them, or set allow_missing=true for the mean over what is there"
        )
    return cells


def lacking(missing: Sequence[tuple[str, int]]) -> str:
    """'snow (all severities), frost 3, frost 5': what of ImageNet-C is not there."""
    severities: dict[str, list[int]] = {}
    for name, severity in missing:
        severities.setdefault(name, []).append(severity)
    whole = [f"{name} (all severities)" for name, which in severities.items() if len(which) == len(SEVERITIES)]
    parts = [
        f"{name} {', '.join(map(str, which))}" for name, which in severities.items() if len(which) < len(SEVERITIES)
    ]
    return "; ".join(whole + parts)


class Corrupted(ImageSource):
    """Another source's images, cropped as ImageNet-C's were (224 pixels of 256) and corrupted.

    hw: of the model's images. Those of more than 224 pixels are made from pictures of 224, as ImageNet-C holds them.
    The noise of an image depends on (seed, its index, corruption, severity) alone.
    """

    def __init__(self, source: ImageSource, hw: tuple[int, int], corruption: str, severity: int, seed: int):
        self.classes, self.labels = source.classes, source.labels
        factor = min(1.0, REFERENCE_SIDE / min(hw))
        self._source, self._crop = source, eval_transform((round(hw[0] * factor), round(hw[1] * factor)), CROP_SHARE)
        self._corruption, self._severity, self._seed = corruption, severity, seed

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        return self._source.read_bytes(index)

    def open_image(self, index: int) -> tuple[LazyImage, int]:
        picture, label = self._source.open_image(index)
        clean = self._crop.pixels(picture).permute(1, 2, 0).numpy()
        seed = seed_for(self._seed, "corrupt", index, self._corruption, self._severity)
        return LazyImage(corrupted_jpeg(clean, self._corruption, self._severity, np.random.default_rng(seed))), label


# -------------------- classes


def names_of(model: Classifier) -> tuple[str, ...]:
    """The class that each logit stands for.

    A model of 1000 classes that does not name them (or numbers them) has ImageNet's, ordered by WordNet id.
    """
    numbers = tuple(map(str, range(model.num_classes)))
    if model.class_names and model.class_names != numbers:
        return model.class_names
    imagenet = tuple(ImageNetInfo().label_names())
    return imagenet if len(numbers) == len(imagenet) else numbers


def published_classes(key: str) -> list[str]:
    """WordNet ids of the 200 classes of ImageNet-A or -R, from timm; of other sets none."""
    if key not in PUBLISHED:
        return []
    return files("timm.data").joinpath("_info", PUBLISHED[key]).read_text(encoding="ascii").split()


def logits_of(key: str, where: str, classes: Sequence[str], names: Sequence[str], numbered: bool = False) -> list[int]:
    """For each class of a set the model's logit. numbered: the set's labels are the model's, whatever their names.

    UserError where the set has no classes, or some that the model does not know.
    """
    if not classes:
        raise UserError(f"{key}: {where} has no class folders; expected <class>/<image>, as the set is published")
    place = {name: logit for logit, name in enumerate(names)}
    unknown = [name for name in classes if name not in place]
    if not unknown:
        return [place[name] for name in classes]
    if not numbered and list(classes) != list(map(str, range(len(classes)))):
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError(
            f"{key}: class {unknown[0]!r}{more} of {where} is none of the model's {len(names)}, such as "
            f"{names[0]!r}{did_you_mean(unknown[0], names)}"
        )
    if len(classes) > len(names):
        raise UserError(f"{key}: {where} has label {len(classes) - 1}, expected 0 to {len(names) - 1}: the model's")
    return list(range(len(classes)))


def competing(key: str, where: str, classes: Sequence[str], names: Sequence[str]) -> list[int]:
    """The logits that predictions are taken over: all, on ImageNet-A and -R those of the set's classes.

    classes: those with images, by the model's names. UserError where some are of ImageNet-A or -R and others are not;
    otherwise the published 200 compete, or in a set without any of them the classes that are there.
    """
    if key not in PUBLISHED:
        return list(range(len(names)))
    published = published_classes(key)
    wanted = set(classes)
    if wanted & set(published):
        strangers = sorted(wanted - set(published))
        if strangers:
            raise UserError(
                f"{key}: class {strangers[0]!r} of {where} is none of the {len(published)} of {SETS[key]}; "
                "expected that set, or one of other classes alone"
            )
        if len(wanted) < len(published):
            log.warning(
                "%s: %d of the %d classes are there; predictions are over all", key, len(wanted), len(published)
            )
        wanted = set(published)
    return [logit for logit, name in enumerate(names) if name in wanted]


# -------------------- measuring


class Bench:
    """A model and the sets it is measured on."""

    def __init__(self, recipe: Recipe, model: Classifier, names: tuple[str, ...]):
        self.recipe, self.model, self.names = recipe, model, names
        self.hw = model.encoder.image_size
        self.share = classifier_crop(model, recipe.crop)
        reads = (model.pooling, model.norm, names, model.mean, model.std)
        self.digest = hashlib.blake2b(f"{fingerprint(model)} {reads}".encode(), digest_size=16).hexdigest()
        self.sources: dict[str, ImageSource] = {}  # of all sets but ImageNet-C, whose cells are opened in turn

    def cells(self, given: Sequence[str]) -> list[Cell]:
        """What is to be measured. UserError where a set does not open or has classes that the model does not know."""
        cells: list[Cell] = []
        for key in given:
            where = getattr(self.recipe, key)
            if key == "imagenet_c":
                there = cells_on_disk(Path(where).expanduser(), self.recipe.allow_missing)
                folders = {cell: sorted(e.name for e in os.scandir(cell.path) if e.is_dir()) for cell in there}
                for cell in there:
                    logits_of(key, str(cell.path), folders[cell], self.names)
                self.check_whole(folders)
                cells += there
                continue
            with renaming_keys(KEYS | {"data.source": key}):
                source = self.sources[key] = open_source(DataConfig(source=where, split=self.recipe.split))
            self.columns(key, source)
            if key == "corrupt":
                cells += [Cell(key, name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
            else:
                cells.append(Cell(key))
        return cells

    def check_whole(self, folders: Mapping[Cell, Sequence[str]]) -> None:
        """UserError that names an ImageNet-C cell without classes that others have; with `allow_missing` a warning."""
        every = set().union(*folders.values())
        for cell, there in folders.items():
            missing = sorted(every - set(there))
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                text = f"{cell.key}: {cell.path} lacks class folder {missing[0]!r}{more}, which other parts have"
                if not self.recipe.allow_missing:
                    raise UserError(f"{text}; add what lacks, or set allow_missing=true to measure what is there")
                if process_state().is_main_process:
                    log.warning("%s; it is measured on the %d classes it has", text, len(there))

    def open(self, cell: Cell) -> ImageSource:
        if cell.path is not None:
            with renaming_keys(KEYS | {"data.source": cell.key}):
                return open_source(str(cell.path), self.recipe.split)
        source = self.sources[cell.key]
        if cell.key != "corrupt":
            return source
        return Corrupted(source, self.hw, cell.corruption, cell.severity, self.recipe.seed)

    def indices(self, cell: Cell, source: ImageSource) -> list[int]:
        """The images that are looked at."""
        n = self.recipe.corrupt_n
        if cell.key != "corrupt" or not 0 < n < len(source):
            return list(range(len(source)))
        return [i * len(source) // n for i in range(n)]

    def columns(self, key: str, source: ImageSource) -> tuple[Tensor, Tensor]:
        """(Long[k]: the logits that compete, Long[classes of the set]: which of those k each label is)."""
        where = getattr(self.recipe, key)
        logits = logits_of(key, where, source.classes, self.names, isinstance(source, HubDataset))
        if source.labels is not None and (source.labels.min() < 0 or source.labels.max() >= len(logits)):
            found = source.labels.min() if source.labels.min() < 0 else source.labels.max()
            raise UserError(f"{key}: {where} has label {found}, expected 0 to {len(logits) - 1}")
        there = range(len(logits)) if source.labels is None else np.unique(source.labels)
        over = competing(key, where, [self.names[logits[label]] for label in there], self.names)
        place = {logit: column for column, logit in enumerate(over)}
        return torch.tensor(over), torch.tensor([place.get(logit, -1) for logit in logits])  # -1: not there

    def measure(self, cell: Cell, source: ImageSource, indices: list[int], title: str) -> Measured:
        """Counts over these images, on every process; the processes share the work."""
        over, targets = self.columns(cell.key, source)
        scores = Scores.zero(len(over))
        recipe = self.recipe
        with renaming_keys(KEYS | {"data.source": cell.key}):
            for seen in compute_outputs(
                self.model,
                source,
                eval_transform(self.hw, 1.0 if cell.corruption else self.share),
                mean=self.model.mean,
                std=self.model.std,
                indices=indices,
                batch=recipe.batch,
                precision=recipe.precision,
                workers=recipe.workers,
                max_errors=recipe.max_errors,
                title=title,
            ):
                scores.add(seen.outputs[:, over], targets[seen.labels])
        scores = scores.gather()
        return Measured(scores.images, len(over), int(scores.confusion.trace()), scores.top5)

    def settings(self, cell: Cell, images: int) -> dict[str, Any]:
        """All that a cell's result depends on."""
        path = cell.path or getattr(self.recipe, cell.key)
        found = {"model": self.digest, "set": cell.key, "path": os.path.realpath(path), "images": images}
        found |= {"size": self.hw, "crop": self.share, "precision": self.recipe.precision, "split": self.recipe.split}
        if cell.corruption:
            found |= {"corruption": cell.corruption, "severity": cell.severity}
        if cell.key == "corrupt":
            found |= {"seed": self.recipe.seed, "crop": CROP_SHARE}
        return found


class Store:
    """The results in `out`: what was measured, by the digest of all it depends on."""

    def __init__(self, out: Path, state: PartialState):
        self.out, self.state = out, state
        self.known: dict[str, Measured] = {}
        self._notes: dict[str, dict[str, Any]] = {}  # the file's content

    def claim(self, recipe_text: str) -> None:
        """Make the folder and read what is there; the same on all processes."""
        read = [{}]
        if self.state.is_main_process:
            with self._written():
                self.out.mkdir(parents=True, exist_ok=True)
                write_atomically(self.out / "recipe.yaml", recipe_text.encode())
                read = [self._read()]
        broadcast_object_list(read)
        self._notes = read[0]
        self.known = {key: Measured(**note["counts"]) for key, note in self._notes.items()}
        if self.known:
            log.info("out: %d results in %s", len(self.known), self.out / CELLS)

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.out / CELLS
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise UserError(f"out: {path} is damaged ({error}); remove it, and all is measured again") from error

    @staticmethod
    def key(settings: Mapping[str, Any]) -> str:
        return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()

    def add(self, key: str, cell: Cell, measured: Measured) -> None:
        """Keep a result; on the disk when this returns."""
        self.known[key] = measured
        self._notes[key] = {"title": cell.title, "counts": asdict(measured)}
        if self.state.is_main_process:
            with self._written():
                write_atomically(self.out / CELLS, (json.dumps(self._notes, indent=1) + "\n").encode())

    def report(self, report: Mapping[str, Any]) -> None:
        with self._written():
            write_atomically(self.out / "results.json", (json.dumps(report, indent=1) + "\n").encode())
            write_atomically(self.out / "robustness.md", table(report).encode())
            write_atomically(self.out / "robustness.csv", comma_separated(report).encode())

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"out: {self.out} cannot be written ({error.strerror or error})") from error


# -------------------- what comes out


def summary(recipe: Recipe, found: Mapping[Cell, Measured]) -> dict[str, Any]:
    """results.json. Figures are in per cent. score: what enters the average, top-1 or 1 - mCE."""
    report: dict[str, Any] = {"model": recipe.model, "rows": []}
    for key in dict.fromkeys(cell.key for cell in found):
        of_set = {cell: measured for cell, measured in found.items() if cell.key == key}
        parts = list(of_set.values())
        row: dict[str, Any] = {"key": key, "set": SETS[key], "cells": len(parts)}
        row |= {"images": sum(part.images for part in parts), "classes": parts[0].classes}
        row["top1"] = float(np.mean([part.top1 for part in parts]))
        row["top5"] = float(np.mean([100 * part.right5 / max(part.images, 1) for part in parts]))
        if key in OF_C:
            row |= of_corruptions(of_set)
        elif key in AVERAGED:
            row["score"] = row["top1"]
        report["rows"].append(row)
    scored = {row["key"]: row["score"] for row in report["rows"] if "score" in row}
    report["not_averaged"] = [SETS[key] for key in AVERAGED if key not in scored]
    report["not_averaged"] += [] if any(key in scored for key in OF_C) else [SETS[OF_C[0]]]
    report["average"] = None if report["not_averaged"] else float(np.mean(list(scored.values())))
    return report


def of_corruptions(found: Mapping[Cell, Measured]) -> dict[str, Any]:
    """Of ImageNet-C: the errors of each corruption, mCE, score = 1 - mCE, and what is missing."""
    errors: dict[str, dict[int, float]] = {}
    for cell, measured in found.items():
        errors.setdefault(cell.corruption, {})[cell.severity] = 1 - measured.top1 / 100
    corruptions = corruption_errors(errors)
    for name, row in errors.items():
        corruptions[name]["errors"] = {str(severity): 100 * error for severity, error in row.items()}
    mce = float(np.mean([row["ce"] for row in corruptions.values()]))
    everything = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    missing = [place for place in everything if place[1] not in errors.get(place[0], {})]
    return {"mce": mce, "score": 100 - mce, "missing": lacking(missing), "corruptions": corruptions}


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [["set", "images", "classes", "top-1", "score"]]
    for row in report["rows"]:
        images = f"{row['images']:,}" + (f" in {row['cells']} parts" if row["cells"] > 1 else "")
        score = f"{row['score']:.1f}" + ("*" if row.get("missing") else "") if "score" in row else "-"
        lines.append([row["set"], images, str(row["classes"]), f"{row['top1']:.1f}", score])
    c = next((row for row in report["rows"] if "mce" in row), None)
    partial = "*" if c and c["missing"] else ""
    if report["average"] is not None:
        lines.append(["average", "", "", "", f"{report['average']:.1f}{partial}"])
    notes = ["score: top-1, for ImageNet-C 1 - mCE; the average is the mean of the four, as in the paper."]
    if report["not_averaged"]:
        notes = [f"score: top-1, for ImageNet-C 1 - mCE. No average: it needs {', '.join(report['not_averaged'])} too."]
    text = f"model: {report['model']}, figures in per cent\n\n{grid(lines)}\n"
    if c:
        if partial:
            notes.append(f"\\* over what is there: {c['cells']} of 75 parts. Missing: {c['missing']}.")
        if c["key"] == "corrupt":
            notes.append("Corruptions were generated here: not to be compared with figures on the real ImageNet-C.")
        header = ["error", *map(str, SEVERITIES), "mean", "AlexNet", "CE"]
        rows = [
            [name]
            + [f"{row['errors'][str(s)]:.1f}" if str(s) in row["errors"] else "-" for s in SEVERITIES]
            + [f"{row['error']:.1f}", f"{100 * ALEXNET[name]:.1f}", f"{row['ce']:.1f}"]
            for name, row in c["corruptions"].items()
        ]
        last = [f"mCE{partial}", *[""] * 7, f"{c['mce']:.1f}"]
        text += f"\n{SETS[c['key']]}\n\n{grid([header, *rows, last])}\n"
    return text + "\n" + "\n".join(notes) + "\n"


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as it is; the first line is the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| "
        + " | ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def comma_separated(report: Mapping[str, Any]) -> str:
    """The rows, and one for the average."""
    columns = ["set", "images", "classes", "cells", "top1", "top5", "mce", "score", "missing"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["rows"])
    if report["average"] is not None:
        writer.writerow({"set": "average", "score": report["average"]})
    return text.getvalue()
