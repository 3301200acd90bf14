"""Detection on COCO."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tools.bench.benchmark import Benchmark, Dataset, Transfer
from tools.bench.metric import Metric
from tools.bench.recipe import BenchRecipe
from tools.bench.step import Step

if TYPE_CHECKING:  # `addp report` does without torch
    from addp_core.data.sources import ImageSource


def check_coco(path: str, recipe: BenchRecipe, readers: Sequence[Benchmark]) -> "ImageSource | None":
    if not readers:  # its package may not be installed
        return None
    from det.coco import locate_coco, open_coco
    from det.config import CocoFiles

    settings = recipe.section(Detection.name).set
    data_settings = {key.removeprefix("data."): value for key, value in settings.items() if key.startswith("data.")}
    file_settings = {key: value for key, value in data_settings.items() if key in vars(CocoFiles())}
    files = CocoFiles(**{"root": path} | file_settings)
    locate_coco(files, "train")  # only located: reading hundreds of megabytes is left to the training
    return open_coco(files, "val")


class Detection(Transfer):
    name = "det"
    title = "Detection"
    about = "Average precision in per cent, over IoU from 0.5 to 0.95, of Mask R-CNN on COCO's format."
    task = "det"
    datasets = (Dataset("coco", "COCO's folder: det", check_coco),)
    verb = "det train"
    source = "data.root"
    predict = "det predict"
    # weak detectors have no higher scores, and a few detections show what good ones do
    predict_settings: ClassVar = {"score": 0.1, "most": 8}
    metrics = (
        Metric("box_ap", "box AP ↑", result="box_AP", curve="box_AP", factor=100),
        Metric("mask_ap", "mask AP ↑", result="mask_AP", curve="mask_AP", factor=100),
    )
    published: ClassVar = {
        "ADDP ViT-B": {"box_ap": 51.7, "mask_ap": 45.8},
        "ADDP ViT-L": {"box_ap": 54.6, "mask_ap": 48.2},
        "MAE ViT-B": {"box_ap": 51.6, "mask_ap": 45.9},
        "MAE ViT-L": {"box_ap": 55.6, "mask_ap": 49.2},
        "MAGE ViT-B": {"box_ap": 36.3, "mask_ap": 31.3},
        "MAGE ViT-L": {"box_ap": 31.4, "mask_ap": 27.6},
    }

    def measured_metrics(self, step: Step, results: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """Return the metrics of boxes, and those of masks unless the dataset has boxes alone."""
        return [
            metric for metric in step.metrics if metric.key != "mask_ap" or all(metric.result in r for r in results)
        ]

    def chance_level(self, results: Mapping[str, Any]) -> float:
        return 0.0
