"""The results on disk, from which an interrupted run continues: cells.json, a result for each part of a dataset."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.paths import RECIPE_FILE
from cls.variants.datasets import DatasetPart
from cls.variants.evaluation import Counts

log = logging.getLogger("addp")

RESULTS_FILE = "cells.json"


@contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Turn an OSError within into a UserError about the key `out`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror or error})") from error


class ResultStore:
    """The results in the folder `out`, by the digest of everything they depend on."""

    def __init__(self, out: Path, state: PartialState):
        self.out, self.state = out, state
        self.counts: dict[str, Counts] = {}
        self._content: dict[str, dict[str, Any]] = {}  # of the file

    def open(self, recipe_text: str) -> None:
        """Read the results in the folder, the same on all processes, and write the recipe into it."""
        shared: list[dict[str, dict[str, Any]]] = [{}]
        if self.state.is_main_process:
            with write_errors(self.out):
                shared = [self._read()]
                write_atomically(self.out / RECIPE_FILE, recipe_text.encode())
        broadcast_object_list(shared)
        self._content = shared[0]
        self.counts = {key: Counts(**entry["counts"]) for key, entry in self._content.items()}
        if self.counts:
            log.info("out: found %d results in %s", len(self.counts), self.out / RESULTS_FILE)

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.out / RESULTS_FILE
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise UserError(f"out: {path} is damaged ({error}); remove it to evaluate everything again") from error

    def add(self, key: str, part: DatasetPart, counts: Counts) -> None:
        """Keep a result; it is on disk when this returns."""
        self.counts[key] = counts
        self._content[key] = {"title": part.title, "counts": asdict(counts)}
        if self.state.is_main_process:
            with write_errors(self.out):
                write_atomically(self.out / RESULTS_FILE, (json.dumps(self._content, indent=1) + "\n").encode())


def result_key(settings: Mapping[str, Any]) -> str:
    """Return the digest of the settings of a result."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
