"""Checkpoints of a run, `<out>/checkpoints/step-N`: written atomically, and verified before they are read.

A sharded run (`train.parallel=fsdp`) writes one file for each process. Any number of processes reads them, sharded or
not. They are files of tensors as in other runs: those of torch.distributed.checkpoint have pickled metadata, which
could run code.
"""

import json
import logging
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from addp_core.base.errors import UserError
from addp_core.base.files import TEMPORARY_PREFIX, read_chunks, sync_to_disk, write_atomically
from addp_core.training.parallel import join_parts, own_part

log = logging.getLogger("addp")

TENSORS, STATE = "training.pt", "state.json"  # the files of a checkpoint
PART = "training-{rank}.pt"  # of a sharded run
LAST_CHECKPOINT = "last_checkpoint.json"  # in the run folder: the step of the newest checkpoint


class Checkpoints:
    """The checkpoints of a run folder, of which the last `keep` are kept."""

    def __init__(self, out: Path, keep: int):
        self.folder = out / "checkpoints"
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, newest first."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def path(self, step: int) -> Path:
        """Return the folder of one checkpoint."""
        return self.folder / f"step-{step}"

    def write(self, step: int, payload: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Write `payload` (tensors and plain values) and `state` (JSON), then remove all but the last `keep`.

        Raises OSError if the disk is full or not writable; the new checkpoint is then removed and older ones stay.
        """
        temporary = self._temporary(step)
        try:
            temporary.mkdir()
            size, checksum = save_tensors(payload, temporary / TENSORS)
            sync_to_disk(temporary / TENSORS)
            self._complete(step, {"step": step, "size": size, "crc32": checksum, **state})
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def write_sharded(self, step: int, payload: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Do the same on all processes, for a payload with sharded tensors: each of them writes its part.

        Raises OSError on all processes if one of them cannot write.
        """
        process, temporary = PartialState(), self._temporary(step)
        part = own_part(payload, process.process_index)
        file = temporary / PART.format(rank=process.process_index)

        def write_part() -> tuple[int, int]:
            temporary.mkdir(exist_ok=True)
            written = save_tensors(part, file)
            sync_to_disk(file)
            return written

        try:
            parts = _agree(write_part)
            manifest = {"step": step, "parts": parts, **state}
            _agree(lambda: self._complete(step, manifest) if process.is_main_process else None)
        except BaseException:
            if process.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _temporary(self, step: int) -> Path:
        return self.folder / f"{TEMPORARY_PREFIX}step-{step}"

    def _complete(self, step: int, manifest: Mapping[str, Any]) -> None:
        """Turn the temporary folder, in which the tensors are, into a checkpoint; remove all but the last `keep`."""
        temporary = self._temporary(step)
        (temporary / STATE).write_text(json.dumps(manifest))
        for path in (temporary / STATE, temporary):
            sync_to_disk(path)
        self._remove(step)
        os.rename(temporary, self.path(step))
        sync_to_disk(self.folder)
        write_atomically(self.folder.parent / LAST_CHECKPOINT, json.dumps({"step": step}).encode())
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
        state = json.loads((self.path(step) / STATE).read_text())
        parts = [_load_tensors(self.path(step) / name) for name, _, _ in _tensor_files(state)]
        return join_parts(parts), state

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
        try:
            state = json.loads((self.path(step) / STATE).read_text())
            for name, expected_size, expected_checksum in _tensor_files(state):
                path = self.path(step) / name
                size, checksum = path.stat().st_size, 0
                if size != expected_size:
                    return f"{name} has {size} of {expected_size} bytes"
                for chunk in read_chunks(path):
                    checksum = zlib.crc32(chunk, checksum)
                if checksum != expected_checksum:
                    return f"{name} does not match its checksum"
        except (OSError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        return None


def check_length(out: Path, step: int, total: int) -> None:
    """Raise UserError if a run has done more steps than the `total` that its recipe now asks for."""
    if step > total:
        raise UserError(
            f"out={out}: has already reached step {step}, but this recipe ends at {total}; expected train.steps={step} "
            "or more, or another out"
        )


def _tensor_files(state: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Return the name, size and CRC-32 of each file of tensors, from a checkpoint's state.json."""
    if "parts" not in state:
        return [(TENSORS, state["size"], state["crc32"])]
    return [(PART.format(rank=rank), size, checksum) for rank, (size, checksum) in enumerate(state["parts"])]


def _load_tensors(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: holds more than tensors and plain values; it was not written by a run") from error


def _agree(work: Callable[[], Any]) -> list[Any]:
    """Do some work on each process and return the results of all. Raises OSError on all of them if one of them does."""
    try:
        result = work()
    except OSError as error:
        result = error
    results = gather_object([result])
    for result in results:
        if isinstance(result, OSError):
            raise result
    return results


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
