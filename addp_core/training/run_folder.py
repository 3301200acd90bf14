"""A run folder: its lock, the recipe that it belongs to, and whether the run has finished.

    <out>/recipe.yaml            the resolved recipe
    <out>/metrics.jsonl          a line of metrics every `log_every` steps; `tb/` holds the same for TensorBoard
    <out>/images/                previews and, at the end, the curves of all metrics
    <out>/checkpoints/step-N/    training.pt (tensors) and state.json (step, size and checksum of training.pt)
    <out>/models/step-N/         intermediate checkpoints: weights only, if `export_every` asks for them
    <out>/model.safetensors      the trained model; finished.json says by which recipe
    <out>/.lock                  locked by the process that works here

Everything is written under a name that begins with `.tmp-`, flushed to disk and renamed, so that a reader sees either
the old or the new content. A killed run leaves files with that prefix, which the next run removes.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from addp_core.base.errors import UserError
from addp_core.base.files import TEMPORARY_PREFIX, write_atomically
from addp_core.weights.files import MODEL_FILE

log = logging.getLogger("addp")

INTERMEDIATE_MODELS = "models"  # subfolder of the intermediate checkpoints: models/step-N, weights only

# Keys that change how a run is monitored, stored or computed, but not its result: a run may continue with other values.
COMPUTE_ONLY_KEYS = frozenset(
    {"out", "checkpointing", "eval_batch", "confusion", "data.workers", "data.prefetch", "data.max_errors"}
    | {f"train.{key}" for key in ("compile", "channels_last", "log_every", "checkpoint_every", "keep")}
    | {f"train.{key}" for key in ("preview_every", "evaluate_every", "export_every", "max_nonfinite")}
)
# Keys that set a run's length: a run may be extended, and then counts as unfinished until it reaches the new end.
LENGTH_KEYS = frozenset({"train.steps", "train.epochs"})


def prepare_out(out: str | Path, recipe_text: str) -> Path | None:
    """Claim the folder `out` for the run that `recipe_text` (YAML) describes. Call this before building anything slow.

    Creates the folder, locks it until `release_out` or the end of the process, checks that the folder was not started
    with another recipe, writes recipe.yaml and removes leftovers of a killed run. Calling it again is harmless. With
    several processes, only rank 0 touches the folder.

    Returns:
        The path of model.safetensors if this run has already finished, otherwise None.

    Raises:
        UserError: if the folder cannot be written, another process works in it, or the recipe differs.
    """
    out = Path(out)
    recipe = _flatten(yaml.safe_load(recipe_text) or {})
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            (out / "checkpoints").mkdir(parents=True, exist_ok=True)
            (out / "images").mkdir(exist_ok=True)
            lock_out(out)
            _remove_leftovers(out)
            _check_recipe(out, recipe)
            write_atomically(out / "recipe.yaml", recipe_text.encode())
        except OSError as error:
            raise UserError(
                f"out={out}: cannot be written ({_reason(error)}); choose another folder or make this one writable"
            ) from error
    finished = _finished_model(out, recipe)
    if finished and out.resolve() in _locks:
        log.info("out=%s: this run has already finished: %s", out, finished)
        release_out(out)
    return finished


def mark_finished(out: Path, recipe_text: str, summary: Mapping[str, Any]) -> None:
    """Write finished.json: `summary` and the digest of the recipe, by which `prepare_out` recognizes the run."""
    recipe = _flatten(yaml.safe_load(recipe_text) or {})
    write_atomically(out / "finished.json", json.dumps({**summary, "recipe": _digest(recipe)}).encode())


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
    for folder in (out, out / "checkpoints"):
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


# -------------------- the recipe


def _check_recipe(out: Path, recipe: dict[str, Any]) -> None:
    """Raise UserError if the folder holds a run of another recipe."""
    path = out / "recipe.yaml"
    if not path.exists() or not (any((out / "checkpoints").iterdir()) or (out / "finished.json").exists()):
        return  # nothing has been computed yet, so the recipe of a failed first try may be corrected
    try:
        previous = _flatten(yaml.safe_load(path.read_text()) or {})
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path}: is not a recipe; remove it or choose another out") from error
    missing = object()
    changed = [
        f"{key}={recipe.get(key, 'absent')} (was {previous.get(key, 'absent')})"
        for key in sorted(previous.keys() | recipe.keys())
        if key not in COMPUTE_ONLY_KEYS | LENGTH_KEYS and previous.get(key, missing) != recipe.get(key, missing)
    ]
    if changed:
        raise UserError(
            f"out={out}: holds a run of another recipe: {', '.join(changed)}; put the keys back or choose another out"
        )
    for key in sorted(LENGTH_KEYS):
        if previous.get(key) != recipe.get(key):
            log.info(
                "%s: %s instead of %s; the schedule follows the new length", key, recipe.get(key), previous.get(key)
            )


def _finished_model(out: Path, recipe: dict[str, Any]) -> Path | None:
    """Return the model if finished.json is of this recipe. All processes get the same answer without communicating."""
    try:
        digest = json.loads((out / "finished.json").read_text())["recipe"]
    except (OSError, ValueError, KeyError):
        return None
    model = out / MODEL_FILE
    return model if digest == _digest(recipe) and model.exists() else None


def _digest(recipe: dict[str, Any]) -> str:
    """Return a digest of the keys that determine the result."""
    relevant = {key: value for key, value in recipe.items() if key not in COMPUTE_ONLY_KEYS}
    return hashlib.blake2b(json.dumps(relevant, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
