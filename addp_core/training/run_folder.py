"""A run folder: its lock, the recipe that it belongs to, and whether the run has finished.

    <out>/recipe.yaml            the resolved recipe
    <out>/metrics.jsonl          a line of metrics every `log_every` steps; `tb/` holds the same for TensorBoard
    <out>/trackers.json          the run in other trackers, if `train.trackers` names any
    <out>/images/                previews and, at the end, the curves of all metrics
    <out>/checkpoints/step-N/    training.pt (tensors) and state.json (step, size and checksum of training.pt); with
                                 train.parallel=fsdp, each process has a training-<rank>.pt
    <out>/models/step-N/         intermediate checkpoints: weights only, if `export_every` asks for them
    <out>/model.safetensors      the trained model; finished.json says by which recipe
    <out>/inputs.json            what the run reads from disk, by digest
    <out>/last_checkpoint.json   the step of the newest checkpoint, by which one notices that checkpoints were deleted
    <out>/job.sbatch             with launch=slurm: the job; jobs.json has its number, slurm-<number>.txt its output
    <out>/.lock                  locked by the process that works here

Everything is written under a name that begins with `.tmp-`, flushed to disk and renamed, so that a reader sees either
the old or the new content. A killed run leaves files with that prefix, which the next run removes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from addp_core.base.errors import UserError
from addp_core.base.files import TEMPORARY_PREFIX, write_atomically
from addp_core.base.launch import check_launch, rank
from addp_core.base.paths import FINISHED_FILE as FINISHED
from addp_core.base.paths import RECIPE_FILE
from addp_core.training.checkpoints import LAST_CHECKPOINT, Checkpoints, check_length
from addp_core.training.config import TrainConfig
from addp_core.training.environment import check_environment
from addp_core.training.inputs import Dataset, Inputs, OpenDatasets
from addp_core.training.precision import AUTO, resolve_precision
from addp_core.training.run_recipe import (
    LENGTH_KEYS,
    PRECISION,
    RunRecipe,
    Values,
    digest,
    keep_precision,
    read_values,
    settle_resize,
)
from addp_core.training.submission import check_submission, check_training, is_for_slurm, submit
from addp_core.training.tracker_backends import check_installed
from addp_core.weights.files import MODEL_FILE

log = logging.getLogger("addp")

BEST_MODEL, BEST_METRICS = "model-best.safetensors", "best.json"  # of `train.keep_best`
INTERMEDIATE_MODELS = "models"  # subfolder of the intermediate checkpoints: models/step-N, weights only


def prepare_out(
    out: str | Path, recipe: Any, datasets: OpenDatasets | None = None, result: str = MODEL_FILE
) -> Path | None:
    """Claim the folder `out` for the run that `recipe` describes. Call this before building anything slow.

    Creates the folder, locks it until `release_out` or the end of the process, checks that the folder was not started
    with another recipe or on other data, that the checkpoints of what it has computed are there, writes recipe.yaml and
    removes leftovers of a killed run. Calling it again is harmless. With several processes, only rank 0 touches the
    folder.

    Args:
        out: the run folder.
        recipe: an instance of the task's dataclass of keys, in which `train.precision=auto` becomes the precision of a
            run that has begun in the folder, as does a `data.resize` that is not set; or its YAML.
        datasets: opens the datasets of the run, which are compared with those that it began with. It may be called more
            than once.
        result: the file in `out` without which the run has not finished.

    With `launch=slurm`, submits a job that does the rest, and exits with code 0.

    Returns:
        The path of `result` if this run has already finished, otherwise None.

    Raises:
        UserError: if the environment contradicts the recipe, the folder cannot be written, another process works in it,
            the recipe or the data differ, or the checkpoints have been deleted.
    """
    out = Path(out)
    if is_for_slurm(recipe):
        check_submission(out, recipe)
    if (previous := _previous_values(out)) is not None:
        keep_precision(recipe, previous)
    else:
        check_out(out, recipe)
    settle_resize(recipe, _stored_values(out))
    run_recipe = RunRecipe(recipe)
    check_environment(run_recipe.values)
    check_launch()  # a process that wrongly takes itself for another rank would not see the lock
    if rank():
        return _finished_result(out, run_recipe, datasets, result)
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "images").mkdir(exist_ok=True)
        lock_out(out)
        finished = _prepare(out, run_recipe, datasets, result)
        if is_for_slurm(recipe) and not finished:
            release_out(out)
            submit(out, recipe)
        return finished
    except OSError as error:
        release_out(out)
        raise UserError(
            f"out={out}: cannot be written ({_reason(error)}); choose another folder or make this one writable"
        ) from error
    except UserError:
        release_out(out)
        raise


def settle_precision(out: str | Path, recipe: Any, section: Any, width: int) -> None:
    """Replace `auto` in `section.precision`, in place, by what it stands for here, and store it for when the run
    continues. All processes of the run have to call this.

    Args:
        out: the run folder, which `prepare_out` has claimed.
        recipe: of the run.
        section: its section `train`.
        width: of the networks' matrix products (`matrix_width`).
    """
    from addp_core.training.processes import join_group

    if section.precision == AUTO:
        section.precision = resolve_precision(AUTO, join_group().device, width, key=PRECISION)
        prepare_out(out, recipe)


def _prepare(out: Path, recipe: RunRecipe, datasets: OpenDatasets | None, result: str) -> Path | None:
    """Do the work of `prepare_out` in the locked folder."""
    _remove_leftovers(out)
    inputs, previous = Inputs(out, recipe), _previous_values(out)
    if not has_results(out):
        for name in (BEST_METRICS, BEST_MODEL):  # of a run that ended before its first checkpoint
            (out / name).unlink(missing_ok=True)
    if previous is None:
        inputs.record = {}
    else:
        _check_recipe(out, recipe, inputs, previous)
    finished = _finished_result(out, recipe, datasets, result)
    if finished:  # recipe.yaml and inputs.json stay as they are: the other ranks find out by the same files
        log.info("out=%s: this run has already finished: %s", out, finished)
        inputs.check_finished(datasets)
        release_out(out)
        return finished
    check_installed(recipe.values.get("train.trackers") or ())
    check_training(recipe.source)
    if previous is not None:
        _check_checkpoints(out)
        _log_new_length(recipe, previous)
    opened: Mapping[str, Dataset] = {}
    if datasets:
        inputs.check_files()
        inputs.record_files()
        try:
            opened = datasets()
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise UserError(f"data: {where}cannot be read ({_reason(error)})") from error
        inputs.check_datasets(opened)
    _check_length(out, recipe, opened.get("train"))
    write_atomically(out / RECIPE_FILE, recipe.text.encode())
    return None


def mark_finished(out: Path, recipe: Any, summary: Mapping[str, Any]) -> None:
    """Write finished.json: `summary` and the digest of the recipe, by which `prepare_out` recognizes the run."""
    content = {**summary, "recipe": digest(RunRecipe(recipe).values)}
    write_atomically(out / FINISHED, json.dumps(content).encode())


# -------------------- folders of verbs that are no trainings


@contextlib.contextmanager
def claim_out(out: Path, recipe: Any = None, files: Iterable[str] = ()) -> Iterator[None]:
    """Create the folder `out` of a verb that is no training, and hold its lock. All processes call this; rank 0 acts.

    Args:
        out: the folder.
        recipe, files: as in `check_out`; without a recipe, for a verb that writes none, any folder will do.

    Raises:
        UserError: if the folder cannot be written, another process works in it, or it holds what another verb wrote.
    """
    if rank():
        yield
        return
    check_out(out, recipe, files)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock_out(out)
    except OSError as error:
        raise UserError(
            f"out: {out} cannot be written ({_reason(error)}); expected a folder that you may write to"
        ) from error
    try:
        yield
    finally:
        release_out(out)


def check_out(out: Path, recipe: Any, files: Iterable[str] = ()) -> None:
    """Raise UserError if the folder `out` holds what another verb wrote: its recipe, or `files` without any recipe.

    Args:
        out: the folder, which need not exist.
        recipe: an instance of the verb's dataclass of keys; of any other object nothing is known.
        files: names of what the verb writes there, besides recipe.yaml.
    """
    stored = _stored_values(out)
    if stored is None:
        if found := next((name for name in files if (out / name).exists()), None):
            raise UserError(
                f"out={out}: holds {found}, and no {RECIPE_FILE} that says what wrote it; choose another out"
            )
    elif dataclasses.is_dataclass(recipe):
        unknown = {key.split(".")[0] for key in stored} - {field.name for field in dataclasses.fields(recipe)}
        if unknown:
            raise UserError(
                f"out={out}: holds a run of another verb, whose {RECIPE_FILE} has the key {min(unknown)!r}; choose "
                "another out"
            )


# -------------------- the lock

# Lock files that this process holds open. Closing any descriptor of a file would drop the POSIX locks on it.
_locks: dict[Path, int] = {}


def lock_out(out: Path, shared: bool = False) -> None:
    """Lock the folder `out` until `release_out` or the end of this process.

    With `shared`, other processes may hold shared locks at the same time. Raises UserError if another process holds the
    folder.
    """
    # A POSIX lock ends with its process, however that ended, so a killed run leaves no stale lock. Unlike flock, it is
    # not inherited by data loader workers, which can outlive a killed parent by seconds.
    key = out.resolve()
    if key in _locks:
        return
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = os.read(file, 1000).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise UserError(f"out={out}: {owner} works in this folder; wait for it or choose another one") from None
        log.warning(
            "out=%s: this file system does not support locks (%s); start only one run here", out, _reason(error)
        )
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _locks[key] = file


def release_out(out: str | Path) -> None:
    """Release the lock on the folder, if this process holds it."""
    file = _locks.pop(Path(out).resolve(), None)
    if file is not None:
        os.ftruncate(file, 0)
        os.close(file)


def _remove_leftovers(out: Path) -> None:
    for folder in (out, out / "checkpoints", out / "images"):
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


# -------------------- the recipe


def _previous_values(out: Path) -> Values | None:
    """Return the recipe of what has been computed in the folder, or None if nothing has: it may then be corrected."""
    return _stored_values(out) if has_results(out) else None


def has_results(out: Path) -> bool:
    """Check whether a run has computed anything in the folder."""
    traces = [*(out / "checkpoints").glob("*"), out / FINISHED, out / LAST_CHECKPOINT]
    return any(trace.exists() for trace in traces)


def _stored_values(out: Path) -> Values | None:
    """Return the recipe that the folder holds, or None. Raises UserError if it is not one."""
    path = out / RECIPE_FILE
    if not path.exists():
        return None
    try:
        return read_values(path.read_text())
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path}: is not a recipe; remove it or choose another out") from error


def changes_of_run(out: Path, recipe: Any, given: tuple[str, ...] = ()) -> str:
    """Return how a recipe differs from that of what has been computed in the folder, the length of the run included;
    "" if it does not, or nothing has been computed. Nothing is written.

    Args:
        out: the run folder.
        recipe: an instance of the task's dataclass of keys, in which `prepare_out` would settle the same keys.
        given: sections and keys to leave out.
    """
    if (previous := _previous_values(out)) is None:
        return ""
    keep_precision(recipe, previous)
    settle_resize(recipe, previous)
    now = RunRecipe(recipe)
    changed = [*_changed_keys(now, Inputs(out, now), previous), *sorted(now.changed_length(previous))]
    return now.describe_changes([key for key in changed if not f"{key}.".startswith(given)], previous)


def _changed_keys(recipe: RunRecipe, inputs: Inputs, previous: Values) -> list[str]:
    """Return the keys in which a recipe is another one than that of the run with the values `previous`."""
    if previous.get(PRECISION) == AUTO:  # it ended before this was settled, so nothing was computed in another one
        previous = {**previous, PRECISION: recipe.values.get(PRECISION)}
    return inputs.without_moved(recipe.changed_keys(previous), previous)


def _check_recipe(out: Path, recipe: RunRecipe, inputs: Inputs, previous: Values) -> None:
    """Raise UserError if the folder holds a run of another recipe."""
    if changed := _changed_keys(recipe, inputs, previous):
        raise UserError(
            f"out={out}: holds a run of another recipe: {recipe.describe_changes(changed, previous)}; "
            "put the keys back or choose another out"
        )


def _check_length(out: Path, recipe: RunRecipe, images: Dataset | None) -> None:
    """Raise UserError if the run has gone further than the recipe's last step, before its recipe is replaced by this
    one. The engine tells where `images` are not known.
    """
    section, steps = getattr(recipe.source, "train", None), Checkpoints(out, keep=1).steps()
    if steps and isinstance(section, TrainConfig) and (section.steps is not None or images is not None):
        check_length(out, steps[0], section.total_steps(0 if images is None else len(images)))


def _log_new_length(recipe: RunRecipe, previous: Values) -> None:
    for key in sorted(LENGTH_KEYS):
        if previous.get(key) != recipe.values.get(key):
            log.info(
                "%s: %s instead of %s; the schedule follows the new length",
                key,
                recipe.values.get(key),
                previous.get(key),
            )


def _check_checkpoints(out: Path) -> None:
    """Raise UserError if the checkpoints of what has been computed in the folder are not there."""
    if any((out / "checkpoints").glob("*step-*")):  # those that are damaged are reported later
        return
    finished = _read_finished(out)
    if finished and "step" not in finished:  # a task without checkpoints
        return
    state = "has finished" if finished else "was stopped"
    raise UserError(
        f"out={out}: holds a run that {state}, but its checkpoints have been deleted, and it would start again at step "
        "0; choose another out, or remove this folder to start over"
    )


def _read_finished(out: Path) -> dict[str, Any]:
    """Return the content of finished.json; nothing if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((out / FINISHED).read_text())
    return {}


def _finished_result(out: Path, recipe: RunRecipe, datasets: OpenDatasets | None, result: str) -> Path | None:
    """Return the path of `result` if finished.json is of this recipe.

    All processes get the same answer without communicating.
    """
    finished, path = _read_finished(out).get("recipe"), out / result
    if finished is None or not path.exists():
        return None
    if finished == digest(recipe.values):
        return path
    # The run's own recipe has the digest, and may mean the same: with other paths, or from before some keys existed.
    try:
        previous = read_values((out / RECIPE_FILE).read_text())
    except (OSError, yaml.YAMLError, AttributeError):
        return None
    lengths = {key: recipe.values[key] for key in LENGTH_KEYS & recipe.values.keys()}
    inputs, changed = Inputs(out, recipe), recipe.changed_keys(previous)
    if finished != digest(previous | lengths) or inputs.without_moved(changed, previous):
        return None
    if any(recipe.paths.get(key) == "dataset" for key in changed) and not inputs.same_datasets(datasets):
        return None
    return path


# -------------------- a full disk


@contextlib.contextmanager
def log_write_errors(path: Path) -> Iterator[None]:
    """Log a warning instead of raising OSError, for files that a run can do without."""
    try:
        yield
    except OSError as error:
        log.warning("%s: not written (%s); the run continues", path, _reason(error))


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
