"""Fine-tuning on ImageNet, with all labels or with a few of them."""

from collections.abc import Mapping
from typing import ClassVar

from tools.bench.benchmark import Settings, Transfer
from tools.bench.benchmarks.imagenet import IMAGENET, unlike_imagenet
from tools.bench.inputs import Inputs
from tools.bench.metric import Metric
from tools.bench.recipe import BenchRecipe
from tools.bench.step import Step


class Finetune(Transfer):
    name = "finetune"
    title = "Fine-tuning"
    about = "Top-1 in per cent on validation images after training the whole encoder on labeled ones."
    task = "cls"
    datasets = (IMAGENET,)
    needs_labels = True
    verb = "finetune"
    source = "data.source"
    metrics = (Metric("top1", "top-1 ↑", result="last.top1", curve="top1"),)
    published: ClassVar = {
        "ADDP ViT-B": {"top1": 83.9},
        "ADDP ViT-L": {"top1": 85.9},
        "MAE ViT-B": {"top1": 83.6},
        "MAE ViT-L": {"top1": 85.9},
        "MAGE ViT-B": {"top1": 82.5},
        "MAGE ViT-L": {"top1": 83.9},
        "ADDP ResNet-50": {"top1": 79.7},  # after 100 epochs; 80.9 after 300
    }

    def unlike_paper(self, chance: Mapping[str, float]) -> str:
        return unlike_imagenet(chance)


class FewLabels(Finetune):
    """Fine-tuning on a share of the labeled images, which the seed chooses; the paper has no numbers of it."""

    share: ClassVar[float]
    of_paper = False
    published: ClassVar = {}

    def add_commands(
        self, step: Step, settings: Settings, paths: Mapping[str, str], recipe: BenchRecipe, inputs: Inputs
    ) -> None:
        super().add_commands(step, {"label_share": self.share, **settings}, paths, recipe, inputs)


class FinetuneTenPercent(FewLabels):
    name = "finetune_10"
    title = "Fine-tuning, 10 % of the labels"
    about = "Top-1 in per cent on validation images after training the whole encoder on a tenth of the labeled images."
    share = 0.1


class FinetuneOnePercent(FewLabels):
    name = "finetune_1"
    title = "Fine-tuning, 1 % of the labels"
    about = (
        "Top-1 in per cent on validation images after training the whole encoder on a hundredth of the labeled images."
    )
    share = 0.01
