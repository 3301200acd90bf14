"""Semantic segmentation on ADE20K."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tools.bench.benchmark import Benchmark, Dataset, Transfer
from tools.bench.metric import Metric
from tools.bench.recipe import BenchRecipe

if TYPE_CHECKING:  # `addp report` does without torch
    from addp_core.data.sources import ImageSource


def check_ade20k(path: str, recipe: BenchRecipe, readers: Sequence[Benchmark]) -> "ImageSource | None":
    if not readers:  # its packages may not be installed
        return None
    from addp_core.data.sources import ImageFiles
    from seg.scenes import find_pairs, read_class_names

    read_class_names(path, recipe.section(readers[0].name).set.get("data.classes", ""))
    find_pairs(path, "train")
    return ImageFiles(Path(), [str(pair.image) for pair in find_pairs(path, "val")])


ADE20K = Dataset("ade20k", "ADE20K's folder (ADEChallengeData2016): seg, seg_probe", check_ade20k)


class Segmentation(Transfer):
    name = "seg"
    title = "Segmentation"
    about = "mIoU in per cent of UperNet on ADE20K's format. Chance is the best map of one class everywhere."
    task = "seg"
    datasets = (ADE20K,)
    verb = "seg train"
    source = "data.source"
    predict = "seg predict"
    metrics = (Metric("miou", "mIoU ↑", result="mIoU", curve="mIoU"),)
    published: ClassVar = {
        "ADDP ViT-B": {"miou": 48.1},
        "ADDP ViT-L": {"miou": 54.3},
        "MAE ViT-B": {"miou": 48.1},
        "MAE ViT-L": {"miou": 53.6},
        "MAGE ViT-B": {"miou": 39.6},
        "MAGE ViT-L": {"miou": 43.1},
    }

    def chance_level(self, results: Mapping[str, Any]) -> float:
        return results["constant_mIoU"]
