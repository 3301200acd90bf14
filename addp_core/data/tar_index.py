"""The indexes of tar shards in the user's cache folder, so that the headers of a shard are read once and not by every
process at every start.

    <cache>/addp/tars/<digest of the path>   a line with the checksum of the rest, then JSON: the shard's path, size and
                                             time of change, the rules by which it was read, and the index

An index that is damaged, or of a shard that has changed since, is built anew. Of several processes that need the same
one, the first builds it and the others wait for it. Where the folder cannot be written, each process builds its own.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from addp_core.base.files import write_atomically
from addp_core.base.paths import user_cache

FORMAT = 3
MIN_BYTES = 1 << 24  # smaller shards are read sooner than looked up
SETTLED = 2.0  # seconds after which a change of a file changes its time too, on every file system

Index = dict[str, Any]  # what JSON can hold


def cached_index(shard: Path, rules: Any, build: Callable[[], Index]) -> Index:
    """Return the stored index of a shard on the disk, or the one that `build` returns, which is then stored.

    rules: whatever else the index depends on. Errors of `build` are raised.
    """
    status = shard.stat()
    if status.st_size < MIN_BYTES:
        return build()

    def is_settled() -> bool:
        after = shard.stat()
        unchanged = (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
        return unchanged and time.time() - status.st_mtime > SETTLED

    return stored_index(os.path.realpath(shard), [status.st_size, status.st_mtime_ns], rules, build, is_settled)


def stored_index(
    name: str, version: list[Any], rules: Any, build: Callable[[], Index], is_settled: Callable[[], bool] = lambda: True
) -> Index:
    """Return the stored index of the shard of this name and version, or the one that `build` returns.

    The latter is then stored, if `is_settled` says that the shard has not changed meanwhile.
    """
    key = [FORMAT, name, *version, repr(rules)]
    file = user_cache("tars") / hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    with _one_at_a_time(file):
        index = _read(file, key)
        if index is None:
            index = build()
            if is_settled():
                with contextlib.suppress(OSError):  # a full disk, or one that is read-only
                    _write(file, key, index)
        return index


@contextlib.contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Keep other processes from the same index within the block, where the file system can do that."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(f"{file}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(file: Path, key: list[Any]) -> Index | None:
    try:
        checksum, _, content = file.read_bytes().partition(b"\n")
        if checksum != _checksum(content):
            return None
        stored = json.loads(content)
    except (OSError, ValueError):
        return None
    return stored["index"] if stored["key"] == key else None


def _write(file: Path, key: list[Any], index: Index) -> None:
    content = json.dumps({"key": key, "index": index}, separators=(",", ":")).encode()
    write_atomically(file, _checksum(content) + b"\n" + content)


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()
