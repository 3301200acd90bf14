"""Unconditional generation: FID, IS, precision and recall of generated images, and a few holes filled."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tools.bench.arguments import as_arguments, verb_recipe
from tools.bench.arms import Arm
from tools.bench.benchmark import Benchmark, Outcome, Settings
from tools.bench.benchmarks.imagenet import IMAGENET
from tools.bench.inputs import Inputs
from tools.bench.metric import Metric
from tools.bench.recipe import BenchRecipe
from tools.bench.step import INPAINTED, Command, Step

GRID_IMAGES = 64  # generated images on the grid
INPAINTED_IMAGES = 3  # sample images with a hole to fill
MODEL_KEYS = ("tokenizer", "encoder_heads")  # of an arm's settings: those that its model needs here too
SHARED_SECTIONS = ("sampling", "tokenizer", "encoder_heads", "decoder_heads", "precision")  # of evaluate and inpaint
COLUMNS = {"fid": "fid", "fd": "fd", "is_mean": "is", "cs_mean": "cs", "precision": "precision", "recall": "recall"}


class Generation(Benchmark):
    name = "generation"
    title = "Generation"
    about = (
        "Unconditional images against validation images. FID and IS use Inception's features; FD and CS are the same "
        "formulas over the features of a classifier of this bench, and compare with nothing outside it. Of several "
        "samplings, the tables show the one with the lowest FID or FD; the paper does not say whether its numbers are "
        "of 20 cosine or of 256 linear steps."
    )
    task = "gen"
    packages = ("torch_fidelity",)
    datasets = (IMAGENET,)
    metrics = (
        Metric("fid", "FID ↓", lower_is_better=True),
        Metric("fd", "FD ↓", 2, lower_is_better=True, optional=True, stands_for="fid"),
        Metric("is", "IS ↑"),
        Metric("cs", "CS ↑", 2, optional=True, stands_for="is"),
        Metric("precision", "precision ↑", 2),
        Metric("recall", "recall ↑", 2),
    )
    published: ClassVar = {
        "ADDP ViT-B": {"fid": 8.9, "is": 95.3},
        "ADDP ViT-L": {"fid": 7.6, "is": 105.1, "precision": 0.74, "recall": 0.49},
        "MAGE ViT-B": {"fid": 11.0, "is": 95.4},
        "MAGE ViT-L": {"fid": 9.1, "is": 105.1},
        "ADDP ResNet-50": {"fid": 17.1, "is": 40.1},
    }

    def unsuitable(self, arm: Arm) -> str:
        if arm.init == "random":
            return "an encoder with random weights generates nothing"
        return "" if arm.generates else f"{arm.model} is no ADDP or MAGE checkpoint"

    def add_commands(
        self, step: Step, settings: Settings, paths: Mapping[str, str], recipe: BenchRecipe, inputs: Inputs
    ) -> None:
        settings = {key: value for key, value in step.arm.settings.items() if key in MODEL_KEYS} | dict(settings)
        for seed in step.seeds:
            fixed = {
                "model": step.arm.model_of(seed),
                "reference": paths["imagenet"],
                "out": step.folder / f"seed{seed}",
            }
            arguments = ["evaluate", *as_arguments(fixed | {"seed": seed} | settings)]
            step.commands.append(Command(arguments, step.processes))
        self.set_basis(step, verb_recipe(step.commands[0].arguments, self.name))
        shared = {key: value for key, value in settings.items() if key.split(".")[0] in SHARED_SECTIONS}
        for image in inputs.samples["imagenet"][:INPAINTED_IMAGES]:
            fixed = {"model": step.arm.model_of(step.seeds[0]), "image": image.path}
            fixed |= {"out": step.folder / INPAINTED / image.path.stem}
            fixed |= {"size": list(step.arm.image_size), "box": central_box(image.size), "n": 3}
            command = Command(["inpaint", *as_arguments(fixed | shared)])
            verb_recipe(command.arguments, self.name)
            step.commands.append(command)

    def read_outcome(self, step: Step) -> Outcome:
        """Return the sampling with the lowest FID or FD of the first seed and, if there are several, all of them."""
        from gen.image_folder import write_grid
        from gen.report import describe_precision_recall

        runs = {seed: step.folder / f"seed{seed}" for seed in step.seeds}
        reports: list[dict[str, Any]] = [
            json.loads((run / "evaluation.json").read_text("utf-8")) for run in runs.values()
        ]
        rows = list(zip(*(report["rows"] for report in reports), strict=True))  # of each sampling, one for each seed
        settings = [{f"sampling.{key}": value for key, value in row[0]["sampling"].items()} for row in rows]
        scores = [
            {metric: [each[key] for each in row] for key, metric in COLUMNS.items() if key in row[0]} for row in rows
        ]
        best = min(range(len(rows)), key=lambda i: rows[i][0]["fid" if "fid" in rows[i][0] else "fd"])
        images = next(iter(runs.values())) / rows[best][0]["name"]
        write_grid(images, min(rows[best][0]["images"], GRID_IMAGES))
        details = {"features": reports[0]["features"]}
        if described := describe_precision_recall(reports[0]):
            details["precision and recall"] = described
        return Outcome(
            setting=settings[best],
            scores=scores[best],
            chance={},
            runs=runs,
            images=[images / "grid.png", *sorted((step.folder / INPAINTED).glob("*/grid.png"))],
            rows=[{"setting": setting, "scores": each} for setting, each in zip(settings, scores, strict=True)],
            details=details,
        )

    def comparable(self, metrics: Sequence[Metric]) -> bool:
        """The paper's precision and recall use Inception's features, as its FID does."""
        return any(metric.key == "fid" for metric in metrics)


def central_box(size: tuple[int, int]) -> list[int]:
    """Return the box over the middle quarter of an image's central square: left, top, right, bottom."""
    width, height = size
    half = min(size) // 2
    left, top = (width - half) // 2, (height - half) // 2
    return [left, top, left + half, top + half]
