"""The last sections of the report of a bench: what everything took, and what it was made of."""

from collections.abc import Iterator, Mapping
from typing import Any

from addp_core.base.paths import RECIPE_FILE
from tools.bench.document import NONE, Block, Heading, Listing, Row, Table, Text
from tools.bench.results import BenchResults


def costs(bench: BenchResults) -> Iterator[Block]:
    """Yield the section on time and cost: a row for each pretraining and each step."""
    pretrained = [name for name, arm in bench.arms.items() if _has_pretraining_time(arm)]
    entries = [(f"pretraining of {name}", "", "", bench.arms[name]["seconds"], 1) for name in pretrained]
    for step in bench.steps:
        if step["state"] != "left out":
            seconds = step.get("seconds")
            entries.append((step["name"], step["state"], step.get("finished") or "", seconds, bench.processes))
    head = ["step", "time", "process hours", *(["price"] if bench.price else []), "state", "finished"]
    rows = []
    for name, state, finished, seconds, processes in entries:
        hours = None if seconds is None else seconds / 3600
        process_hours = None if hours is None else hours * processes
        rows.append(Row([name, *_time_and_price(hours, process_hours, bench), state, finished]))
    measured = [(seconds / 3600, processes) for *_, seconds, processes in entries if seconds is not None]
    total, process_total = sum(hours for hours, _ in measured), sum(hours * count for hours, count in measured)
    rows.append(Row(["all", *_time_and_price(total, process_total, bench), "", ""], "sum"))
    caption = f"Wall-clock time on {bench.hardware or 'an unknown machine'}; process hours are time x processes."
    if bench.processes > 1 and pretrained:
        caption += " Pretraining counts as one process: the number of its processes is not recorded."
    if bench.price:
        caption += f" Price at {bench.price:g} an hour of this machine."
    yield Heading("Time and cost")
    yield Table(head, rows, caption=caption)


def _has_pretraining_time(arm: Mapping[str, Any]) -> bool:
    return arm.get("init") != "random" and arm.get("seconds") is not None


def _time_and_price(hours: float | None, process_hours: float | None, bench: BenchResults) -> list[str]:
    """Return the cells of the columns "time", "process hours" and, if there is one, "price"."""
    if hours is None or process_hours is None:
        return [NONE] * (3 if bench.price else 2)
    minutes, seconds = divmod(round(hours * 3600), 60)
    clock = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    return [clock, f"{process_hours:.3f}", *([f"{hours * bench.price:.2f}"] if bench.price else [])]


def provenance(bench: BenchResults) -> Iterator[Block]:
    """Yield the section on what the bench was made of: arms, versions, hardware and recipe."""
    yield Heading("Recipe and versions")
    rows = [
        Row([name, arm.get("init") or NONE, str(arm.get("model") or NONE), str(arm.get("run") or NONE)])
        for name, arm in bench.arms.items()
    ]
    yield Table(["arm", "init", "model", "run"], rows, left_aligned=True)
    versions = [Row([name, str(version)]) for name, version in bench.versions.items()]
    yield Table(["package", "version"], versions, left_aligned=True)
    yield Text(f"Hardware: {bench.hardware or 'not recorded'}.")
    yield Listing(RECIPE_FILE, bench.recipe_text.rstrip("\n"))
