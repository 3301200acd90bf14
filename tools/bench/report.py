"""`addp report`: report.html, report.md and tables/ of an `addp bench` folder, finished or not, from its bench.json.

An arm is one checkpoint or baseline under comparison. The first table has a row for each arm, the chance level and, set
apart, the paper's numbers. A section for each benchmark follows, with its seeds, curves and images, and then what
everything took. The report measures nothing itself.
"""

import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.paths import METRICS_FILE
from addp_core.training.curves import Panel, draw, points, read_metrics
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.comparison import measured_difference
from tools.bench.costs import costs, provenance
from tools.bench.differences import against_the_paper, differing_settings, stand_ins
from tools.bench.document import (
    NONE,
    Block,
    Cell,
    Drawings,
    Heading,
    Images,
    Listing,
    Row,
    Table,
    Text,
    to_html,
    to_markdown,
)
from tools.bench.metric import Metric
from tools.bench.paper import SOURCE
from tools.bench.results import BenchResults, read_results
from tools.bench.tables import FOLDER as TABLES
from tools.bench.tables import write_tables
from tools.children import last_lines

log = logging.getLogger("addp")

HTML, MARKDOWN = "report.html", "report.md"
LOG_LINES = 25  # of a failed step
MAX_IMAGES = 24  # of a step


@dataclass
class Recipe:
    """Keys of `addp report`."""

    out: Annotated[str, "folder of `addp bench`; report.html, report.md and tables/ are written into it"]
    price_per_hour: Annotated[
        float | None, Ge(0), "price of an hour of the machine, in any currency; null: the bench's own"
    ] = None


def run(recipe: Recipe) -> None:
    """Write the report and log its path."""
    log.info("%s", write_report(Path(recipe.out), recipe.price_per_hour))


def write_report(out: Path, price_per_hour: float | None = None) -> Path:
    """Write report.html, report.md and the folder tables into the folder of a bench; return the path of report.html.

    Raises UserError if there is no bench.json, if it cannot be read, or if the folder cannot be written.
    """
    bench = read_results(out, price_per_hour)
    title, blocks = f"addp bench: {', '.join(bench.arms) or out.name}", list(_document(bench))
    try:
        write_atomically(out / MARKDOWN, to_markdown(title, blocks, out).encode())
        write_atomically(out / HTML, to_html(title, blocks).encode())
        write_tables(blocks, out / TABLES)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror})") from error
    return out / HTML


def _document(bench: BenchResults) -> Iterator[Block]:
    yield from _overview(bench)
    yield from differing_settings(bench)
    yield from against_the_paper(bench)
    yield from _failures(bench)
    yield from _scores_against_images_seen(bench)
    for benchmark in bench.included_benchmarks():
        yield from _benchmark_section(bench, benchmark)
    yield from _pretraining(bench)
    yield from costs(bench)
    yield from provenance(bench)


# -------------------- the first table


def _overview(bench: BenchResults) -> Iterator[Block]:
    counts = {state: sum(step["state"] == state for step in bench.steps) for state in ("done", "failed", "blocked")}
    total = sum(step["state"] != "left out" for step in bench.steps)
    newest = max((step.get("finished") or "" for step in bench.steps), default="")
    status = [f"{counts['done']} of {total} steps done"]
    status += [f"{count} {state}" for state, count in counts.items() if count and state != "done"]
    status += [f"last at {newest}"] if newest else []
    yield Text(f"{', '.join(status)}. {bench.hardware}".strip(), "warn" if counts["done"] < total else "")
    if counts["done"] + counts["failed"] + counts["blocked"] < total:
        yield Text("This bench is not finished; the same addp bench command continues it.")
    yield Heading("All benchmarks")
    if reason := bench.unlike_paper():
        yield Text(
            f"Not comparable with the paper: {reason}. The measured rows compare with each other, with random "
            "initialization under the same recipe, and with chance.",
            "warn",
        )
    yield _overview_table(bench)
    included = bench.included_benchmarks()
    left_out = [name for name, each in BENCHMARKS.items() if each.of_paper and name not in included]
    if left_out:
        titles = ", ".join(BENCHMARKS[name].title.lower() for name in left_out)
        yield Text(f"Left out, because no data are given or by choice: {titles}.")


def _overview_table(bench: BenchResults) -> Table:
    included = bench.included_benchmarks()
    columns = [(benchmark, metric) for benchmark in included for metric in bench.metrics(benchmark)]
    groups = [(BENCHMARKS[name].title, len(bench.metrics(name))) for name in included]
    rows = [
        Row([arm, *(_cell(bench, benchmark, arm, metric) for benchmark, metric in columns), *_about_arm(bench, arm)])
        for arm in bench.arms
    ]
    rows.append(Row(["chance", *(_chance(bench, *column) for column in columns), "", ""], "chance"))
    for model in bench.published_models():
        published = (_published(bench, model, benchmark, metric) for benchmark, metric in columns)
        rows.append(Row([f"paper: {model}", *published, "", ""], "paper"))
    caption = f"{_legend(bench)} {_about_paper_rows(bench, [metric for _, metric in columns])}"
    return Table(
        ["arm", *(metric.label for _, metric in columns), "encoder", "images seen"],
        rows,
        [("", 1), *groups, ("", 2)],
        f"{caption} They are of its data, sizes and budgets, not measured here.",
    )


def _about_paper_rows(bench: BenchResults, metrics: Sequence[Metric]) -> str:
    table = f"{bench.paper.table}, " if bench.paper.table else ""
    sentences = [f"Rows named paper: {table}{SOURCE}.", stand_ins(bench, [metric.key for metric in metrics])]
    return " ".join(filter(None, sentences))


def _legend(bench: BenchResults) -> str:
    legend = (
        "An arm is one checkpoint or baseline under comparison. Mean ± standard deviation over seeds. ↑: higher is "
        "better, ↓: lower is better."
    )
    if bench.random:
        legend += (
            f" Below or in brackets: the difference to {bench.random}; colored if it is more than twice its standard "
            "error, gray if it is less or there is only one seed."
        )
    return legend


def _about_arm(bench: BenchResults, arm: str) -> list[str]:
    """Return the cells of the columns "encoder" and "images seen"."""
    about = bench.arms[arm]
    parameters, seen = about.get("parameters") or 0, about.get("images_seen")
    size = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}" if parameters else NONE
    return [size, f"{seen:,}" if seen else NONE]


def _cell(bench: BenchResults, benchmark: str, arm: str, metric: Metric) -> Cell:
    step = bench.step(benchmark, arm)
    if step is None:
        return Cell(NONE)
    if step["state"] != "done":
        return Cell({"missing": "not yet"}.get(step["state"], step["state"]))
    values = bench.values(benchmark, arm, metric)
    if not values:
        return Cell(NONE)
    text = _mean_and_sd(values, metric)
    baseline = bench.values(benchmark, bench.random, metric) if arm != bench.random else []
    return Cell(text, *_difference(values, baseline, metric)) if baseline else Cell(text)


def _difference(values: Sequence[float], baseline: Sequence[float], metric: Metric) -> tuple[str, str]:
    """Return the difference of the means and its tone: good, bad, or "" within twice its standard error."""
    difference = measured_difference(values, baseline)
    tone = ""
    if difference.is_beyond_noise:
        tone = "good" if (difference.value > 0) != metric.lower_is_better else "bad"
    return f"{difference.value:+.{metric.digits}f}", tone


def _chance(bench: BenchResults, benchmark: str, metric: Metric) -> str:
    level = bench.chance_level(benchmark, metric)
    return "" if level is None else metric.format(level)


def _published(bench: BenchResults, model: str, benchmark: str, metric: Metric) -> str:
    value = bench.published(model, benchmark, metric)
    if value is None:
        return NONE
    return metric.format_published(value) if bench.paper.arms else metric.format(value)


# -------------------- failures


def _failures(bench: BenchResults) -> Iterator[Block]:
    unfinished = [step for step in bench.steps if step["state"] in ("failed", "blocked")]
    if not unfinished:
        return
    yield Heading("What failed")
    rows = [Row([step["name"], step["state"], step["error"] or NONE]) for step in unfinished]
    yield Table(["step", "state", "last line of its log"], rows, left_aligned=True)
    for step in unfinished:
        if step["state"] == "failed":
            path = step.get("log") or f"{step['name']}/log.txt"
            yield Listing(f"{step['name']}: the end of {path}", _end_of_log(bench.out / path), open=True)


def _end_of_log(path: Path) -> str:
    try:
        return last_lines(path, LOG_LINES)
    except OSError as error:
        return f"({path.name}: {error.strerror})"


# -------------------- a section for each benchmark


def _benchmark_section(bench: BenchResults, name: str) -> Iterator[Block]:
    metrics = bench.metrics(name)
    yield Heading(BENCHMARKS[name].title)
    yield Text(BENCHMARKS[name].about)
    yield _benchmark_table(bench, name, metrics)
    yield from _details(bench, name)
    yield from _evaluated_settings(bench, name, metrics)
    for arm in bench.arms:
        for note in (bench.step(name, arm) or {}).get("notes") or []:
            yield Text(f"{arm}: {note}", "warn")
    yield from _seeds(bench, name, metrics)
    yield from _grids(bench, name)
    yield from _curves(bench, name, metrics)
    yield from _images(bench, name)
    of_benchmark = [step for step in bench.steps if step["benchmark"] == name and step.get("commands")]
    if of_benchmark:
        commands = [line for step in of_benchmark for line in (f"# {step['name']}", *step["commands"])]
        yield Listing("Commands", "\n".join(commands))


def _benchmark_table(bench: BenchResults, name: str, metrics: Sequence[Metric]) -> Table:
    arms = {arm: step for arm in bench.arms if (step := bench.step(name, arm))}
    columns = {
        "against the paper": {arm: _against_paper(bench, name, arm) for arm in arms},
        "best setting": {arm: _setting(step) for arm, step in arms.items()},
    }
    columns = {head: column for head, column in columns.items() if set(column.values()) != {NONE}}
    empty = [""] * len(columns)
    rows = []
    for arm in arms:
        cells = [_cell(bench, name, arm, metric) for metric in metrics]
        rows.append(Row([arm, *cells, *(column[arm] for column in columns.values())]))
    if any(bench.chance_level(name, metric) is not None for metric in metrics):
        rows.append(Row(["chance", *(_chance(bench, name, metric) for metric in metrics), *empty], "chance"))
    for model in bench.published_models(name):
        published = [_published(bench, model, name, metric) for metric in metrics]
        if any(text != NONE for text in published):
            rows.append(Row([f"paper: {model}", *published, *empty], "paper"))
    caption = _about_paper_rows(bench, metrics) if rows[-1].kind == "paper" else ""
    return Table(["arm", *(metric.label for metric in metrics), *columns], rows, caption=caption)


def _against_paper(bench: BenchResults, benchmark: str, arm: str) -> str:
    """Return the differences to the paper's model of the same size, one for each metric that both have."""
    model = bench.counterpart(arm)
    if model is None:
        return NONE
    differences = []
    for metric in bench.metrics(benchmark):
        values, published = bench.values(benchmark, arm, metric), bench.published(model, benchmark, metric)
        if values and published is not None:
            difference = statistics.mean(values) - published
            differences.append(f"{metric.name} {difference:+.{metric.digits}f}")
    named = f" ({model})" if model != arm else ""
    return f"{', '.join(differences)}{named}" if differences else NONE


def _setting(step: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in (step.get("setting") or {}).items()) or NONE


def _details(bench: BenchResults, benchmark: str) -> Iterator[Block]:
    """How the arms were measured; the names of the arms are given where they differ."""
    arms_of: dict[str, list[str]] = {}
    for arm in bench.arms:
        for name, description in ((bench.step(benchmark, arm) or {}).get("details") or {}).items():
            arms_of.setdefault(f"{name}: {description}", []).append(arm)
    measured = max(map(len, arms_of.values()), default=0)
    for text, arms in arms_of.items():
        yield Text(f"{text[:1].upper()}{text[1:]}." if len(arms) == measured else f"{', '.join(arms)}: {text}.")


def _evaluated_settings(bench: BenchResults, benchmark: str, metrics: Sequence[Metric]) -> Iterator[Block]:
    """A table with a row for each setting of each arm, if one was evaluated with several."""
    rows = []
    for arm in bench.arms:
        evaluated = (bench.step(benchmark, arm) or {}).get("rows") or []
        if len(evaluated) < 2:
            continue
        common = set.intersection(*(set(row["setting"].items()) for row in evaluated))
        for row in evaluated:
            differing = {key: value for key, value in row["setting"].items() if (key, value) not in common}
            scores = (_mean_and_sd(row["scores"].get(metric.key), metric) for metric in metrics)
            rows.append(Row([arm, _setting({"setting": differing}), *scores]))
    if rows:
        yield Heading("Every sampling", 3)
        yield Table(["arm", "setting", *(metric.label for metric in metrics)], rows)


def _mean_and_sd(values: Sequence[float] | None, metric: Metric) -> str:
    if not values:
        return NONE
    text = metric.format(statistics.mean(values))
    return text + (f" ± {metric.format(statistics.stdev(values))}" if len(values) > 1 else "")


def _seeds(bench: BenchResults, benchmark: str, metrics: Sequence[Metric]) -> Iterator[Block]:
    """A table with a row for each seed of each arm."""
    rows = []
    for arm in bench.arms:
        scores = bench.scores(benchmark, arm)
        for i, seed in enumerate((bench.step(benchmark, arm) or {}).get("seeds") or []):
            values = [next(iter(scores.get(metric.key, [])[i : i + 1]), None) for metric in metrics]
            if any(value is not None for value in values):
                pairs = zip(metrics, values, strict=True)
                cells = [NONE if value is None else metric.format(value) for metric, value in pairs]
                rows.append(Row([arm, str(seed), *cells]))
    if rows:
        yield Heading("Each seed", 3)
        yield Table(["arm", "seed", *(metric.label for metric in metrics)], rows)


def _grids(bench: BenchResults, benchmark: str) -> Iterator[Block]:
    """The score of each run of the sweep, for the arms that tried more than one setting."""
    lines = []
    for arm in bench.arms:
        step = bench.step(benchmark, arm) or {}
        tried = step.get("grid") or {}
        if len(tried) > len(step.get("seeds") or []):
            lines += [f"{arm}  {name}  {NONE if score is None else f'{score:.4g}'}" for name, score in tried.items()]
    if lines:
        yield Listing("Every setting tried", "\n".join(lines))


def _curves(bench: BenchResults, benchmark: str, metrics: Sequence[Metric]) -> Iterator[Block]:
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for arm in bench.arms:
        folders = (bench.out / folder for folder in (bench.step(benchmark, arm) or {}).get("runs", {}).values())
        runs[arm] = [lines for folder in folders if (lines := read_metrics(folder / METRICS_FILE))]
    # the fast linear probe measures once per block of the encoder, not per step
    per_block = any("block" in line for of_arm in runs.values() for lines in of_arm for line in lines)
    x = "block" if per_block else "step"
    panels = []
    for metric in (Metric("loss", "training loss", curve="loss"), *(metric for metric in metrics if metric.curve)):
        curves = {}
        for arm, of_arm in runs.items():
            of_seeds = [points(lines, metric.curve, x) for lines in of_arm]
            curves[arm] = [[(at, metric.factor * value) for at, value in curve] for curve in of_seeds if curve]
        curves = {arm: seeds for arm, seeds in curves.items() if seeds}
        if any(len(curve) > 1 for seeds in curves.values() for curve in seeds):
            panels.append(Panel(metric.label, x, curves, markers=per_block))
    if panels:
        yield Heading("Curves of the best setting's runs", 3)
        yield _drawings(panels, list(bench.arms))


def _images(bench: BenchResults, benchmark: str) -> Iterator[Block]:
    for arm in bench.arms:
        files = (bench.step(benchmark, arm) or {}).get("pictures") or []
        if files:
            yield Heading(f"Images of {arm}", 3)
            yield Images([(bench.out / file, file) for file in files[:MAX_IMAGES]])
            if len(files) > MAX_IMAGES:
                yield Text(f"{len(files) - MAX_IMAGES} more are in the step's folder.")


# -------------------- pretraining


def _scores_against_images_seen(bench: BenchResults) -> Iterator[Block]:
    """A curve for each metric, if the pretrained arms differ in the images that they saw and not in architecture."""
    seen: dict[str, int] = {name: arm["images_seen"] for name, arm in bench.arms.items() if arm.get("images_seen")}
    sizes = {bench.arms[name].get("parameters") for name in seen}
    if len(set(seen.values())) < 2 or len(sizes) > 1:
        return
    order = sorted(seen, key=lambda name: seen[name])
    panels = []
    for benchmark in bench.included_benchmarks():
        for metric in bench.metrics(benchmark):
            scores = {arm: bench.values(benchmark, arm, metric) for arm in order}
            curve = [(float(seen[arm]), statistics.mean(values)) for arm, values in scores.items() if values]
            if len(curve) < 2:
                continue
            baseline, chance = bench.values(benchmark, bench.random, metric), bench.chance_level(benchmark, metric)
            levels = {"random": statistics.mean(baseline)} if baseline else {}
            levels |= {} if chance is None else {"chance": chance}
            title = f"{BENCHMARKS[benchmark].title}: {metric.label}"
            panels.append(Panel(title, "images seen in pretraining", {"pretrained": [curve]}, levels, markers=True))
    if panels:
        yield Heading("Scores against images seen")
        yield Text(f"Arms in order of the images seen in pretraining: {', '.join(order)}. Means over seeds.")
        yield _drawings(panels, ["pretrained"])


def _drawings(panels: Sequence[Panel], names: Sequence[str]) -> Drawings:
    return Drawings([(draw(panel, names), f"{panel.title} over {panel.x}") for panel in panels])


def _pretraining(bench: BenchResults) -> Iterator[Block]:
    """The loss of the arms that are pretraining runs; of a run of several stages, the last stage's."""
    folders = {name: Path(arm["run"]) for name, arm in bench.arms.items() if arm.get("run")}
    runs = {name: read_metrics(folder / METRICS_FILE) for name, folder in folders.items()}
    panels = []
    for x, label in (("step", "step"), ("images", "images seen")):
        curves = {name: [curve] for name, lines in runs.items() if len(curve := points(lines, "loss", x)) > 1}
        if curves:
            panels.append(Panel("pretraining loss", label, curves))
    if panels:
        yield Heading("Pretraining")
        yield _drawings(panels, list(bench.arms))
