"""Atomic file writes (under a temporary name in the same folder, flushed, renamed), and reading of large files."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from addp_core.base.errors import UserError

TEMPORARY_PREFIX = ".tmp-"  # every unfinished file or folder has a name that begins with this
CHUNK_BYTES = 1 << 24  # of a large file, read at a time


@contextlib.contextmanager
def atomic_replace(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` when the block ends.

    The file is flushed to disk before it is renamed. If the block raises, it is deleted instead.

    sync: false for one of many files, which the caller flushes together (`os.sync`) before it takes them for complete.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
        if sync:
            sync_to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that even a killed process leaves either the old or the new content."""
    with atomic_replace(path) as temporary:
        temporary.write_bytes(content)


def sync_to_disk(path: Path) -> None:
    """Block until a file or folder has been written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(folder: Path, size: float, subject: str, advice: str) -> None:
    """Raise UserError if `size` bytes do not fit on the disk of a folder. Raises OSError if that cannot be told.

    The message begins with `subject`, as in "out: cache needs", and ends with `advice`.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{subject} {size / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; {advice}")


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in parts that fit in memory."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
