"""bench.json: what `addp bench` writes from its steps, and what the report reads."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

import addp_core
from addp_core.base.cpu import cpu_name, usable_cores
from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.tables import text_table
from addp_core.recipes.config import dump
from tools import doctor
from tools.bench.arms import Arm
from tools.bench.benchmark import Scores
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.metric import Metric
from tools.bench.paper import ENCODER_PARAMETERS
from tools.bench.recipe import BenchRecipe, PaperKeys
from tools.bench.step import LOG, STEP, Step

BENCH = "bench.json"
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "torch_fidelity", "pycocotools", "detectron2", "mmseg")

# -------------------- writing


def write_record(step: Step, **fields: Any) -> None:
    """Write a step's step.json."""
    step.folder.mkdir(parents=True, exist_ok=True)
    before = step.record()
    record = {"state": "missing", "error": "", "seconds": 0.0, "scores": {}, **fields, **step.about()}
    if record["state"] == "blocked":  # what is in the folder is still that of before
        record |= {key: before[key] for key in ("basis", "pretrainings", "seconds") if key in before}
    record |= {"finished": datetime.now(timezone.utc).isoformat(timespec="seconds"), "hardware": hardware()}
    write_atomically(step.folder / STEP, json.dumps(record, indent=1).encode())


def bench_content(recipe: BenchRecipe, arms: Sequence[Arm], steps: Sequence[Step]) -> dict[str, Any]:
    """Return the content of bench.json, from each step's step.json."""
    entries: list[dict[str, Any]] = []
    chance: dict[str, dict[str, float]] = {}
    machines: list[str] = []
    for step in steps:
        record = step.record()
        entry: dict[str, Any] = {"name": step.name, "benchmark": step.benchmark, "arm": step.arm.name}
        entry |= {"state": "missing", "error": "", "seconds": 0.0, "finished": ""}
        entry |= {"commands": step.lines, "folder": step.name}
        entry |= {"log": f"{step.name}/{LOG}", "setting": {}, "seeds": step.seeds, "scores": {}, "pictures": []}
        if step.left_out:
            entry |= {"state": "left out", "error": step.left_out}
        elif step.describes(record):
            internal = ("basis", "fingerprint", "pretrainings", "chance")
            entry |= {key: value for key, value in record.items() if key not in internal}
            if record["state"] not in ("done", "failed", "blocked"):
                entry["state"] = "missing"
            if record["state"] == "done":
                chance.setdefault(step.benchmark, {}).update(record["chance"])
                machines.append(record["hardware"])
        entries.append(entry)
    return {
        "recipe": dump(recipe),
        "versions": versions(),
        "hardware": "; ".join(dict.fromkeys(machines)) or hardware(),
        "arms": {arm.name: arm.about() for arm in arms},
        "steps": entries,
        "chance": chance,
    }


def summary_table(content: Mapping[str, Any]) -> str:
    """Return bench.json as a table for the terminal: a row for each arm and chance, a column for each score."""
    done = [step for step in content["steps"] if step["state"] == "done"]
    columns = list(dict.fromkeys((step["benchmark"], name) for step in done for name in step["scores"]))
    lines = [["", *(f"{benchmark} {name}" for benchmark, name in columns)]]
    for arm in content["arms"]:
        of_arm = {step["benchmark"]: step["scores"] for step in done if step["arm"] == arm}
        lines.append([arm, *(mean_and_sd(of_arm.get(benchmark, {}).get(name)) for benchmark, name in columns)])
    levels = [content["chance"].get(benchmark, {}).get(name) for benchmark, name in columns]
    lines.append(["chance", *("-" if level is None else f"{level:.2f}" for level in levels)])
    return text_table(lines, left_columns=0)


def mean_and_sd(values: Sequence[float] | None) -> str:
    """Return "mean ± standard deviation" of the seeds' values, "-" if there are none."""
    if not values:
        return "-"
    sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{sd}"


def versions() -> dict[str, str]:
    installed = {"addp": addp_core.__version__, "python": platform.python_version()}
    for module in PACKAGES:
        if version := doctor.installed_version(doctor.PACKAGES[module]):
            installed[module] = version
    return installed


def hardware() -> str:
    """Return the names of the GPUs or, without any, of the processor."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{name} x{names.count(name)}" for name in dict.fromkeys(names))
    return f"{cpu_name()}, {usable_cores()} cores"


# -------------------- reading


def read_results(out: Path, price_per_hour: float | None = None) -> "BenchResults":
    """Read the bench.json of a bench folder. Raises UserError if there is none, or if it cannot be understood."""
    path = out / BENCH
    try:
        return BenchResults(out, json.loads(path.read_text(encoding="utf-8")), price_per_hour)
    except OSError as error:
        raise UserError(f"out: {path}: {error.strerror}; expected the folder of an `addp bench`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"out: {path}: not as `addp bench` writes it ({error!r})") from error


class BenchResults:
    """The content of bench.json, and what follows from it.

    price_per_hour: of the machine; None: the one in the bench's recipe. random: the name of the arm with random
    weights, None if there is none.
    """

    def __init__(self, out: Path, content: Mapping[str, Any], price_per_hour: float | None):
        self.out = out
        self.arms: dict[str, dict[str, Any]] = content["arms"]
        self.steps: list[dict[str, Any]] = [{"scores": {}, "error": ""} | step for step in content["steps"]]
        included = [step for step in self.steps if step["state"] != "left out"]
        self._step = {(step["benchmark"], step["arm"]): step for step in included}
        self.chance: dict[str, dict[str, float]] = content.get("chance", {})
        self.versions: dict[str, str] = content.get("versions", {})
        self.hardware: str = content.get("hardware", "")
        self.recipe_text: str = content.get("recipe", "")
        self.recipe: dict[str, Any] = yaml.safe_load(self.recipe_text) or {}
        self.paper = PaperKeys(**self.recipe.get("paper") or {})
        self.price = self.recipe.get("price_per_hour") if price_per_hour is None else price_per_hour
        self.processes = int((self.recipe.get("bench") or {}).get("processes") or 1)
        self.random = next((name for name, arm in self.arms.items() if arm.get("init") == "random"), None)

    def step(self, benchmark: str, arm: str) -> dict[str, Any] | None:
        """Return an arm's step, None if the arm does not take part, as random weights do not in generation."""
        return self._step.get((benchmark, arm))

    def scores(self, benchmark: str, arm: str) -> Scores:
        """Return the scores of a step that is done, {} otherwise."""
        step = self.step(benchmark, arm)
        if step is None or step["state"] != "done":
            return {}
        return BENCHMARKS[benchmark].complete_scores(step["scores"])

    def values(self, benchmark: str, arm: str | None, metric: Metric) -> list[float]:
        """Return the values of the seeds that have one."""
        scores = self.scores(benchmark, arm).get(metric.key, []) if arm else []
        return [value for value in scores if value is not None]

    def included_benchmarks(self) -> list[str]:
        """Return the benchmarks with a step that is not left out, in the order of the report."""
        included = {benchmark for benchmark, _ in self._step}
        return [name for name in BENCHMARKS if name in included]

    def metrics(self, benchmark: str) -> list[Metric]:
        """Return the metrics that some arm has or, before anything is measured, the usual ones."""
        metrics = BENCHMARKS[benchmark].metrics
        measured = [metric for metric in metrics if any(self.values(benchmark, arm, metric) for arm in self.arms)]
        return measured or [metric for metric in metrics if not metric.optional]

    def chance_level(self, benchmark: str, metric: Metric) -> float | None:
        return BENCHMARKS[benchmark].complete_chance(self.chance.get(benchmark, {})).get(metric.key)

    def published_models(self, benchmark: str | None = None) -> list[str]:
        """Return the names of the rows with the paper's numbers: the arms of the recipe's section `paper` or, without
        one, the paper's models; with a benchmark, those that the paper has there.
        """
        if self.paper.arms:
            return [arm for arm, numbers in self.paper.arms.items() if benchmark is None or benchmark in numbers]
        return list(ENCODER_PARAMETERS if benchmark is None else BENCHMARKS[benchmark].published)

    def published(self, model: str, benchmark: str, metric: Metric) -> float | None:
        """Return the paper's value of a model, None if it has none or measured otherwise.

        A number in the recipe's section `paper` is also that of the metric which is measured in its place.
        """
        if self.paper.arms:
            return self.paper.arms.get(model, {}).get(benchmark, {}).get(metric.stands_for or metric.key)
        if not BENCHMARKS[benchmark].comparable(self.metrics(benchmark)):
            return None
        return BENCHMARKS[benchmark].published.get(model, {}).get(metric.key)

    def counterpart(self, arm: str) -> str | None:
        """Return the paper's model of an arm, by its name in the recipe's section `paper` or by its size; None if there
        is none, or if the data are not the paper's.
        """
        about = self.arms[arm]
        if self.paper.arms:
            return arm if arm in self.paper.arms and not self.unlike_paper() else None
        if about.get("init") == "random" or self.unlike_paper():
            return None
        parameters = about.get("parameters") or 0
        return next((model for model, size in ENCODER_PARAMETERS.items() if abs(parameters / size - 1) < 0.1), None)

    def unlike_paper(self) -> str:
        """Return why no number compares with the paper's, "" if nothing is against it."""
        data = {key: path for key, path in (self.recipe.get("data") or {}).items() if path}
        toys = [key for key, path in data.items() if (Path(path) / "toy.json").is_file()]
        if toys:
            return f"these are toy data ({', '.join(toys)}, by addp toy)"
        reasons = (each.unlike_paper(self.chance.get(name, {})) for name, each in BENCHMARKS.items())
        return next(filter(None, reasons), "")
