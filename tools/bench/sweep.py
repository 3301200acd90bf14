"""`addp sweep`: the same verb from several starts, each with its own best setting of the same small grid, over seeds.

Every arm tries the whole grid with the first seed; its best setting is repeated with the other seeds, and the table
gives mean and standard deviation. Picking and reporting use the same validation images: fair between arms, optimistic
for all of them. Each cell is a run of its own in `out/<arm>/<setting>-seed<n>`; a second start repeats no finished one.
The links `out/<arm>/best-seed<n>` lead to the runs of the best setting. A setting that fails, as a rate at which
training diverges, is named and left out; the sweep fails where an arm has no setting left or lacks a seed of its best.
"""

import itertools
import json
import logging
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen
from tqdm import tqdm

from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.files import write_atomically
from addp_core.recipes.config import dump
from addp_core.recipes.verbs import VERBS
from tools.bench.children import Children, Stopped, ending

log = logging.getLogger("addp")

Settings = dict[str, Any]
RESULTS, METRICS, FINISHED, CELL = "results.json", "metrics.jsonl", "finished.json", "cell.json"
ENDING = 8  # lines of a failed run's log that are shown
SHOWN = 3  # logs of failed runs that the last line names
PATIENCE = 600  # seconds that a run which was told to stop may take to leave its folder


@dataclass
class Recipe:
    """Keys of `addp sweep`."""

    out: Annotated[str, "folder for the runs, sweep.json and sweep.md"]
    verb: Annotated[str, "a training that ends with figures: finetune, linprobe, det train, seg train"]
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
    metric: Annotated[
        str,
        "figure to pick by, larger is better: of results.json (dots lead inwards), or of the last line of "
        "metrics.jsonl where there is none (det: box_AP, seg: mIoU)",
    ] = "last.top1"
    jobs: Annotated[int, Ge(1), "runs at a time"] = 1
    processes: Annotated[int, Ge(1), "of each run, by torchrun"] = 1


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
    """Run what is missing, then write and print the table. A run that fails is named and does not stop the others.

    Leaves with 1 where the table lacks an arm or a seed, or a signal stopped it.
    """
    if recipe.verb not in VERBS:
        raise UserError(f"verb: found {recipe.verb!r}, expected a verb of addp{did_you_mean(recipe.verb, VERBS)}")
    out = Path(recipe.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "recipe.yaml", dump(recipe).encode())
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); choose another folder") from error
    settings = [tuple(zip(recipe.grid, values, strict=True)) for values in itertools.product(*recipe.grid.values())]
    first = [Cell(arm, setting, recipe.seeds[0]) for arm in recipe.arms for setting in settings]
    best = {}
    try:
        with Children() as children:
            scores = _scores(recipe, first, children)
            for arm in recipe.arms:
                tried = {cell: score for cell, score in scores.items() if cell.arm == arm and score is not None}
                if tried:
                    best[arm] = max(tried, key=tried.get).setting
            others = [Cell(arm, setting, seed) for seed in recipe.seeds[1:] for arm, setting in best.items()]
            scores |= _scores(recipe, others, children)
    except Stopped:
        log.warning("stopped; the same command continues")
        raise SystemExit(1) from None
    for arm, setting in best.items():
        _link([cell for cell in (Cell(arm, setting, seed) for seed in recipe.seeds) if scores[cell] is not None], out)
    failed = [cell for cell, score in scores.items() if score is None]
    summary = {}
    for arm, setting in best.items():
        values = [scores[Cell(arm, setting, seed)] for seed in recipe.seeds]
        values = [value for value in values if value is not None]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        others = [cell for cell in failed if cell.arm == arm and cell.setting != setting]
        summary[arm] = {
            "setting": dict(setting),
            "values": values,
            "mean": statistics.mean(values),
            "sd": spread,
            "grid": {cell.name: score for cell, score in scores.items() if cell.arm == arm},
            "notes": [*_edges(recipe, setting), *(f"left out, for it failed: {_log(out, cell)}" for cell in others)],
        }
    table = _table(recipe, summary)
    notes = "".join(f"\n{arm}: {note}\n" for arm, row in summary.items() for note in row["notes"])
    write_atomically(out / "sweep.json", json.dumps({"metric": recipe.metric, "arms": summary}, indent=1).encode())
    write_atomically(out / "sweep.md", f"{table}{notes}".encode())
    sys.stdout.write(table)
    for arm, row in summary.items():
        for note in row["notes"]:
            log.warning("%s: %s", arm, note)
    if lacking := [cell for cell in failed if best.get(cell.arm, cell.setting) == cell.setting]:
        logs = [_log(out, cell) for cell in lacking]
        more = f" and {len(logs) - SHOWN} more" if len(logs) > SHOWN else ""
        named = f"{', '.join(map(str, logs[:SHOWN]))}{more}; the first says: {ending(logs[0])}"
        log.error("%d of %d runs failed: %s", len(lacking), len(scores), named)
        raise SystemExit(1)


def _edges(recipe: Recipe, setting: tuple[tuple[str, Any], ...]) -> list[str]:
    """Of a best setting: the numbers that are the first or last of three or more."""
    found = []
    for key, value in setting:
        values = recipe.grid[key]
        if all(type(each) in (int, float) for each in values) and len(set(values)) > 2:
            for name, end in (("smallest", min(values)), ("largest", max(values))):
                if value == end:
                    found.append(f"{key}: {value:g} is the {name} of the grid; a wider one may find better")
    return found


def _scores(recipe: Recipe, cells: list[Cell], children: Children) -> dict[Cell, float | None]:
    """The metric of each cell, None where its run failed."""
    with ThreadPoolExecutor(recipe.jobs) as pool, tqdm(total=len(cells), unit="run", disable=not cells) as bar:
        scores = {}
        found = pool.map(lambda cell: _score(recipe, cell, children), cells)
        for cell, score in zip(cells, found, strict=True):
            scores[cell] = score
            bar.update()
            if score is not None:
                log.info("%s: %.4g", cell.name, score)
        return scores


def _score(recipe: Recipe, cell: Cell, children: Children) -> float | None:
    folder = Path(recipe.out) / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    given = {**recipe.set, **recipe.arms[cell.arm], **dict(cell.setting), recipe.seed_key: cell.seed, "out": folder}
    words = [f"{key}={word(value, cell.seed)}" for key, value in given.items()]
    command = [*recipe.verb.split(), *([recipe.recipe] if recipe.recipe else []), *words]
    note = folder / CELL
    task = {"command": command, "metric": recipe.metric}
    if note.exists() and (kept := json.loads(note.read_text(encoding="utf-8"))) | task == kept:
        return kept["score"]
    _wait_until_free(folder, children)
    # a training that a signal has stopped leaves with 0, and perhaps with figures of the middle
    output = _log(Path(recipe.out), cell)
    if (code := children.addp(command, output, recipe.processes)) or not (folder / FINISHED).exists():
        how = f"failed (signal {-code})" if code < 0 else "failed"
        log.warning("%s: %s; the end of %s:\n%s", cell.name, how, output, ending(output, ENDING))
        return None
    score = figures(folder)
    for part in recipe.metric.split("."):
        if part not in score:
            raise UserError(f"metric: {folder} has no {part!r}; expected one of {', '.join(score)}")
        score = score[part]
    write_atomically(note, json.dumps({**task, "score": score}).encode())
    return score


def _wait_until_free(folder: Path, children: Children) -> None:
    """Where the sweep before was killed, its training ends with the step it is at, and leaves a checkpoint."""
    if not (folder / ".lock").exists():
        return
    from addp_core.training.run_folder import lock, release_out  # torch

    for second in range(PATIENCE):
        try:
            lock(folder)
        except UserError as error:
            if second == 0:
                log.info("waiting: %s", error)
            children.pause(1)
        else:
            release_out(folder)
            return


def _log(out: Path, cell: Cell) -> Path:
    return out / cell.name / "log.txt"


def figures(run: Path) -> dict[str, Any]:
    """What a finished training was found to be worth: its results.json, or the last line of its metrics.jsonl."""
    if (run / RESULTS).exists():
        return json.loads((run / RESULTS).read_text(encoding="utf-8"))
    return json.loads((run / METRICS).read_text(encoding="utf-8").splitlines()[-1])


def best_run(arm: Path, seed: int) -> Path:
    """The link in an arm's folder to its best setting's run with this seed."""
    return arm / f"best-seed{seed}"


def _link(cells: list[Cell], out: Path) -> None:
    """Links to the runs of an arm's best setting, in place of those to what was best before."""
    arm = out / cells[0].arm
    for stale in arm.glob("best-seed*"):
        stale.unlink()
    for cell in cells:
        best_run(arm, cell.seed).symlink_to(Path(cell.name).name, target_is_directory=True)


def word(value: Any, seed: int) -> str:
    """A value as the command line takes it."""
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else json.dumps(value, default=str)


def _table(recipe: Recipe, summary: dict[str, dict]) -> str:
    counts = sorted({len(row["values"]) for row in summary.values()}) or [len(recipe.seeds)]
    seeds = f"{' or '.join(map(str, counts))} seed{'s' if counts != [1] else ''}"
    lines = [
        f"| start | best setting | {recipe.metric}, mean ± sd of {seeds} | each seed |",
        "|---|---|---|---|",
    ]
    # a share of one, as AP, has its figures behind the point
    digits = 2 if any(abs(value) > 1 for row in summary.values() for value in row["values"]) else 4
    for arm, row in summary.items():
        setting = ", ".join(f"{key}={value}" for key, value in row["setting"].items()) or "-"
        values = ", ".join(f"{value:.{digits}f}" for value in row["values"])
        lines.append(f"| {arm} | {setting} | {row['mean']:.{digits}f} ± {row['sd']:.{digits}f} | {values} |")
    return "\n".join(lines) + "\n"
