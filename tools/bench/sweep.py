"""`addp sweep`: the same training for several arms, each with its own best setting of one small grid, over seeds.

An arm is one checkpoint or baseline under comparison. Every arm tries the whole grid with the first seed; its best
setting is repeated with the other seeds (all seeds at once if the grid has one setting), and the table gives mean and
standard deviation. Settings are selected and reported on the same validation images, which is fair between arms and
optimistic for all of them. Each run has a folder of its own, `out/<arm>/<setting>,seed<n>`, and the same command again
repeats no finished run, unless its recipe or checkpoint has changed: the previous run is then in
`out/<arm>/<setting>,seed<n>,before<m>`. The links `out/<arm>/best-seed<n>` lead to the runs of the best setting. A
setting that fails, for instance because its learning rate makes training diverge, is named and left out; the sweep
fails if an arm has no setting left, or if a seed of its best setting fails.
"""

import functools
import itertools
import json
import logging
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from annotated_types import Ge, MinLen
from tqdm import tqdm

from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.files import write_atomically
from addp_core.base.paths import INPUTS_FILE, MODEL_FILE, RECIPE_FILE, expand_home
from addp_core.recipes.config import dump
from addp_core.recipes.verbs import VERBS
from tools.bench.arguments import as_argument, digest, result_settings, verb_recipe
from tools.bench.devices import DeviceShares
from tools.bench.preflight import check_commands
from tools.children import Children, Stopped, last_lines

log = logging.getLogger("addp")

Settings: TypeAlias = dict[str, Any]
GridPoint: TypeAlias = tuple[tuple[str, Any], ...]  # (key, value) of each key of the grid
RESULTS, METRICS, FINISHED, SCORE = "results.json", "metrics.jsonl", "finished.json", "cell.json"
LOG_LINES = 8  # of a failed run's log, in the warning
LOGS_NAMED = 3  # logs of failed runs in the last line


@dataclass
class Recipe:
    """Keys of `addp sweep`."""

    out: Annotated[str, "folder for the runs, sweep.json and sweep.md"]
    verb: Annotated[str, "a training that ends with metrics: finetune, linprobe, det train, seg train, seg probe"]
    arms: Annotated[
        dict[str, Settings], MinLen(1), "name of an arm -> its settings; {seed} in a value stands for the seed"
    ]
    recipe: Annotated[str, "recipe of the verb; empty: none"] = ""
    set: Annotated[Settings, "settings of all runs"] = field(default_factory=dict)
    grid: Annotated[dict[str, list[Any]], "key -> values to try, in all combinations"] = field(default_factory=dict)
    seeds: Annotated[list[int], MinLen(1), "values of `seed_key`; the first one searches the grid"] = field(
        default_factory=lambda: [0, 1, 2]
    )
    seed_key: Annotated[str, "key of the seed"] = "train.seed"
    metric: Annotated[
        str,
        "metric to select the best setting by, larger is better: its place in results.json (dots lead inwards) or, "
        "without that file, in the last line of metrics.jsonl (det: box_AP, seg: mIoU)",
    ] = "last.top1"
    jobs: Annotated[
        int | None,
        Ge(1),
        "runs at a time, each with GPUs of its own; null: as many as there are GPUs for, two without one",
    ] = 1
    processes: Annotated[int, Ge(1), "processes of each run, started by torchrun"] = 1


@dataclass(frozen=True)
class SweepRun:
    """One run of the sweep: an arm, a grid point, a seed."""

    arm: str
    point: GridPoint
    seed: int

    @property
    def name(self) -> str:
        """Its folder below `out`."""
        settings = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in self.point]
        return f"{self.arm}/{','.join([*settings, f'seed{self.seed}'])}"


RunScores: TypeAlias = dict[SweepRun, float | None]  # None: the run failed


def run(recipe: Recipe) -> None:
    """Do the missing runs, then write and print the table. A run that fails does not stop the others.

    Exits with 1 if the table lacks an arm or a seed, or if a signal stopped the sweep.
    """
    if recipe.verb not in VERBS:
        raise UserError(f"verb: found {recipe.verb!r}, expected a verb of addp{did_you_mean(recipe.verb, VERBS)}")
    out, shares = Path(recipe.out), DeviceShares(recipe.jobs, recipe.processes)
    check_commands(recipe.verb, pending_commands(recipe))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / RECIPE_FILE, dump(recipe).encode())
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); choose another folder") from error
    try:
        with Children() as children:
            scores, best = _search_and_repeat(recipe, children, shares)
    except Stopped:
        log.warning("stopped; the same command continues")
        raise SystemExit(1) from None
    for arm, point in best.items():
        repeats = [SweepRun(arm, point, seed) for seed in recipe.seeds]
        _link_best_runs([repeat for repeat in repeats if scores[repeat] is not None], out)
    summary = _summarize(recipe, scores, best)
    table = _markdown_table(recipe, summary)
    notes = [f"{arm}: {note}" for arm, row in summary.items() for note in row["notes"]]
    write_atomically(out / "sweep.json", json.dumps({"metric": recipe.metric, "arms": summary}, indent=1).encode())
    write_atomically(out / "sweep.md", (table + "".join(f"\n{note}\n" for note in notes)).encode())
    sys.stdout.write(table)
    for note in notes:
        log.warning("%s", note)
    failed = [each for each, score in scores.items() if score is None]
    if lacking := [each for each in failed if best.get(each.arm, each.point) == each.point]:
        logs = [_log_of(each, out) for each in lacking]
        more = f" and {len(logs) - LOGS_NAMED} more" if len(logs) > LOGS_NAMED else ""
        named = f"{', '.join(map(str, logs[:LOGS_NAMED]))}{more}; the first one ends with: {last_lines(logs[0])}"
        log.error("%d of %d runs failed: %s", len(lacking), len(scores), named)
        raise SystemExit(1)


def _search_and_repeat(
    recipe: Recipe, children: Children, shares: DeviceShares
) -> tuple[RunScores, dict[str, GridPoint]]:
    """Search the grid with the first seed, then repeat each arm's best point with the others.

    A grid of one point needs no search: all seeds are trained together.

    Returns the score of every run, and arm -> best point; an arm all of whose searching runs failed has none.
    """
    points, first = _grid_points(recipe), recipe.seeds[0]
    together = recipe.seeds if has_one_point(recipe) else [first]
    runs = [SweepRun(arm, point, seed) for arm in recipe.arms for point in points for seed in together]
    scores = _score_all(recipe, runs, children, shares)
    best = {}
    for arm in recipe.arms:
        searched = {each: score for each, score in scores.items() if each.arm == arm and each.seed == first}
        tried = {each.point: score for each, score in searched.items() if score is not None}
        if tried:
            best[arm] = max(tried, key=lambda point: tried[point])
    repeats = [SweepRun(arm, point, seed) for seed in recipe.seeds[1:] for arm, point in best.items()]
    repeats = [each for each in repeats if each not in scores]
    return scores | _score_all(recipe, repeats, children, shares), best


def has_one_point(recipe: Recipe) -> bool:
    """Check whether the grid leaves nothing to search."""
    return len(_grid_points(recipe)) == 1


def _grid_points(recipe: Recipe) -> list[GridPoint]:
    return [tuple(zip(recipe.grid, values, strict=True)) for values in itertools.product(*recipe.grid.values())]


def pending_commands(recipe: Recipe) -> Iterator[tuple[str, list[str]]]:
    """Yield (arm, arguments) of the runs to do: the search with the first seed and, of each other seed, a run that has
    not finished with any point, since the best one is not known yet.
    """
    points = _grid_points(recipe)
    for arm in recipe.arms:
        for number, seed in enumerate(recipe.seeds):
            runs = [SweepRun(arm, point, seed) for point in points]
            pending = [each for each in runs if _recorded_score(recipe, each) is None]
            if number and len(pending) < len(runs):
                continue
            for each in pending if number == 0 else pending[:1]:
                yield arm, _arguments(recipe, each)


def _summarize(recipe: Recipe, scores: RunScores, best: Mapping[str, GridPoint]) -> dict[str, dict[str, Any]]:
    """Return the rows of sweep.json: arm -> setting, values, mean, sd, grid, notes."""
    summary = {}
    for arm, point in best.items():
        values = [v for seed in recipe.seeds if (v := scores[SweepRun(arm, point, seed)]) is not None]
        of_arm = {each: score for each, score in scores.items() if each.arm == arm}
        failed = [each for each, score in of_arm.items() if score is None and each.point != point]
        logs = [_log_of(each, Path(recipe.out)) for each in failed]
        summary[arm] = {
            "setting": dict(point),
            "values": values,
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            "grid": {each.name: score for each, score in of_arm.items()},
            "notes": [*_edges_of_grid(recipe, point), *(f"left out because it failed: {path}" for path in logs)],
        }
    return summary


def _edges_of_grid(recipe: Recipe, point: GridPoint) -> list[str]:
    """Return a note for each number of the best point which is the smallest or largest of three or more."""
    notes = []
    for key, value in point:
        values = recipe.grid[key]
        if all(type(each) in (int, float) for each in values) and len(set(values)) > 2:
            for name, end in (("smallest", min(values)), ("largest", max(values))):
                if value == end:
                    notes.append(f"{key}: {value:g} is the {name} value of the grid; a wider grid may do better")
    return notes


def _score_all(recipe: Recipe, runs: Sequence[SweepRun], children: Children, shares: DeviceShares) -> RunScores:
    with ThreadPoolExecutor(shares.jobs) as pool, tqdm(total=len(runs), unit="run", disable=not runs) as bar:
        scores: RunScores = {}
        results = pool.map(lambda each: _score(recipe, each, children, shares), runs)
        for each, score in zip(runs, results, strict=True):
            scores[each] = score
            bar.update()
            if score is not None:
                log.info("%s: %.4g", each.name, score)
        return scores


def _score(recipe: Recipe, sweep_run: SweepRun, children: Children, shares: DeviceShares) -> float | None:
    """Do a run, unless it has finished before, and return its metric; None if it fails."""
    if (recorded := _recorded_score(recipe, sweep_run)) is not None:
        return recorded
    folder, command = Path(recipe.out) / sweep_run.name, _arguments(recipe, sweep_run)
    inputs = _inputs(command)  # as they are when the run begins
    _move_run_of_other_inputs(sweep_run.name, folder, command, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    children.wait_until_free(folder)
    output = _log_of(sweep_run, Path(recipe.out))
    with shares.take() as environment:
        code = children.run_addp(command, output, recipe.processes, environment)
    # a training that a signal stops exits with 0, and may leave intermediate metrics
    if code or not (folder / FINISHED).exists():
        problem = f"failed (signal {-code})" if code < 0 else "failed"
        log.warning("%s: %s; the end of %s:\n%s", sweep_run.name, problem, output, last_lines(output, LOG_LINES))
        return None
    score: Any = read_results(folder)
    for part in recipe.metric.split("."):
        if part not in score:
            raise UserError(f"metric: {folder} has no {part!r}; expected one of {', '.join(score)}")
        score = score[part]
    content = {"command": command, "metric": recipe.metric, "score": score, "inputs": inputs}
    write_atomically(folder / SCORE, json.dumps(content).encode())
    return score


def _arguments(recipe: Recipe, sweep_run: SweepRun) -> list[str]:
    """Return the arguments of `addp` for a run."""
    settings = {**recipe.set, **recipe.arms[sweep_run.arm], **dict(sweep_run.point)}
    settings |= {recipe.seed_key: sweep_run.seed, "out": Path(recipe.out) / sweep_run.name}
    arguments = [f"{key}={as_argument(value, sweep_run.seed)}" for key, value in settings.items()]
    return [*recipe.verb.split(), *([recipe.recipe] if recipe.recipe else []), *arguments]


def _recorded_score(recipe: Recipe, sweep_run: SweepRun) -> float | None:
    """Return the metric of a run that has finished before with the same command, None if there is none.

    Nor is there one if the recipe that the command names, or the checkpoint, is another one now.
    """
    folder, command = Path(recipe.out) / sweep_run.name, _arguments(recipe, sweep_run)
    recorded = _record(folder)
    if recorded.get("command") != command or recorded.get("metric") != recipe.metric:
        return None
    return None if _is_of_other_inputs(folder, command, _inputs(command)) else recorded["score"]


def _record(folder: Path) -> dict[str, Any]:
    """Return what a run's cell.json says, {} if there is none."""
    path = folder / SCORE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _inputs(command: list[str]) -> dict[str, str]:
    """Return digests of the settings that a command stands for and of its checkpoint, as far as they can be read.

    Random weights have no checkpoint: they take the architecture alone from it.
    """
    try:
        training = verb_recipe(command, "sweep")
    except UserError:  # the command itself will say so
        return {}
    inputs = {"settings": digest(result_settings(training))}
    source = expand_home(str(getattr(training, "model", "") or "-"))
    path = source / MODEL_FILE if source.is_dir() else source
    if getattr(training, "init", "") != "random" and path.is_file():
        inputs["model"] = _file_digest(path, path.stat().st_mtime_ns)
    return inputs


@functools.cache
def _file_digest(path: Path, modified: int) -> str:
    """Return the digest of a file as it was at a time of modification, which is read once."""
    from addp_core.training.inputs import file_digest

    return file_digest(path) or ""


def _is_of_other_inputs(folder: Path, command: list[str], inputs: Mapping[str, str]) -> bool:
    """Check whether a run began with another checkpoint or, by the same command, with another recipe.

    What is not known of both says nothing, as in a folder from before it was recorded.
    """
    recorded = _record(folder)
    before = dict(recorded.get("inputs", {}))
    if recorded.get("command") != command:  # a changed key: the run's folder knows whether that is another run
        before.pop("settings", None)
    path = folder / INPUTS_FILE
    files = json.loads(path.read_text(encoding="utf-8")).get("files", {}) if path.exists() else {}
    before |= {"model": files["model"]} if "model" in files else {}
    return any(before[key] != inputs[key] for key in before.keys() & inputs.keys())


def _move_run_of_other_inputs(name: str, folder: Path, command: list[str], inputs: Mapping[str, str]) -> None:
    """Move a run with another recipe or checkpoint to `<folder>,before<n>`: it would answer that it has finished
    already, or continue from the weights that it began with.
    """
    if not _is_of_other_inputs(folder, command, inputs):
        return
    names = (folder.with_name(f"{folder.name},before{number}") for number in itertools.count(1))
    target = next(path for path in names if not path.exists())
    folder.rename(target)
    log.info("%s: its recipe or checkpoint has changed; the previous run is in %s", name, target)


def _log_of(sweep_run: SweepRun, out: Path) -> Path:
    return out / sweep_run.name / "log.txt"


def read_results(run: Path) -> dict[str, Any]:
    """Return the final metrics of a training: its results.json, or the last line of its metrics.jsonl."""
    if (run / RESULTS).exists():
        return json.loads((run / RESULTS).read_text(encoding="utf-8"))
    return json.loads((run / METRICS).read_text(encoding="utf-8").splitlines()[-1])


def best_run(arm: Path, seed: int) -> Path:
    """Return the link in an arm's folder to the run of its best setting with this seed."""
    return arm / f"best-seed{seed}"


def _link_best_runs(runs: Sequence[SweepRun], out: Path) -> None:
    """Link to the runs of an arm's best setting, and remove the links to what was best before."""
    arm = out / runs[0].arm
    for stale in arm.glob("best-seed*"):
        stale.unlink()
    for each in runs:
        best_run(arm, each.seed).symlink_to(Path(each.name).name, target_is_directory=True)


def _markdown_table(recipe: Recipe, summary: Mapping[str, Mapping[str, Any]]) -> str:
    counts = sorted({len(row["values"]) for row in summary.values()}) or [len(recipe.seeds)]
    seeds = f"{' or '.join(map(str, counts))} seed{'s' if counts != [1] else ''}"
    lines = [
        f"| arm | best setting | {recipe.metric}, mean ± sd of {seeds} | each seed |",
        "|---|---|---|---|",
    ]
    # fractions of one, such as AP, need more digits
    digits = 2 if any(abs(value) > 1 for row in summary.values() for value in row["values"]) else 4
    for arm, row in summary.items():
        setting = ", ".join(f"{key}={value}" for key, value in row["setting"].items()) or "-"
        values = ", ".join(f"{value:.{digits}f}" for value in row["values"])
        lines.append(f"| {arm} | {setting} | {row['mean']:.{digits}f} ± {row['sd']:.{digits}f} | {values} |")
    return "\n".join(lines) + "\n"
