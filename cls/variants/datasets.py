"""The datasets of `addp robustness`, and the parts of ImageNet-C that are on disk."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from addp_core.base.errors import UserError, did_you_mean
from addp_core.data.corruptions import CORRUPTIONS, SEVERITIES

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
