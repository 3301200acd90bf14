"""The trackers of a run: what they get of its metrics, recipe and previews, and how they go on when it continues.

metrics.jsonl and images/ in the run folder are the record. A tracker gets a row for each step that they have, once the
next step is done or the run ends, so that metrics, images and evaluation of a step are together. A tracker that lacks
steps when a run continues, because it failed, was added later, or the process was killed, gets them from the record;
steps that it has already, beyond the checkpoint, it does not get again.
"""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from addp_core.base.files import write_atomically
from addp_core.training.run_folder import log_write_errors
from addp_core.training.run_recipe import digest
from addp_core.training.tracker_backends import BACKENDS, Backend, TrackedRun, TrackerName

log = logging.getLogger("addp")

TRACKERS = "trackers.json"  # in the run folder: the runs' ids, and the last step that each tracker has
IMAGE = re.compile(r"(.+)-(\d+)\.png")


@dataclass
class Row:
    """What a step has to log."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)


class Trackers:
    """The trackers of a run. One that fails is left out until the run continues, with one warning.

    Args:
        run: the run that is logged.
        names: of the trackers.
        record: the rows of the run folder up to `run.step`, in order.
    """

    def __init__(self, run: TrackedRun, names: Iterable[TrackerName], record: Iterable[Row]):
        self.file, self.digest, self.complete = run.out / TRACKERS, digest(dict(run.config)), False
        self.stored = self._read(run.step)
        self.backends: list[Backend] = []
        for name in dict.fromkeys(names):
            backend = BACKENDS[name](run, self.stored.get(name, {}))
            if self._attempt(backend, backend.start):
                self.backends.append(backend)
                if backend.record() is None:
                    self.stored.pop(name, None)
        self._save()
        self.pending: Row | None = None
        for row in record:
            self._flush()
            self.pending = row  # the last one may be of a step whose evaluation is still to come

    def add(self, step: int, metrics: Mapping[str, float] | None = None, images: Mapping[str, Path] | None = None):
        """Add metrics and images (name -> PNG file) to the row of a step."""
        if self.pending is None or self.pending.step != step:
            self._flush()
            self.pending = Row(step)
        self.pending.metrics |= metrics or {}
        self.pending.images |= images or {}

    def advance(self) -> None:
        """Send the row of the step before."""
        self._flush()

    def finish(self) -> None:
        """Send the row of the last step."""
        self._flush()
        self.complete = True

    def close(self) -> None:
        """End the runs in all trackers. Unless `finish` was called, the last row is sent when the run continues."""
        if self.pending is not None:
            self._send(self.pending, [backend for backend in self.backends if backend.takes_back])
        for backend in list(self.backends):
            self._attempt(backend, partial(backend.finish, self.complete))
        self._save()

    def _flush(self) -> None:
        if self.pending is not None:
            row, self.pending = self.pending, None
            self._send(row, list(self.backends))
            self._save()

    def _send(self, row: Row, backends: list[Backend]) -> None:
        behind = [backend for backend in backends if backend.sent < row.step]
        if not behind:
            return
        images = {f"images/{name}": _pixels(path) for name, path in row.images.items() if path.exists()}
        for backend in behind:
            if self._attempt(backend, partial(backend.log, row.step, row.metrics, images)):
                backend.sent = row.step

    def _attempt(self, backend: Backend, work: Callable[[], None]) -> bool:
        """Do some work of a tracker; whatever it raises is logged and ends the tracker, never the run."""
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                work()
            return True
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            log.warning(
                "train.trackers: %s failed (%s: %s); the run goes on without it, and it gets the missing steps from "
                "metrics.jsonl when the run continues",
                *(backend.name, type(error).__name__, reason[:300]),
            )
            if backend in self.backends:
                self.backends.remove(backend)
                self.stored[backend.name] = backend.record() or {"step": backend.sent}
            return False

    def _read(self, step: int) -> dict[str, Any]:
        """Return what trackers.json holds of this run: a new one, of another recipe, is none of its runs."""
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self.file.read_text())
            if step > 0 or content["recipe"] == self.digest:
                return content["runs"]
        return {}

    def _save(self) -> None:
        for backend in self.backends:
            record = backend.record()
            if record is not None:
                self.stored[backend.name] = record
        if self.stored or self.file.exists():
            content = json.dumps({"recipe": self.digest, "runs": self.stored}, indent=1)
            with log_write_errors(self.file):
                write_atomically(self.file, content.encode())


def rows(lines: Iterable[Mapping[str, Any]], folder: Path, step: int) -> list[Row]:
    """Return the rows of what a run folder has up to a step, in order.

    Args:
        lines: of metrics.jsonl.
        folder: of the images.
        step: the last one.
    """
    by_step: dict[int, Row] = {}
    for line in lines:
        row = by_step.setdefault(line["step"], Row(line["step"]))
        row.metrics |= tagged(line)
    for path in sorted(folder.glob("*.png")):
        match = IMAGE.fullmatch(path.name)
        if match and int(match[2]) <= step:
            row = by_step.setdefault(int(match[2]), Row(int(match[2])))
            row.images[match[1]] = path
    return [by_step[key] for key in sorted(by_step)]


def tagged(line: Mapping[str, float | None]) -> dict[str, float]:
    """Return the metrics of a line of metrics.jsonl under the names that trackers show them by."""
    group = "train" if is_training(line) else "evaluate"
    return {f"{group}/{key}": value for key, value in line.items() if key != "step" and value is not None}


def is_training(line: Mapping[str, float | None]) -> bool:
    """Tell the metrics of training from those of an evaluation."""
    return "img_s" in line


def _pixels(path: Path) -> Any:
    """Return the image in a file, UInt8[H,W,3]."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
