"""The datasets of `addp robustness`, and the parts of ImageNet-C that are on disk."""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.launch import rank
from addp_core.data.corruptions import CORRUPTIONS, SEVERITIES
from addp_core.data.listing import is_image, walk

log = logging.getLogger("addp")

DATASETS = {  # key of the recipe: name
    "val": "clean validation",
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
    "sketch": "ImageNet-Sketch",
    "imagenet_c": "ImageNet-C",
    "corrupt": "ImageNet-C (generated)",
}
TOP1_KEYS = ("imagenet_a", "imagenet_r", "sketch")  # the average takes their top-1
IMAGENET_C_KEYS = ("imagenet_c", "corrupt")  # and 1 - mCE of one of these
ARCHIVE_FOLDERS = ("noise", "blur", "weather", "digital")  # that the published archives of ImageNet-C unpack to


@dataclass(frozen=True)
class DatasetPart:
    """What is evaluated in one pass: a whole dataset, or one corruption at one severity."""

    key: str  # of the recipe
    corruption: str = ""
    severity: int = 0
    path: Path | None = None  # of the severity's folder, for ImageNet-C
    lacks: str = ""  # how many of its images an incomplete part of ImageNet-C has

    @property
    def title(self) -> str:
        """The name of the dataset, with the corruption and its severity."""
        name = DATASETS[self.key]
        return f"{name} {self.corruption} {self.severity}" if self.corruption else name


def find_imagenet_c(root: Path, allow_missing: bool) -> list[DatasetPart]:
    """List the parts of ImageNet-C below `root`: <corruption>/<severity>/, perhaps in the folders of its archives.

    Raises UserError, with a list of the missing parts, unless `allow_missing` and at least one part is there.
    """
    if not root.is_dir():
        raise UserError(f"imagenet_c: {root} does not exist; expected a folder with <corruption>/<severity>/<class>/")
    parents = [root, *(root / name for name in ARCHIVE_FOLDERS)]
    parts: list[DatasetPart] = []
    missing: list[tuple[str, int]] = []
    for corruption in CORRUPTIONS:
        folder = next((parent / corruption for parent in parents if (parent / corruption).is_dir()), root / corruption)
        for severity in SEVERITIES:
            path = folder / str(severity)
            if path.is_dir():
                parts.append(DatasetPart("imagenet_c", corruption, severity, path))
            else:
                missing.append((corruption, severity))
    if missing and (not allow_missing or not parts):
        names = {entry.name for parent in parents if parent.is_dir() for entry in os.scandir(parent)}
        hint = did_you_mean(missing[0][0], names - set(CORRUPTIONS))
        raise UserError(
            f"imagenet_c: {root} lacks {format_missing(missing)}{hint}; the mean needs {len(CORRUPTIONS)} corruptions "
            f"at {len(SEVERITIES)} severities: add them, or set allow_missing=true for the mean over what is there"
        )
    return parts


def count_images(parts: Sequence[DatasetPart]) -> list[Counter[str]]:
    """Return the number of images of each class in each of these parts of ImageNet-C; classes without images have none.

    Raises UserError if an image lies in no class folder, or a folder cannot be read.
    """
    counts = []
    for part in tqdm(parts, desc="listing ImageNet-C", unit="part", delay=2, leave=False):
        assert part.path is not None
        found: Counter[str] = Counter()
        try:
            for name in walk(part.path):
                if is_image(name):
                    folder, separator, _ = name.partition(os.sep)
                    if not separator:
                        raise UserError(
                            f"{part.key}: {part.path / name} lies in no class folder; expected <class>/<image>, as "
                            "published"
                        )
                    found[folder] += 1
        except OSError as error:
            raise UserError(
                f"{part.key}: {error.filename or part.path} cannot be read ({error.strerror}); change its permissions, "
                "or unpack it again"
            ) from error
        counts.append(found)
    return counts


def complete_parts(counts: Mapping[DatasetPart, Counter[str]], allow_missing: bool) -> list[DatasetPart]:
    """Return the parts of ImageNet-C, all of which have the same classes and the same number of images.

    With `allow_missing`, the others say what they lack, those without any image are left out, and warnings name both.

    Raises UserError about the first incomplete part unless `allow_missing`, or if no part has an image.
    """
    classes = set().union(*counts.values())
    total = max(found.total() for found in counts.values())
    parts: list[DatasetPart] = []
    problems: list[str] = []
    for part, found in counts.items():
        if problem := _describe_lack(found, classes, total):
            problems.append(f"{part.key}: {part.path} {problem}")
        if found:
            parts.append(replace(part, lacks=f"{found.total():,} of {total:,} images" if problem else ""))
    if problems and (not allow_missing or not parts):
        others = f" ({len(problems)} parts are incomplete)" if len(problems) > 1 else ""
        raise UserError(
            f"{problems[0]}{others}; add them, or set allow_missing=true to evaluate on the images of each part"
        )
    for problem in problems if rank() == 0 else ():
        log.warning("%s; evaluating on what there is", problem)
    return parts


def _describe_lack(found: Counter[str], classes: set[str], total: int) -> str:
    """Return what a part lacks that others have, "" if nothing: found images of these classes, so many in all."""
    if not found:
        return f"holds no image, and other parts have {total:,}"
    if absent := sorted(classes - found.keys()):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        return f"lacks images of class {absent[0]!r}{more}, which other parts have"
    return f"has {found.total():,} images, and other parts have {total:,}" if found.total() < total else ""


def format_missing(missing: Sequence[tuple[str, int]]) -> str:
    """Return a list of missing (corruption, severity) pairs as text: 'snow (all severities); frost 3, 5'."""
    severities: dict[str, list[int]] = {}
    for corruption, severity in missing:
        severities.setdefault(corruption, []).append(severity)
    absent = [f"{name} (all severities)" for name, levels in severities.items() if len(levels) == len(SEVERITIES)]
    incomplete = [
        f"{name} {', '.join(map(str, levels))}" for name, levels in severities.items() if len(levels) < len(SEVERITIES)
    ]
    return "; ".join(absent + incomplete)
