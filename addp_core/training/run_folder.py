"""A run folder on disk: who may write to it, the recipe it belongs to, its checkpoints, metrics and pictures.

    <out>/recipe.yaml            the resolved recipe
    <out>/metrics.jsonl          one line of figures every `log_every` steps; `tb/` holds the same for TensorBoard
    <out>/images/                previews and, at the end, the curves of everything in metrics.jsonl
    <out>/checkpoints/step-N/    training.pt (tensors) and state.json (step, size and checksum of training.pt)
    <out>/model.safetensors      at the end; finished.json says for which recipe
    <out>/.lock                  locked by the process that runs here

Everything is written under a name that starts with `.tmp-`, flushed to the disk and renamed, so that a reader sees the
old content or the new one and never half of either. Leftovers of a killed run carry that prefix and are removed when
the next one starts.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import pickle
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.base.files import TEMPORARY_PREFIX, sync_to_disk, write_atomically
from addp_core.weights.checkpoint import MODEL_FILE

log = logging.getLogger("addp")

CHUNK = 1 << 24
MODELS = "models"  # folder of the weights kept on the way, models/step-N

# Keys that change how a run is watched, stored or computed, not what it computes: a run may continue with other values.
COMPUTE_ONLY = frozenset(
    {"out", "checkpointing", "eval_batch", "confusion", "data.workers", "data.prefetch", "data.max_errors"}
    | {f"train.{key}" for key in ("compile", "channels_last", "log_every", "checkpoint_every", "keep")}
    | {f"train.{key}" for key in ("preview_every", "evaluate_every", "export_every", "max_nonfinite")}
)
# Keys that set a run's length: a run may be extended, and then counts as unfinished until it has reached the new end.
LENGTH = frozenset({"train.steps", "train.epochs"})


# --- the folder and who owns it ------------------------------------------------------------------------------------


def prepare_out(out: str | Path, recipe_text: str) -> Path | None:
    """Claims the folder `out` for the run described by `recipe_text` (YAML); call it before anything slow is built.

    Creates the folder, locks it until `release_out` or the end of the process, refuses a recipe other than the one the
    folder was started with, writes recipe.yaml and removes leftovers of a killed run. Returns the path of
    model.safetensors where this very run has finished before, otherwise None. Calling it again is harmless. With
    several processes only the first one (RANK 0) touches the folder. UserError: the folder cannot be written, another
    process works in it, or the recipe differs.
    """
    out = Path(out)
    recipe = _flatten(yaml.safe_load(recipe_text) or {})
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            (out / "checkpoints").mkdir(parents=True, exist_ok=True)
            (out / "images").mkdir(exist_ok=True)
            lock(out)
            _remove_leftovers(out)
            _accept_recipe(out, recipe)
            write_atomically(out / "recipe.yaml", recipe_text.encode())
        except OSError as error:
            raise UserError(
                f"out={out}: cannot be written ({_reason(error)}); choose another folder or free this one"
            ) from error
    finished = _finished(out, recipe)
    if finished and out.resolve() in _locks:
        log.info("out=%s: this run has finished: %s", out, finished)
        release_out(out)
    return finished


def release_out(out: str | Path) -> None:
    """Gives the lock on the folder back; does nothing where this process holds none."""
    file = _locks.pop(Path(out).resolve(), None)
    if file is not None:
        os.ftruncate(file, 0)
        os.close(file)


def mark_finished(out: Path, recipe_text: str, summary: Mapping[str, Any]) -> None:
    """Writes finished.json: `summary` and the digest of the recipe, by which `prepare_out` knows the run again."""
    recipe = _flatten(yaml.safe_load(recipe_text) or {})
    write_atomically(out / "finished.json", json.dumps({**summary, "recipe": _digest(recipe)}).encode())


# Open lock files of this process. They stay open on purpose: closing any descriptor of a file drops POSIX locks on it.
_locks: dict[Path, int] = {}


def lock(out: Path, shared: bool = False) -> None:
    """Holds the folder `out` until `release_out` or the end of this process, alone or with others that share it.

    UserError where another process holds it.
    """
    # A POSIX lock ends with its process, however that ended, so a killed run leaves no stale lock; unlike flock it is
    # not inherited by data loader workers, which outlive a killed parent by seconds.
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
        log.warning("out=%s: this file system has no locks (%s); start only one run here", out, _reason(error))
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _locks[key] = file


def _remove_leftovers(out: Path) -> None:
    for folder in (out, out / "checkpoints"):
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _accept_recipe(out: Path, recipe: dict[str, Any]) -> None:
    path = out / "recipe.yaml"
    if not path.exists() or not (any((out / "checkpoints").iterdir()) or (out / "finished.json").exists()):
        return  # nothing was computed that another recipe could spoil: a first try that failed may be corrected
    try:
        before = _flatten(yaml.safe_load(path.read_text()) or {})
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path}: is not a recipe; remove it or choose another out") from error
    absent = object()
    changed = [
        f"{key}={recipe.get(key, 'absent')} (was {before.get(key, 'absent')})"
        for key in sorted(before.keys() | recipe.keys())
        if key not in COMPUTE_ONLY | LENGTH and before.get(key, absent) != recipe.get(key, absent)
    ]
    if changed:
        raise UserError(
            f"out={out}: holds a run of another recipe: {', '.join(changed)}; put the keys back or choose another out"
        )
    for key in sorted(LENGTH):
        if before.get(key) != recipe.get(key):
            log.info("%s: %s instead of %s; the schedule follows the new length", key, recipe.get(key), before.get(key))


def _finished(out: Path, recipe: dict[str, Any]) -> Path | None:
    # Depends on finished.json and the recipe alone, so that all processes come to the same answer without a word.
    try:
        digest = json.loads((out / "finished.json").read_text())["recipe"]
    except (OSError, ValueError, KeyError):
        return None
    model = out / MODEL_FILE
    return model if digest == _digest(recipe) and model.exists() else None


def _digest(recipe: dict[str, Any]) -> str:
    kept = {key: value for key, value in recipe.items() if key not in COMPUTE_ONLY}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}"""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


# --- checkpoints ---------------------------------------------------------------------------------------------------


class Checkpoints:
    """`<out>/checkpoints/step-N`: the last `keep` states of a run, each complete and checked before it is trusted."""

    def __init__(self, out: Path, keep: int):
        self.folder = out / "checkpoints"
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / f"step-{step}"

    def write(self, step: int, payload: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Writes `payload` (tensors and plain values) and `state` (JSON), then removes all but the last `keep`.

        OSError (a full disk, no permission): nothing is left of the new checkpoint and the older ones are untouched.
        """
        temporary = self.folder / f"{TEMPORARY_PREFIX}step-{step}"
        target = self.path(step)
        try:
            temporary.mkdir()
            size, checksum = _save(payload, temporary / "training.pt")
            manifest = {"step": step, "size": size, "crc32": checksum, **state}
            (temporary / "state.json").write_text(json.dumps(manifest))
            for path in (temporary / "training.pt", temporary / "state.json", temporary):
                sync_to_disk(path)
            self._remove(step)
            os.rename(temporary, target)
            sync_to_disk(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._prune()

    def newest(self) -> int | None:
        """The newest step whose files are whole. Damaged ones are named and moved aside as `damaged-step-N`.

        None where there is no checkpoint at all; UserError where there are only damaged ones.
        """
        damaged = []
        for step in self.steps():
            reason = self._damage(step)
            if reason is None:
                self._prune()  # a killed run may not have come to it
                return step
            damaged.append(f"step-{step} ({reason})")
            aside = self.folder / f"damaged-step-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(self.path(step), aside)
            log.warning("%s: damaged (%s); moved to %s, falling back to the one before", self.path(step), reason, aside)
        if damaged:
            raise UserError(
                f"{self.folder}: no checkpoint can be read: {', '.join(damaged)}; remove this folder to start over"
            )
        return None

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(payload on the CPU, state) of one checkpoint. Tensors and plain values only: nothing in it can run code."""
        path = self.path(step) / "training.pt"
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: holds more than tensors and plain values; it was not written by a run") from error
        return payload, json.loads((self.path(step) / "state.json").read_text())

    def _prune(self) -> None:
        for step in self.steps()[self.keep :]:
            self._remove(step)

    def _remove(self, step: int) -> None:
        # Renamed first: a kill in the middle must not leave half a checkpoint under a name that promises a whole one.
        if self.path(step).exists():
            doomed = self.folder / f"{TEMPORARY_PREFIX}old-step-{step}"
            os.rename(self.path(step), doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, or None."""
        path = self.path(step) / "training.pt"
        try:
            state = json.loads((self.path(step) / "state.json").read_text())
            size, checksum = path.stat().st_size, 0
            if size != state["size"]:
                return f"training.pt holds {size} of {state['size']} bytes"
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    checksum = zlib.crc32(chunk, checksum)
            return None if checksum == state["crc32"] else "training.pt fails its checksum"
        except (OSError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"


class _Writer:
    """A file that counts and sums what passes, and keeps the OSError that torch.save would wrap in another error."""

    def __init__(self, file):
        self.file, self.size, self.checksum, self.error = file, 0, 0, None

    def write(self, data) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += len(data)
        self.checksum = zlib.crc32(data, self.checksum)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _save(payload: dict[str, Any], path: Path) -> tuple[int, int]:
    """torch.save that raises OSError as such; returns (bytes, CRC-32)."""
    with path.open("wb") as file:
        writer = _Writer(file)
        try:
            torch.save(payload, writer)
        except RuntimeError:
            if writer.error is not None:
                raise writer.error from None
            raise
    return writer.size, writer.checksum


# --- figures and pictures ------------------------------------------------------------------------------------------


class Report:
    """metrics.jsonl, TensorBoard, progress and pictures of a run; a full disk costs figures, never the run."""

    def __init__(self, out: Path, name: str, step: int, total: int):
        """`step`: the step the run starts from; figures of later steps, left by a stopped run, are dropped."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self.out, self.total = out, total
        self.metrics = out / "metrics.jsonl"
        write_atomically(self.metrics, b"".join(_lines_until(self.metrics, step, total)))
        self.file = self.metrics.open("a")
        self.board = SummaryWriter(str(out / "tb"), purge_step=step + 1)
        shown = sys.stderr.isatty()
        self.bar = tqdm(desc=name, total=total, initial=step, unit="step", dynamic_ncols=True) if shown else None
        self.around = contextlib.ExitStack()
        if shown:  # messages go above the bar, not through it
            loggers = [logger for logger in (logging.getLogger(), log) if logger.handlers]
            self.around.enter_context(logging_redirect_tqdm(loggers))

    def advance(self) -> None:
        """One step done."""
        if self.bar is not None:
            self.bar.update()

    def train(self, figures: dict[str, float | None], eta: float) -> None:
        """Figures of the steps since the last call: `step`, `epoch`, `loss`, `lr`, `img_s`, ...; `eta` in seconds."""
        self._write("train", figures)
        loss = "-" if figures["loss"] is None else f"{figures['loss']:.4f}"
        text = f"loss {loss}  lr {figures['lr']:.3g}  {figures['img_s']:.1f} img/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            left = time.strftime("%H:%M:%S", time.gmtime(eta % 86400))
            left = f"{int(eta // 86400)}d {left}" if eta >= 86400 else left
            log.info("step %d/%d  epoch %.2f  %s  eta %s", figures["step"], self.total, figures["epoch"], text, left)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of an evaluation."""
        self._write("evaluate", {"step": step, **figures})
        log.info("step %d  %s", step, "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))

    def images(self, step: int, images: Mapping[str, Tensor]) -> None:
        """`images`: name -> Float[n,3,h,w] in [0, 1], written as images/<name>-<step>.png, in a near-square grid."""
        from torchvision.utils import save_image

        for name, batch in images.items():
            columns = max(1, round(len(batch) ** 0.5))
            with self._tolerant(f"images/{name}-{step}.png"):
                batch = batch.detach().float().clamp(0, 1).cpu()
                save_image(batch, self.out / "images" / f"{name}-{step}.png", nrow=columns)

    def curves(self) -> None:
        """images/curves.png: every figure of metrics.jsonl over the steps, the loss first."""
        from matplotlib.figure import Figure

        series: dict[str, list[tuple[int, float]]] = {}
        for line in self.metrics.read_text().splitlines():
            figures = json.loads(line)
            step = figures.pop("step")
            for key, value in figures.items():
                if value is not None and key not in ("epoch", "images"):
                    series.setdefault(key, []).append((step, value))
        if not series:
            return
        columns = min(3, len(series))
        rows = -(-len(series) // columns)
        figure = Figure(figsize=(4 * columns, 2.6 * rows))
        figure.subplots_adjust(0.2 / columns, 0.2 / rows, 1 - 0.1 / columns, 1 - 0.12 / rows, wspace=0.25, hspace=0.4)
        for place, (key, points) in enumerate(series.items(), start=1):
            axes = figure.add_subplot(rows, columns, place, title=key)
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None, linewidth=1)
            axes.grid(alpha=0.3)
        with self._tolerant("images/curves.png"):
            figure.savefig(self.out / "images" / "curves.png", dpi=100)

    def close(self) -> None:
        """Flushes everything."""
        if self.bar is not None:
            self.bar.close()
        self.around.close()
        with self._tolerant("metrics.jsonl"):
            self.file.close()
        with self._tolerant("tb"):
            self.board.close()

    def _write(self, group: str, figures: Mapping[str, float | None]) -> None:
        with self._tolerant("metrics.jsonl"):
            self.file.write(json.dumps(figures) + "\n")
            self.file.flush()
        with self._tolerant("tb"):
            for key, value in figures.items():
                if key != "step" and value is not None:
                    self.board.add_scalar(f"{group}/{key}", value, figures["step"])
            self.board.flush()

    def _tolerant(self, what: str) -> contextlib.AbstractContextManager[None]:
        return tolerant(self.out / what)


@contextlib.contextmanager
def tolerant(path: Path) -> Iterator[None]:
    """What the disk refuses to take is named and left out: around what a run can do without."""
    try:
        yield
    except OSError as error:
        log.warning("%s: not written (%s); the run continues", path, _reason(error))


def _lines_until(metrics: Path, step: int, total: int) -> Iterator[bytes]:
    """The whole lines of metrics.jsonl that a run which continues from `step` does not write again."""
    if not metrics.exists():
        return
    for line in metrics.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # a line cut off by a kill
            figures = json.loads(line)
            again = figures["step"] == total and "img_s" not in figures  # the evaluation at the end
            if line.endswith(b"\n") and figures["step"] <= step and not again:
                yield line
