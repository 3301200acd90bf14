"""What a run reads from disk, as inputs.json in its folder records it: by digest, so that it may move.

{"files": {"tokenizer": <digest of the content>},                   of the keys that are paths of files
 "paths": {"data.source": "/photos"},                               of the keys that are paths of datasets
 "datasets": {"train": {"digest": <of the listing>, "images": 1281167}}}
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from addp_core.base.errors import UserError
from addp_core.base.files import read_chunks, write_atomically
from addp_core.base.paths import INPUTS_FILE, TOKENS_FILE, expand_home
from addp_core.training.run_recipe import COMPUTE_ONLY_KEYS, RunRecipe, Values
from addp_core.weights.files import MODEL_FILE

log = logging.getLogger("addp")


class Dataset(Protocol):
    """What is recorded of a dataset."""

    def __len__(self) -> int:
        """Return the number of images."""

    def digest(self) -> str:
        """Return a digest of the listing, which does not depend on where the dataset lies."""


OpenDatasets = Callable[[], Mapping[str, Dataset]]  # returns the run's datasets by name, such as "train" and "val"


class Inputs:
    """The inputs of a run: recorded in `out`, and as a recipe names them now."""

    def __init__(self, out: Path, recipe: RunRecipe):
        self.path, self.recipe = out / INPUTS_FILE, recipe
        try:
            self.record: dict[str, dict[str, Any]] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.record = {}

    def without_moved(self, keys: list[str], previous: Values) -> list[str]:
        """Return those of the changed keys that may name another input than the recipe `previous` of the run.

        The others are files with the recorded content, and, where no content is recorded, what has moved with the run.
        Of datasets, `same_datasets` and `check_datasets` tell.
        """
        return [key for key in keys if not self._may_have_moved(key, previous)]

    def _may_have_moved(self, key: str, previous: Values) -> bool:
        kind = self.recipe.paths.get(key)
        if kind == "cache" or (kind == "dataset" and "datasets" in self.record):
            return True
        if kind == "file" and key in self.record.get("files", {}):
            return file_digest(self.recipe.values[key]) == self.record["files"][key]
        return bool(kind) and self.recipe.moved_with_run(key, previous)

    def record_files(self) -> None:
        """Record the content of the files, if that has not been done when the run began."""
        if "files" not in self.record:
            digests = {key: file_digest(self.recipe.values[key]) for key in self._keys("file")}
            self._write({**self.record, "files": {key: value for key, value in digests.items() if value}})

    def check_datasets(self, datasets: Mapping[str, Dataset]) -> None:
        """Compare the datasets with the recorded ones, and record them.

        Datasets that moved, or that changed in their place, are logged. Raises UserError if both is true: these are
        other datasets.
        """
        current = _entries(datasets)
        paths = {key: _place_on_disk(self.recipe.values[key]) for key in self._keys("dataset")}
        before = self.record.get("paths", {})
        moved = {
            key: paths.get(key, "none")
            for key in before.keys() | paths.keys()
            if before and before.get(key) != paths.get(key)
        }
        counts = self._describe_changes(current)
        if moved and counts:
            given = ", ".join(f"{key}={path} (was {before.get(key, 'none')})" for key, path in moved.items())
            raise UserError(
                f"out={self.path.parent}: holds a run on other data: {given}; {counts}; "
                "give the run's own data or choose another out"
            )
        for key, path in moved.items():
            log.warning("%s: %s instead of %s, with the same images", key, path, before.get(key, "none"))
        if counts:
            log.warning(
                "data: changed since this run last read it: %s; the order of the images and the length of an epoch "
                "follow the new data",
                counts,
            )
        self._write({**self.record, "paths": paths, "datasets": current})

    def check_files(self) -> None:
        """Warn of files that have other content than when the run began. A file that is gone is no reason to warn: the
        run misses it when it reads it.
        """
        recorded = self.record.get("files", {})
        for key in sorted(recorded.keys() & self._keys("file")):
            if file_digest(self.recipe.values[key]) in (None, recorded[key]):
                continue
            log.warning(
                "%s: %s has changed since this run began, and what has been computed is of the former file; for a "
                "result of this one choose another out",
                *(key, self.recipe.values[key]),
            )

    def check_finished(self, datasets: OpenDatasets | None) -> None:
        """Warn of files and datasets that have changed in their place since the run read them.

        Datasets are opened if they are on this disk; a finished run needs none of them.
        """
        self.check_files()
        on_disk = all(os.path.exists(expand_home(self.recipe.values[key])) for key in self._keys("dataset"))
        if datasets is None or "datasets" not in self.record or not on_disk:
            return
        with contextlib.suppress(OSError, UserError):
            if counts := self._describe_changes(_entries(datasets())):
                log.warning(
                    "data: changed since this run read it: %s; its result is of the former images; for one of these "
                    "choose another out",
                    counts,
                )

    def _describe_changes(self, current: Mapping[str, Mapping[str, Any]]) -> str:
        """Return how datasets differ from the recorded ones, "" if they do not: 'train: 5 images instead of 4'."""
        recorded = self.record.get("datasets", {})
        return "; ".join(
            f"{name}: {_describe_change(recorded[name]['images'], now['images'])}"
            for name, now in current.items()
            if name in recorded and recorded[name]["digest"] != now["digest"]
        )

    def same_datasets(self, datasets: OpenDatasets | None) -> bool:
        """Check whether the recorded datasets are these; true if none are recorded. What an earlier version did not
        record is not compared.
        """
        if "datasets" not in self.record:
            return True
        recorded = {name: entry["digest"] for name, entry in self.record["datasets"].items()}
        if datasets is None:
            return False
        return recorded == {name: each.digest() for name, each in datasets().items() if name in recorded}

    def _keys(self, kind: str) -> list[str]:
        """Return the keys of this kind that are given; those that change no result are not recorded."""
        keys = (key for key, each in self.recipe.paths.items() if each == kind and key not in COMPUTE_ONLY_KEYS)
        return [key for key in keys if self.recipe.values.get(key)]

    def _write(self, record: dict[str, dict[str, Any]]) -> None:
        if record != self.record:
            write_atomically(self.path, json.dumps(record).encode())
        self.record = record


def _entries(datasets: Mapping[str, Dataset]) -> dict[str, dict[str, Any]]:
    """Return what inputs.json says of datasets."""
    return {name: {"digest": each.digest(), "images": len(each)} for name, each in datasets.items()}


def file_digest(source: Any) -> str | None:
    """Return a digest of a file's content, of the model of a run folder, or of what a token cache says of its ids.

    Returns None if there is no such file.
    """
    path = expand_home(str(source))
    if path.is_dir():
        path = path / (TOKENS_FILE if (path / TOKENS_FILE).exists() else MODEL_FILE)
    digest = hashlib.blake2b(digest_size=16)
    try:
        for chunk in read_chunks(path):
            digest.update(chunk)
    except OSError:  # a name instead of a path, or a wrong path, which is reported when it is read
        return None
    return digest.hexdigest()


def _place_on_disk(text: str) -> str:
    """Return the absolute path, with links followed, of what is on disk; any other text as it is."""
    path = os.path.expanduser(text)
    return os.path.realpath(path) if os.path.exists(path) else text


def _describe_change(before: int, now: int) -> str:
    if before == now:
        return f"{now:,} images as before, but others, or with other labels"
    return f"{now:,} images instead of {before:,}"
