"""Robustness: the fine-tuned classifiers on ImageNet-A, -R, -Sketch and -C."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import ClassVar

from addp_core.base.errors import UserError
from addp_core.base.paths import expand_home
from tools.bench import sweep
from tools.bench.arguments import as_arguments, verb_recipe
from tools.bench.benchmark import Benchmark, Dataset, Outcome, Scores, Settings
from tools.bench.benchmarks.finetune import Finetune
from tools.bench.inputs import Inputs
from tools.bench.metric import Metric
from tools.bench.recipe import BenchRecipe
from tools.bench.step import Command, Step

METRIC_OF = {"imagenet_a": "a", "imagenet_r": "r", "sketch": "sketch", "imagenet_c": "c", "corrupt": "c_generated"}
AVERAGED = ("a", "r", "sketch", "c")


def check_variant(path: str, recipe: BenchRecipe, readers: Sequence[Benchmark]) -> None:
    from addp_core.data.sources import open_source

    open_source(path, recipe.section(Robustness.name).set.get("split", "val"))


def check_corruptions(path: str, recipe: BenchRecipe, readers: Sequence[Benchmark]) -> None:
    from cls.variants.datasets import find_imagenet_c

    allow_missing = bool(recipe.section(Robustness.name).set.get("allow_missing"))
    find_imagenet_c(expand_home(path), allow_missing)


class Robustness(Benchmark):
    name = "robustness"
    title = "Robustness"
    about = (
        "Top-1 in per cent of the fine-tuned classifiers on other images of their classes; of ImageNet-C, 1 - mCE. "
        "The average is the mean of the four."
    )
    task = "cls"
    builds_on = (Finetune.name,)
    datasets = (
        Dataset("imagenet_a", "ImageNet-A", check_variant),
        Dataset("imagenet_r", "ImageNet-R", check_variant),
        Dataset("sketch", "ImageNet-Sketch", check_variant),
        Dataset("imagenet_c", "ImageNet-C", check_corruptions),
    )
    metrics = (
        Metric("a", "A ↑"),
        Metric("r", "R ↑"),
        Metric("sketch", "Sketch ↑"),
        Metric("c", "C ↑"),
        Metric("c_generated", "C, generated ↑", optional=True),
        Metric("average", "average ↑"),
    )
    published: ClassVar = {"ADDP ViT-B": {"a": 35.2, "r": 54.4, "sketch": 40.9, "c": 57.3, "average": 47.0}}

    def seeds(self, recipe: BenchRecipe) -> list[int]:
        return recipe.section(self.name).seeds or recipe.seeds_of(Finetune.name)

    def missing_key(self, recipe: BenchRecipe) -> str:
        """One of the four is enough; `corrupt` makes a fifth from clean images."""
        settings = recipe.section(self.name).set
        return "" if self.paths(recipe) or "corrupt" in settings else f"data.{self.datasets[0].key}"

    def add_commands(
        self, step: Step, settings: Settings, paths: Mapping[str, str], recipe: BenchRecipe, inputs: Inputs
    ) -> None:
        finetuned_seeds = recipe.seeds_of(Finetune.name)
        if unknown := [seed for seed in step.seeds if seed not in finetuned_seeds]:
            raise UserError(f"robustness.seeds: found {unknown[0]}, expected seeds of finetune: {finetuned_seeds}")
        finetuned = f"{Finetune.name}/{step.arm.name}"
        step.needs.append(finetuned)
        for seed in step.seeds:
            model = sweep.best_run(step.out / finetuned / step.arm.name, seed)
            fixed = {"model": model, "out": step.folder / f"seed{seed}", **paths, **settings}
            step.commands.append(Command(["robustness", *as_arguments(fixed)], step.processes))
        self.set_basis(step, verb_recipe(step.commands[0].arguments, self.name))

    def read_outcome(self, step: Step) -> Outcome:
        runs = {seed: step.folder / f"seed{seed}" for seed in step.seeds}
        reports = [json.loads((run / "results.json").read_text("utf-8")) for run in runs.values()]
        scores: dict[str, list[float]] = {}
        chance: dict[str, float] = {}
        for report in reports:
            for row in report["rows"]:
                if metric := METRIC_OF.get(row["key"]):
                    scores.setdefault(metric, []).append(row["score"])
                    is_mce = metric in ("c", "c_generated")
                    chance[metric] = _chance_of_mce(row["classes"]) if is_mce else 100 / row["classes"]
            if report["average"] is not None:
                scores.setdefault("average", []).append(report["average"])
        if "average" in scores:
            chance["average"] = sum(chance[metric] for metric in scores if metric != "average") / (len(scores) - 1)
        return Outcome(setting={}, scores=scores, chance=chance, runs=runs)

    def complete_scores(self, scores: Scores) -> Scores:
        """Add the average of each seed if all four were measured."""
        if "average" in scores or not all(key in scores for key in AVERAGED):
            return scores
        of_seeds = zip(*(scores[key] for key in AVERAGED), strict=True)
        averages = [
            None if None in of_seed else statistics.mean(value for value in of_seed if value is not None)
            for of_seed in of_seeds
        ]
        return scores | {"average": averages}

    def complete_chance(self, chance: Mapping[str, float]) -> Mapping[str, float]:
        """Generated corruptions have the chance level of ImageNet-C's."""
        levels = dict(chance)
        if "c_generated" in levels:
            levels.setdefault("c", levels["c_generated"])
        if all(key in levels for key in AVERAGED):
            levels["average"] = statistics.mean(levels[key] for key in AVERAGED)
        return levels


def _chance_of_mce(classes: int) -> float:
    """Return 1 - mCE of guessing among so many classes, in per cent; its errors, too, are divided by AlexNet's."""
    from addp_core.data.corruptions import CORRUPTIONS
    from cls.variants.mce import corruption_errors

    guessing = {corruption: {1: 1 - 1 / classes} for corruption in CORRUPTIONS}
    errors = [each["ce"] for each in corruption_errors(guessing).values()]
    return 100 - sum(errors) / len(errors)
