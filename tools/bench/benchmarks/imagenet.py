"""ImageNet, which generation, fine-tuning and linear probing read, and what tells its 1000 classes from other data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from addp_core.base.errors import UserError
from tools.bench.benchmark import Benchmark, Dataset
from tools.bench.recipe import BenchRecipe

if TYPE_CHECKING:  # `addp report` does without torch
    from addp_core.data.sources import ImageSource

CHANCE = 0.1  # per cent, of 1000 classes


def check_class_folders(path: str, recipe: BenchRecipe, readers: Sequence[Benchmark]) -> "ImageSource":
    """Open the validation images, which have to lie in class folders if a reader needs labels."""
    from addp_core.data.listing import FolderTree
    from addp_core.data.sources import explain_missing_classes, open_source
    from addp_core.data.splits import find_split_folder

    source = open_source(path, "val")
    if not source.classes and any(reader.needs_labels for reader in readers):
        raise UserError(f"data.source: {explain_missing_classes(source, path)}")
    root = Path(path)
    if root.is_dir() and not (root / "meta").is_dir() and not any(root.glob("*.tar")):
        folders = [find_split_folder(FolderTree(root), split, path) for split in ("train", "val")]
        if folders[0] == folders[1]:
            raise UserError(f"data.source: {path} has no train/ and val/; expected train/<class>/ and val/<class>/")
    return source


IMAGENET = Dataset(
    "imagenet",
    "train/<class>/ and val/<class>/: generation, finetune, finetune_10, finetune_1, linprobe, robustness",
    check_class_folders,
)


def unlike_imagenet(chance: Mapping[str, float]) -> str:
    """Return "" if top-1 has ImageNet's chance level or none, otherwise how many classes there are instead of 1000."""
    level = chance.get("top1")
    if level and abs(level - CHANCE) > 1e-6:
        return f"the labeled images have {100 / level:.0f} classes, ImageNet has 1000"
    return ""
