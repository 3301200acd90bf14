"""Finds the image files of a COCO dataset, also where file_name is a URL, has backslashes or repeats a folder."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit


def find_image_files(folder: Path, names: Sequence[str]) -> list[str | None]:
    """Return for each file_name the path of its file below the folder, or None if there is none.

    A name that is no path below the folder is looked up by its last parts, the longest that exist. If two names end at
    one file so, neither is accepted, because one of them would be another image. Every directory is listed once.
    """

    @cache
    def files_of(directory: str) -> frozenset[str]:
        try:
            with os.scandir(os.path.join(folder, directory)) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except (OSError, ValueError):  # ValueError: a null byte
            return frozenset()

    def exists(path: str) -> bool:
        directory, name = os.path.split(path)
        return name in files_of(directory)

    paths: list[str | None] = []
    for name in names:
        if is_inside(name) and exists(os.path.normpath(name)):
            paths.append(name)
        else:
            paths.append(next(filter(exists, _last_parts(name)), None))
    counts = Counter(os.path.normpath(path) for path in paths if path)
    return [
        path if path is None or path == name or counts[path] == 1 else None
        for path, name in zip(paths, names, strict=True)
    ]


def is_inside(name: str) -> bool:
    """Check whether a file_name is a relative path that stays below its folder."""
    return not os.path.isabs(name) and ".." not in Path(name).parts


def _last_parts(name: str) -> Iterator[str]:
    """Yield the last parts of a path or URL as relative paths, the longest first."""
    path = unquote(urlsplit(name).path) if "://" in name else name
    parts = [part for part in re.split(r"[/\\]+", path) if part not in ("", ".")]
    for start in range(len(parts)):
        if ".." not in parts[start:]:
            yield "/".join(parts[start:])
