"""Checkpoints of a run, `<out>/checkpoints/step-N`: written atomically, and verified before they are read."""

import json
import logging
import os
import pickle
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from addp_core.base.errors import UserError
from addp_core.base.files import TEMPORARY_PREFIX, read_chunks, sync_to_disk, write_atomically

log = logging.getLogger("addp")

TENSORS, STATE = "training.pt", "state.json"  # the files of a checkpoint
LAST_CHECKPOINT = "last_checkpoint.json"  # in the run folder: the step of the newest checkpoint


class Checkpoints:
    """The checkpoints of a run folder, of which the last `keep` are kept."""

    def __init__(self, out: Path, keep: int):
        self.folder = out / "checkpoints"
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, newest first."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def path(self, step: int) -> Path:
        """Return the folder of one checkpoint."""
        return self.folder / f"step-{step}"

    def write(self, step: int, payload: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Write `payload` (tensors and plain values) and `state` (JSON), then remove all but the last `keep`.

        Raises OSError if the disk is full or not writable; the new checkpoint is then removed and older ones stay.
        """
        temporary = self.folder / f"{TEMPORARY_PREFIX}step-{step}"
        target = self.path(step)
        try:
            temporary.mkdir()
            size, checksum = save_tensors(payload, temporary / TENSORS)
            manifest = {"step": step, "size": size, "crc32": checksum, **state}
            (temporary / STATE).write_text(json.dumps(manifest))
            for path in (temporary / TENSORS, temporary / STATE, temporary):
                sync_to_disk(path)
            self._remove(step)
            os.rename(temporary, target)
            sync_to_disk(self.folder)
            write_atomically(self.folder.parent / LAST_CHECKPOINT, json.dumps({"step": step}).encode())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._remove_old()

    def newest(self) -> int | None:
        """Return the step of the newest intact checkpoint, or None if there is no checkpoint at all.

        Damaged ones are logged and renamed to `damaged-step-N`. Raises UserError if all of them are damaged.
        """
        damaged = [path.name for path in sorted(self.folder.glob("damaged-step-*"))]  # of an earlier call
        for step in self.steps():
            reason = self._damage(step)
            if reason is None:
                self._remove_old()  # a killed run may not have done it
                return step
            damaged.append(f"step-{step} ({reason})")
            renamed = self.folder / f"damaged-step-{step}"
            shutil.rmtree(renamed, ignore_errors=True)
            os.rename(self.path(step), renamed)
            log.warning(
                "%s: damaged (%s); moved to %s, trying the checkpoint before it", self.path(step), reason, renamed
            )
        if damaged:
            raise UserError(
                f"{self.folder}: no checkpoint can be read: {', '.join(damaged)}; "
                f"choose another out, or remove {self.folder.parent} to start over"
            )
        return None

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (payload on the CPU, state) of one checkpoint.

        Raises UserError if the payload holds anything but tensors and plain values, which could run code.
        """
        path = self.path(step) / TENSORS
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: holds more than tensors and plain values; it was not written by a run") from error
        return payload, json.loads((self.path(step) / STATE).read_text())

    def _remove_old(self) -> None:
        for step in self.steps()[self.keep :]:
            self._remove(step)

    def _remove(self, step: int) -> None:
        # Renamed first: if the process is killed in the middle, the rest does not look like a complete checkpoint.
        if self.path(step).exists():
            renamed = self.folder / f"{TEMPORARY_PREFIX}old-step-{step}"
            os.rename(self.path(step), renamed)
            shutil.rmtree(renamed, ignore_errors=True)

    def _damage(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint's files, or None if they are intact."""
        path = self.path(step) / TENSORS
        try:
            state = json.loads((self.path(step) / STATE).read_text())
            size, checksum = path.stat().st_size, 0
            if size != state["size"]:
                return f"{TENSORS} has {size} of {state['size']} bytes"
            for chunk in read_chunks(path):
                checksum = zlib.crc32(chunk, checksum)
            return None if checksum == state["crc32"] else f"{TENSORS} does not match its checksum"
        except (OSError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"


def save_tensors(payload: dict[str, Any], path: Path) -> tuple[int, int]:
    """Write `payload` with torch.save; return the number of bytes and their CRC-32. Raises OSError if that fails."""
    with path.open("wb") as file:
        writer = ChecksumWriter(file)
        try:
            torch.save(payload, cast(IO[bytes], writer))
        except RuntimeError:  # how torch.save reports an OSError
            if writer.error is not None:
                raise writer.error from None
            raise
    return writer.size, writer.checksum


class ChecksumWriter:
    """A file that counts and sums the bytes written to it, and remembers an OSError."""

    def __init__(self, file: IO[bytes]):
        self.file, self.size, self.checksum = file, 0, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
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
