"""Files that are whole or absent: written under a temporary name beside their own, flushed to the disk, renamed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"  # begins the name of everything unfinished


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on leaving without an error it is flushed to the disk and becomes `path`."""
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    try:
        yield temporary
        sync_to_disk(temporary)
        os.replace(temporary, path)
        sync_to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a small file; after a kill at any moment it holds its old content or the new one."""
    with atomic_replace(path) as temporary:
        temporary.write_bytes(content)


def sync_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
