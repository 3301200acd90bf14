"""`addp sweep`: the same verb from several starts, each with its own best setting of the same small grid, over seeds.

Every arm tries the whole grid with the first seed; its best setting is repeated with the other seeds, and the table
gives mean and standard deviation. Picking and reporting use the same validation images: fair between arms, optimistic
for all of them. Each cell is a run of its own in `out/<arm>/<setting>-seed<n>`; a second start repeats no finished one.
"""

import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen
from tqdm import tqdm

from addp_core.config import dump
from addp_core.errors import UserError, nearest
from addp_core.files import write_atomically
from addp_core.verbs import VERBS

log = logging.getLogger("addp")

Settings = dict[str, Any]
RESULTS, CELL = "results.json", "cell.json"


@dataclass
class Recipe:
    """Keys of `addp sweep`."""

    out: Annotated[str, "folder for the runs, sweep.json and sweep.md"]
    verb: Annotated[str, "a verb that writes results.json: finetune, linprobe, det train, seg train"]
    arms: Annotated[
        dict[str, Settings], MinLen(1), "name of a start -> its settings; {seed} in a value stands for the seed"
    ]
    recipe: Annotated[str, "recipe of the verb; empty: none"] = ""
    set: Annotated[Settings, "settings of all runs"] = field(default_factory=dict)
    grid: Annotated[dict[str, list[Any]], "key -> values to try, each with each"] = field(default_factory=dict)
    seeds: Annotated[list[int], MinLen(1), "values of `seed_key`; the first one tries the grid"] = field(
        default_factory=lambda: [0, 1, 2]
    )
    seed_key: Annotated[str, "key of the seed"] = "train.seed"
    metric: Annotated[str, "figure of results.json to pick by, larger is better; dots lead inwards"] = "last.top1"
    jobs: Annotated[int, Ge(1), "runs at a time"] = 1


@dataclass(frozen=True)
class Cell:
    """One run: an arm, a setting of the grid, a seed."""

    arm: str
    setting: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def name(self) -> str:
        words = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in self.setting]
        return f"{self.arm}/{','.join([*words, f'seed{self.seed}'])}"


def run(recipe: Recipe) -> None:
    """Run what is missing, then write and print the table. A run that fails is named and does not stop the others."""
    if recipe.verb not in VERBS:
        raise UserError(f"verb: found {recipe.verb!r}, expected a verb of addp{nearest(recipe.verb, VERBS)}")
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "recipe.yaml", dump(recipe).encode())
    settings = [tuple(zip(recipe.grid, values, strict=True)) for values in itertools.product(*recipe.grid.values())]
    first = [Cell(arm, setting, recipe.seeds[0]) for arm in recipe.arms for setting in settings]
    scores = _scores(recipe, first)
    best = {}
    for arm in recipe.arms:
        tried = {cell: score for cell, score in scores.items() if cell.arm == arm and score is not None}
        if tried:
            best[arm] = max(tried, key=tried.get).setting
    others = [Cell(arm, setting, seed) for seed in recipe.seeds[1:] for arm, setting in best.items()]
    scores |= _scores(recipe, others)
    summary = {}
    for arm, setting in best.items():
        values = [scores[Cell(arm, setting, seed)] for seed in recipe.seeds]
        values = [value for value in values if value is not None]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[arm] = {
            "setting": dict(setting),
            "values": values,
            "mean": statistics.mean(values),
            "sd": spread,
            "grid": {cell.name: score for cell, score in scores.items() if cell.arm == arm},
        }
    table = _table(recipe, summary)
    write_atomically(out / "sweep.json", json.dumps({"metric": recipe.metric, "arms": summary}, indent=1).encode())
    write_atomically(out / "sweep.md", table.encode())
    sys.stdout.write(table)
    failed = [cell.name for cell, score in scores.items() if score is None]
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed: {', '.join(failed)}; their log is {out}/<arm>/<run>/log.txt")


def _scores(recipe: Recipe, cells: list[Cell]) -> dict[Cell, float | None]:
    """The metric of each cell, None where its run failed."""
    with ThreadPoolExecutor(recipe.jobs) as pool, tqdm(total=len(cells), unit="run", disable=not cells) as bar:
        scores = {}
        for cell, score in zip(cells, pool.map(lambda cell: _score(recipe, cell), cells), strict=True):
            scores[cell] = score
            bar.update()
            log.info("%s: %s", cell.name, "failed" if score is None else f"{score:.2f}")
        return scores


def _score(recipe: Recipe, cell: Cell) -> float | None:
    folder = Path(recipe.out) / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    given = {**recipe.set, **recipe.arms[cell.arm], **dict(cell.setting), recipe.seed_key: cell.seed, "out": folder}
    words = [f"{key}={_word(value, cell.seed)}" for key, value in given.items()]
    command = [*recipe.verb.split(), *([recipe.recipe] if recipe.recipe else []), *words]
    note = folder / CELL
    if note.exists() and (kept := json.loads(note.read_text(encoding="utf-8")))["command"] == command:
        return kept["score"]
    with (folder / "log.txt").open("a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "addp_core", *command], stdout=file, stderr=file, env=dict(os.environ)
        )
    if done.returncode:
        return None
    score = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    for part in recipe.metric.split("."):
        if part not in score:
            raise UserError(f"metric: {folder / RESULTS} has no {part!r}; expected one of {', '.join(score)}")
        score = score[part]
    write_atomically(note, json.dumps({"command": command, "score": score}).encode())
    return score


def _word(value: Any, seed: int) -> str:
    """A value as the command line takes it."""
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else json.dumps(value, default=str)


def _table(recipe: Recipe, summary: dict[str, dict]) -> str:
    lines = [
        f"| start | best setting | {recipe.metric}, mean ± sd of {len(recipe.seeds)} seeds | each seed |",
        "|---|---|---|---|",
    ]
    for arm, row in summary.items():
        setting = ", ".join(f"{key}={value}" for key, value in row["setting"].items()) or "-"
        values = ", ".join(f"{value:.2f}" for value in row["values"])
        lines.append(f"| {arm} | {setting} | {row['mean']:.2f} ± {row['sd']:.2f} | {values} |")
    return "\n".join(lines) + "\n"
