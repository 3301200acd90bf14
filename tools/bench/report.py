"""`addp report`: report.html and report.md of an `addp bench` folder, from its bench.json, finished or not.

The first table has a row for each arm (a start), the level of chance and, apart from them, the paper's numbers. Then
come a section for each benchmark with its seeds, curves and pictures, and what everything took. Nothing is measured.
"""

import json
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from tools.bench.children import ending
from tools.bench.curves import Panel, draw, points, read_metrics
from tools.bench.document import (
    Block,
    Cell,
    Drawings,
    Heading,
    Listing,
    Pictures,
    Row,
    Table,
    Text,
    to_html,
    to_markdown,
)
from tools.bench.paper import COUNTERPARTS, HEADLINE, PAPER, SOURCE

log = logging.getLogger("addp")

BENCH, HTML, MARKDOWN = "bench.json", "report.html", "report.md"
LOG_LINES = 25  # of a failed step
PICTURES = 24  # of a step
NONE = "-"
IMAGENET_CHANCE = 0.1  # per cent, of 1000 classes


@dataclass
class Recipe:
    """Keys of `addp report`."""

    out: Annotated[str, "folder of `addp bench`; report.html and report.md are written into it"]
    price_per_hour: Annotated[float | None, Ge(0), "of the machine, in any currency; null: the bench's own"] = None


@dataclass(frozen=True)
class Metric:
    """A figure of a benchmark, as bench.json names it."""

    key: str
    name: str
    digits: int = 1
    lower: bool = False  # the lower, the better
    rare: bool = False  # no column before it has been measured
    curve: str = ""  # its key in a run's metrics.jsonl, if that has it,
    factor: float = 1.0  # and what that is multiplied by


@dataclass(frozen=True)
class Benchmark:
    """A group of columns, and a section. others: rows of the paper beside ADDP's."""

    name: str
    about: str
    metrics: tuple[Metric, ...]
    others: tuple[str, ...] = ()


MAGE, MAE, RESNET = ("MAGE ViT-B", "MAGE ViT-L"), ("MAE ViT-B", "MAE ViT-L"), "ADDP ResNet-50"
BENCHMARKS = {
    "generation": Benchmark(
        "Generation",
        "Unconditional images against validation images. FID and IS see through Inception; FD and CS are the same "
        "formulas over the features of a classifier of this bench, and compare with nothing outside it.",
        (
            Metric("fid", "FID ↓", lower=True),
            Metric("fd", "FD ↓", 2, lower=True, rare=True),
            Metric("is", "IS ↑"),
            Metric("cs", "CS ↑", 2, rare=True),
            Metric("precision", "precision ↑", 2),
            Metric("recall", "recall ↑", 2),
        ),
        (*MAGE, RESNET),
    ),
    "finetune": Benchmark(
        "Fine-tuning",
        "Top-1 in per cent on validation images after training the whole encoder on labelled ones.",
        (Metric("top1", "top-1 ↑", curve="top1"),),
        (*MAE, *MAGE, RESNET),
    ),
    "linprobe": Benchmark(
        "Linear probe",
        "Top-1 in per cent of a linear layer on frozen features.",
        (Metric("top1", "top-1 ↑", curve="top1"),),
        MAE + MAGE,
    ),
    "robustness": Benchmark(
        "Robustness",
        "Top-1 in per cent of the fine-tuned classifiers on other images of their classes; of ImageNet-C, 1 - mCE. "
        "The average is the mean of the four.",
        (
            Metric("a", "A ↑"),
            Metric("r", "R ↑"),
            Metric("sketch", "Sketch ↑"),
            Metric("c", "C ↑"),
            Metric("c_generated", "C, generated ↑", rare=True),
            Metric("average", "average ↑"),
        ),
    ),
    "det": Benchmark(
        "Detection",
        "Average precision in per cent, over IoU from 0.5 to 0.95, of Mask R-CNN on COCO's format.",
        (
            Metric("box_ap", "box AP ↑", curve="box_AP", factor=100),
            Metric("mask_ap", "mask AP ↑", curve="mask_AP", factor=100),
        ),
        MAE + MAGE,
    ),
    "seg": Benchmark(
        "Segmentation",
        "mIoU in per cent of UperNet on ADE20K's format. Chance is the best map of one class everywhere.",
        (Metric("miou", "mIoU ↑", curve="mIoU"),),
        MAE + MAGE,
    ),
}
QUARTERS = ("a", "r", "sketch", "c")  # of the robustness average


def run(recipe: Recipe) -> None:
    """Write the report and name it."""
    log.info("%s", write_report(Path(recipe.out), recipe.price_per_hour))


def write_report(out: Path, price_per_hour: float | None = None) -> Path:
    """Writes report.html and report.md into the folder of a bench, from what its bench.json knows; returns the former.

    UserError: no bench.json there, one that cannot be read, or a folder that cannot be written.
    """
    path = out / BENCH
    try:
        bench = Bench(out, json.loads(path.read_text(encoding="utf-8")), price_per_hour)
    except OSError as error:
        raise UserError(f"out: {path}: {error.strerror}; expected the folder of an `addp bench`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"out: {path}: not as `addp bench` writes it ({error!r})") from error
    title, blocks = f"addp bench: {', '.join(bench.arms) or out.name}", list(_document(bench))
    try:
        write_atomically(out / MARKDOWN, to_markdown(title, blocks, out).encode())
        write_atomically(out / HTML, to_html(title, blocks).encode())
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror})") from error
    return out / HTML


class Bench:
    """What bench.json holds, with what follows from it."""

    def __init__(self, out: Path, content: Mapping[str, Any], price_per_hour: float | None):
        self.out = out
        self.arms: dict[str, dict[str, Any]] = content["arms"]
        self.steps: list[dict[str, Any]] = [{"scores": {}, "error": ""} | step for step in content["steps"]]
        taken = [step for step in self.steps if step["state"] != "left out"]
        self._step = {(step["benchmark"], step["arm"]): step for step in taken}
        self.chance: dict[str, dict[str, float]] = content.get("chance", {})
        self.versions: dict[str, str] = content.get("versions", {})
        self.hardware: str = content.get("hardware", "")
        self.recipe_text: str = content.get("recipe", "")
        self.recipe: dict[str, Any] = yaml.safe_load(self.recipe_text) or {}
        self.price = self.recipe.get("price_per_hour") if price_per_hour is None else price_per_hour
        self.processes = int((self.recipe.get("bench") or {}).get("processes") or 1)
        self.random = next((name for name, arm in self.arms.items() if arm.get("init") == "random"), None)

    def step(self, benchmark: str, arm: str) -> dict[str, Any] | None:
        """None: the arm does not take part, as random weights do not in generation."""
        return self._step.get((benchmark, arm))

    def scores(self, benchmark: str, arm: str) -> dict[str, list[float | None]]:
        """metric -> a value for each seed, None where its run failed. The robustness average is worked out here."""
        step = self.step(benchmark, arm)
        if step is None or step["state"] != "done":
            return {}
        found = dict(step["scores"])
        if benchmark == "robustness" and "average" not in found and all(key in found for key in QUARTERS):
            seeds = zip(*(found[key] for key in QUARTERS), strict=True)
            found["average"] = [None if None in seed else statistics.mean(seed) for seed in seeds]
        return found

    def values(self, benchmark: str, arm: str | None, metric: Metric) -> list[float]:
        """Of the seeds that have one."""
        found = self.scores(benchmark, arm).get(metric.key, []) if arm else []
        return [value for value in found if value is not None]

    def taking_part(self) -> list[str]:
        """Benchmarks with a step that is not left out, in the order of the report."""
        wanted = {benchmark for benchmark, _ in self._step}
        return [name for name in BENCHMARKS if name in wanted]

    def metrics(self, benchmark: str) -> list[Metric]:
        """Those that some arm has, or, before anything is measured, the usual ones."""
        known = BENCHMARKS[benchmark].metrics
        found = [metric for metric in known if any(self.values(benchmark, arm, metric) for arm in self.arms)]
        return found or [metric for metric in known if not metric.rare]

    def chance_of(self, benchmark: str, metric: Metric) -> float | None:
        """The score of one who does not look; of the robustness average where that of all four is known."""
        known = dict(self.chance.get(benchmark, {}))
        if "c_generated" in known:
            known.setdefault("c", known["c_generated"])
        if metric.key == "average" and all(key in known for key in QUARTERS):
            return statistics.mean(known[key] for key in QUARTERS)
        return known.get(metric.key)

    def counterpart(self, arm: str) -> str | None:
        """The paper's model that a pretrained arm is held against: of its size, where the data are the paper's."""
        about = self.arms[arm]
        if about.get("init") == "random" or self.unlike_paper():
            return None
        near = (name for name, size in COUNTERPARTS.items() if abs((about.get("parameters") or 0) / size - 1) < 0.1)
        return next(near, None)

    def unlike_paper(self) -> str:
        """Why no number compares with the paper's; "": nothing speaks against it."""
        data = {key: path for key, path in (self.recipe.get("data") or {}).items() if path}
        toys = [key for key, path in data.items() if (Path(path) / "toy.json").is_file()]
        if toys:
            return f"the data are toys ({', '.join(toys)}, by addp toy)"
        for benchmark in ("finetune", "linprobe"):
            chance = self.chance.get(benchmark, {}).get("top1")
            if chance and abs(chance - IMAGENET_CHANCE) > 1e-6:
                return f"the labelled images have {100 / chance:.0f} classes, ImageNet has 1000"
        return ""


def _document(bench: Bench) -> Iterator[Block]:
    yield from _overview(bench)
    yield from _failures(bench)
    yield from _against_images_seen(bench)
    for benchmark in bench.taking_part():
        yield from _section(bench, benchmark)
    yield from _pretraining(bench)
    yield from _costs(bench)
    yield from _provenance(bench)


# -------------------- the first table


def _overview(bench: Bench) -> Iterator[Block]:
    counts = {state: sum(step["state"] == state for step in bench.steps) for state in ("done", "failed", "blocked")}
    total = sum(step["state"] != "left out" for step in bench.steps)
    newest = max((step.get("finished") or "" for step in bench.steps), default="")
    words = [f"{counts['done']} of {total} steps done"]
    words += [f"{count} {state}" for state, count in counts.items() if count and state != "done"]
    words += [f"last at {newest}"] if newest else []
    yield Text(f"{', '.join(words)}. {bench.hardware}".strip(), "warn" if counts["done"] < total else "")
    if counts["done"] + counts["failed"] + counts["blocked"] < total:
        yield Text("This bench is not finished; the same addp bench command goes on where it stands.")
    yield Heading("All benchmarks")
    if why := bench.unlike_paper():
        yield Text(
            f"Not comparable with the paper: {why}. The measured rows compare with each other, with random "
            "initialisation under the same recipe, and with chance.",
            "warn",
        )
    columns = [(benchmark, metric) for benchmark in bench.taking_part() for metric in bench.metrics(benchmark)]
    groups = [
        ("", 1),
        *((BENCHMARKS[name].name, sum(b == name for b, _ in columns)) for name in bench.taking_part()),
        ("", 2),
    ]
    rows = [
        Row([arm, *(_cell(bench, benchmark, arm, metric) for benchmark, metric in columns), *_about_arm(bench, arm)])
        for arm in bench.arms
    ]
    rows.append(Row(["chance", *(_chance(bench, *column) for column in columns), "", ""], "chance"))
    for model in HEADLINE:
        published = (_published(bench, model, benchmark, metric) for benchmark, metric in columns)
        rows.append(Row([f"paper: {model}", *published, "", ""], "paper"))
    yield Table(
        ["start", *(metric.name for _, metric in columns), "encoder", "images seen"],
        rows,
        groups,
        _legend(bench) + f" Rows named paper: {SOURCE}; its data, sizes and budgets, not measured here.",
    )
    left_out = [name for name in BENCHMARKS if name not in bench.taking_part()]
    if left_out:
        names = ", ".join(BENCHMARKS[name].name.lower() for name in left_out)
        yield Text(f"Left out, for want of data or by choice: {names}.")


def _legend(bench: Bench) -> str:
    words = "Mean ± standard deviation over seeds. ↑: higher is better, ↓: lower."
    if bench.random:
        words += (
            f" Below or in brackets: the difference to {bench.random}; coloured where it is more than twice its "
            "standard error, grey where it is less or there is one seed."
        )
    return words


def _about_arm(bench: Bench, arm: str) -> list[str]:
    about = bench.arms[arm]
    parameters, seen = about.get("parameters"), about.get("images_seen")
    size = f"{parameters / 1e6:.1f} M" if (parameters or 0) >= 1e5 else f"{parameters:,}" if parameters else NONE
    return [size, f"{seen:,}" if seen else NONE]


def _cell(bench: Bench, benchmark: str, arm: str, metric: Metric) -> Cell:
    step = bench.step(benchmark, arm)
    if step is None:
        return Cell(NONE)
    if step["state"] != "done":
        return Cell({"missing": "not yet"}.get(step["state"], step["state"]))
    values = bench.values(benchmark, arm, metric)
    if not values:
        return Cell(NONE)
    text = _number(statistics.mean(values), metric)
    if len(values) > 1:
        text += f" ± {_number(statistics.stdev(values), metric)}"
    base = bench.values(benchmark, bench.random, metric) if arm != bench.random else []
    return Cell(text, *_difference(values, base, metric)) if base else Cell(text)


def _difference(values: Sequence[float], base: Sequence[float], metric: Metric) -> tuple[str, str]:
    """(difference of the means, good, bad or "" within twice its standard error)."""
    difference = statistics.mean(values) - statistics.mean(base)
    tone = ""
    if min(len(values), len(base)) > 1:
        error = (statistics.variance(values) / len(values) + statistics.variance(base) / len(base)) ** 0.5
        if abs(difference) > 2 * error:
            tone = "good" if (difference > 0) != metric.lower else "bad"
    return f"{difference:+.{metric.digits}f}", tone


def _number(value: float, metric: Metric) -> str:
    return f"{value:.{metric.digits}f}"


def _chance(bench: Bench, benchmark: str, metric: Metric) -> str:
    value = bench.chance_of(benchmark, metric)
    return "" if value is None else _number(value, metric)


def _published(bench: Bench, model: str, benchmark: str, metric: Metric) -> str:
    # the paper's precision and recall are of Inception's features, as its FID is
    if benchmark == "generation" and all(known.key != "fid" for known in bench.metrics(benchmark)):
        return NONE
    value = PAPER[model].get(benchmark, {}).get(metric.key)
    return NONE if value is None else _number(value, metric)


# -------------------- what went wrong


def _failures(bench: Bench) -> Iterator[Block]:
    wrong = [step for step in bench.steps if step["state"] in ("failed", "blocked")]
    if not wrong:
        return
    yield Heading("What failed")
    rows = [Row([step["name"], step["state"], step["error"] or NONE]) for step in wrong]
    yield Table(["step", "state", "last words"], rows, words=True)
    for step in wrong:
        if step["state"] == "failed":
            where = step.get("log") or f"{step['name']}/log.txt"
            yield Listing(f"{step['name']}: the end of {where}", _tail(bench.out / where), open=True)


def _tail(path: Path) -> str:
    try:
        return ending(path, LOG_LINES)
    except OSError as error:
        return f"({path.name}: {error.strerror})"


# -------------------- sections


def _against_images_seen(bench: Bench) -> Iterator[Block]:
    """A curve for each metric over the pretrained arms that differ in the images they saw, their architecture alike."""
    seen = {name: arm["images_seen"] for name, arm in bench.arms.items() if arm.get("images_seen")}
    sizes = {bench.arms[name].get("parameters") for name in seen}
    if len(set(seen.values())) < 2 or len(sizes) > 1:
        return
    order = sorted(seen, key=seen.get)
    panels = []
    for benchmark in bench.taking_part():
        for metric in bench.metrics(benchmark):
            scores = {arm: bench.values(benchmark, arm, metric) for arm in order}
            curve = [(float(seen[arm]), statistics.mean(values)) for arm, values in scores.items() if values]
            if len(curve) < 2:
                continue
            base, chance = bench.values(benchmark, bench.random, metric), bench.chance_of(benchmark, metric)
            levels = {"random": statistics.mean(base)} if base else {}
            levels |= {} if chance is None else {"chance": chance}
            title = f"{BENCHMARKS[benchmark].name}: {metric.name}"
            panels.append(Panel(title, "images seen in pretraining", {"pretrained": [curve]}, levels, marked=True))
    if panels:
        yield Heading("Scores against images seen")
        yield Text(f"Arms by what they saw in pretraining: {', '.join(order)}. Means over seeds.")
        yield _drawings(panels, ["pretrained"])


def _drawings(panels: Sequence[Panel], names: Sequence[str]) -> Drawings:
    return Drawings([(draw(panel, names), f"{panel.title} over {panel.x}") for panel in panels])


def _section(bench: Bench, benchmark: str) -> Iterator[Block]:
    about, metrics = BENCHMARKS[benchmark], bench.metrics(benchmark)
    yield Heading(about.name)
    yield Text(about.about)
    arms = {arm: step for arm in bench.arms if (step := bench.step(benchmark, arm))}
    words = {  # a column where some arm has something to say
        "against the paper": {arm: _against_paper(bench, benchmark, arm) for arm in arms},
        "best setting": {arm: _setting(step) for arm, step in arms.items()},
    }
    words = {name: column for name, column in words.items() if set(column.values()) != {NONE}}
    blank = [""] * len(words)
    rows = []
    for arm in arms:
        cells = [_cell(bench, benchmark, arm, metric) for metric in metrics]
        rows.append(Row([arm, *cells, *(column[arm] for column in words.values())]))
    if any(bench.chance_of(benchmark, metric) is not None for metric in metrics):
        rows.append(Row(["chance", *(_chance(bench, benchmark, metric) for metric in metrics), *blank], "chance"))
    for model in (*HEADLINE, *about.others):
        published = [_published(bench, model, benchmark, metric) for metric in metrics]
        if any(text != NONE for text in published):
            rows.append(Row([f"paper: {model}", *published, *blank], "paper"))
    head = ["start", *(metric.name for metric in metrics), *words]
    yield Table(head, rows, caption=f"Rows named paper: {SOURCE}." if rows[-1].kind == "paper" else "")
    for arm, step in arms.items():
        for note in step.get("notes") or []:
            yield Text(f"{arm}: {note}", "warn")
    yield from _each_seed(bench, benchmark, metrics)
    yield from _each_setting(bench, benchmark)
    yield from _curves(bench, benchmark, metrics)
    yield from _pictures(bench, benchmark)
    commands = [line for step in bench.steps if step["benchmark"] == benchmark for line in _commands(step)]
    if commands:
        yield Listing("Commands", "\n".join(commands))


def _against_paper(bench: Bench, benchmark: str, arm: str) -> str:
    """The differences to the paper's model of the same size, one for each metric that both have."""
    model = bench.counterpart(arm)
    differences = []
    for metric in bench.metrics(benchmark) if model else ():
        values, theirs = bench.values(benchmark, arm, metric), _published(bench, model, benchmark, metric)
        if values and theirs != NONE:
            difference = statistics.mean(values) - PAPER[model][benchmark][metric.key]
            differences.append(f"{metric.name.rstrip(' ↑↓')} {difference:+.{metric.digits}f}")
    return f"{', '.join(differences)} ({model})" if differences else NONE


def _setting(step: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in (step.get("setting") or {}).items()) or NONE


def _commands(step: Mapping[str, Any]) -> list[str]:
    return [f"# {step['name']}", *step["commands"]] if step.get("commands") else []


def _each_seed(bench: Bench, benchmark: str, metrics: Sequence[Metric]) -> Iterator[Block]:
    rows = []
    for arm in bench.arms:
        scores = bench.scores(benchmark, arm)
        for i, seed in enumerate((bench.step(benchmark, arm) or {}).get("seeds") or []):
            values = [scores.get(metric.key, [])[i : i + 1] for metric in metrics]
            if any(value and value[0] is not None for value in values):
                shown = zip(values, metrics, strict=True)
                cells = [_number(value[0], m) if value and value[0] is not None else NONE for value, m in shown]
                rows.append(Row([arm, str(seed), *cells]))
    if rows:
        yield Heading("Each seed", 3)
        yield Table(["start", "seed", *(metric.name for metric in metrics)], rows)


def _each_setting(bench: Bench, benchmark: str) -> Iterator[Block]:
    """What the small sweep found, of arms that tried more than one setting."""
    lines = []
    for arm in bench.arms:
        step = bench.step(benchmark, arm) or {}
        tried = step.get("grid") or {}
        if len(tried) > len(step.get("seeds") or []):
            lines += [f"{arm}  {name}  {NONE if score is None else f'{score:.4g}'}" for name, score in tried.items()]
    if lines:
        yield Listing("Every setting tried", "\n".join(lines))


def _curves(bench: Bench, benchmark: str, metrics: Sequence[Metric]) -> Iterator[Block]:
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for arm in bench.arms:
        folders = (bench.out / folder for folder in (bench.step(benchmark, arm) or {}).get("runs", {}).values())
        runs[arm] = [lines for folder in folders if (lines := read_metrics(folder / "metrics.jsonl"))]
    # the fast linear probe measures blocks, not steps
    blocks = any("block" in line for of_arm in runs.values() for lines in of_arm for line in lines)
    x = "block" if blocks else "step"
    panels = []
    for metric in (Metric("loss", "training loss", curve="loss"), *(metric for metric in metrics if metric.curve)):
        curves = {}
        for arm, of_arm in runs.items():
            found = [points(lines, metric.curve, x) for lines in of_arm]
            curves[arm] = [[(at, metric.factor * value) for at, value in curve] for curve in found if curve]
        curves = {arm: seeds for arm, seeds in curves.items() if seeds}
        if any(len(curve) > 1 for seeds in curves.values() for curve in seeds):
            panels.append(Panel(metric.name, x, curves, marked=blocks))
    if panels:
        yield Heading("Curves of the best setting's runs", 3)
        yield _drawings(panels, list(bench.arms))


def _pictures(bench: Bench, benchmark: str) -> Iterator[Block]:
    for arm in bench.arms:
        files = (bench.step(benchmark, arm) or {}).get("pictures") or []
        if files:
            yield Heading(f"Pictures of {arm}", 3)
            yield Pictures([(bench.out / file, file) for file in files[:PICTURES]])
            if len(files) > PICTURES:
                yield Text(f"{len(files) - PICTURES} more lie in the step's folder.")


def _pretraining(bench: Bench) -> Iterator[Block]:
    """The loss of the arms that are runs; an arm of several stages has a curve of its last one."""
    folders = {name: Path(arm["run"]) for name, arm in bench.arms.items() if arm.get("run")}
    runs = {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}
    panels = []
    for x, label in (("step", "step"), ("images", "images seen")):
        curves = {name: [curve] for name, lines in runs.items() if len(curve := points(lines, "loss", x)) > 1}
        if curves:
            panels.append(Panel("pretraining loss", label, curves))
    if panels:
        yield Heading("Pretraining")
        yield _drawings(panels, list(bench.arms))


# -------------------- time, cost, recipe


def _costs(bench: Bench) -> Iterator[Block]:
    spent = [(f"pretraining of {name}", "", "", arm["seconds"], 1) for name, arm in bench.arms.items() if _trained(arm)]
    for step in bench.steps:
        if step["state"] != "left out":
            seconds = step.get("seconds")
            spent.append((step["name"], step["state"], step.get("finished") or "", seconds, bench.processes))
    head = ["step", "time", "process hours", *(["price"] if bench.price else []), "state", "finished"]
    rows = []
    for name, state, finished, seconds, processes in spent:
        hours = None if seconds is None else seconds / 3600
        figures = _spent(hours, None if hours is None else hours * processes, bench)
        rows.append(Row([name, *figures, state, finished]))
    known = [(seconds / 3600, processes) for *_, seconds, processes in spent if seconds is not None]
    total, shared = sum(hours for hours, _ in known), sum(hours * processes for hours, processes in known)
    rows.append(Row(["all", *_spent(total, shared, bench), "", ""], "sum"))
    caption = f"Wall-clock time on {bench.hardware or 'a machine of unknown make'}; process hours are time x processes."
    if bench.processes > 1 and any(map(_trained, bench.arms.values())):
        caption += " Pretraining counts as one process: the number of its processes is not kept."
    if bench.price:
        caption += f" Price at {bench.price:g} an hour of this machine."
    yield Heading("Time and cost")
    yield Table(head, rows, caption=caption)


def _trained(arm: Mapping[str, Any]) -> bool:
    return arm.get("init") != "random" and arm.get("seconds") is not None


def _spent(hours: float | None, shared: float | None, bench: Bench) -> list[str]:
    if hours is None or shared is None:
        return [NONE] * (3 if bench.price else 2)
    minutes, seconds = divmod(round(hours * 3600), 60)
    clock = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    return [clock, f"{shared:.3f}", *([f"{hours * bench.price:.2f}"] if bench.price else [])]


def _provenance(bench: Bench) -> Iterator[Block]:
    yield Heading("Recipe and versions")
    rows = [
        Row([name, arm.get("init") or NONE, str(arm.get("model") or NONE), str(arm.get("run") or NONE)])
        for name, arm in bench.arms.items()
    ]
    yield Table(["start", "init", "model", "run"], rows, words=True)
    versions = [Row([name, str(version)]) for name, version in bench.versions.items()]
    yield Table(["package", "version"], versions, words=True)
    yield Text(f"Hardware: {bench.hardware or 'not recorded'}.")
    yield Listing("recipe.yaml", bench.recipe_text.rstrip("\n"))
