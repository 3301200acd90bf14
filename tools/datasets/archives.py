"""Archives of a dataset: downloaded in parts that continue, verified, and unpacked without leaving their folder."""

import contextlib
import hashlib
import http.client
import logging
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from addp_core.base.addresses import TEMPORARY_STATUS
from addp_core.base.errors import UserError
from addp_core.base.files import CHUNK_BYTES, atomic_replace, check_space, read_chunks

log = logging.getLogger("addp")

PARTIAL = ".part"  # after the name of a file of which only the beginning has been downloaded
TRIES = 5  # of a download that makes no progress
TIMEOUT = 30  # seconds without a byte


def is_url(source: str) -> bool:
    """Return whether a source is an address rather than a path."""
    return source.lower().startswith(("http://", "https://"))


def download(url: str, path: Path, advice: str, key: str) -> None:
    """Download a file to `path`, from where an earlier try has stopped.

    Raises UserError, which ends with `advice`, if the address does not answer, or the disk is full.

    key: of the recipe that holds the address, for the message if it is none.
    """
    partial, failures = path.with_name(path.name + PARTIAL), 0
    while True:
        before = _size(partial)
        try:
            _continue_download(url, partial)
            with _writing(partial):
                partial.replace(path)
            return
        except (http.client.InvalidURL, UnicodeError) as error:  # a space, no port, or letters that are not ASCII
            raise UserError(f"{key}: found {url!r}, expected an address as a browser copies it ({error})") from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in TEMPORARY_STATUS:
                raise UserError(f"{url}: found {error.code} {error.reason}; {advice}") from error
            failures = 0 if _size(partial) > before else failures + 1
            if failures == TRIES:
                reason = getattr(error, "reason", error)
                raise UserError(f"{url}: cannot be reached ({reason}); {advice}") from error
            log.warning("%s: %s; another try", url, getattr(error, "reason", error))
            time.sleep(failures)


def _continue_download(url: str, partial: Path) -> None:
    start = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left to send
            return
        raise
    with response:
        if start and response.status != 206:  # the server sends the whole file
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        left = (total or 0) - start
        with _writing(partial):
            check_space(partial.parent, left, f"{partial.parent}: {partial.stem} needs", "choose another out")
            file = partial.open("ab" if start else "wb")
        with file, _bar(partial.stem, total, start) as bar:
            while chunk := response.read(1 << 20):
                with _writing(partial):
                    file.write(chunk)
                    file.flush()
                bar.update(len(chunk))
    if total and _size(partial) < total:
        raise ConnectionError(f"the connection ended after {_size(partial):,} of {total:,} bytes")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the disk into a UserError: all others are of the network, and may pass."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _bar(name: str, total: int | None, start: int = 0) -> tqdm:
    return tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, disable=None)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check_md5(path: Path, expected: str) -> None:
    """Raise UserError if the MD5 of a file, which its publisher states, is another one."""
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in read_chunks(path):
        digest.update(chunk)
    if digest.hexdigest() != expected:
        raise UserError(f"{path}: found MD5 {digest.hexdigest()}, expected {expected}; remove it to download it again")


def unpack(path: Path, folder: Path, strip: int = 0) -> None:
    """Unpack a zip or tar archive into `folder`, which the caller flushes to the disk.

    Files that are there in their full size are kept.

    strip: leading folders to leave out. Raises UserError if it is damaged, or if a member would lie outside of it.
    """
    made = set()
    with tqdm(desc=f"unpacking {path.name}", unit=" files", disable=None) as bar:
        for name, size, file in members(path):
            parts = PurePosixPath(name).parts
            if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
                raise UserError(f"{path}: found the member {name!r}, which would be written outside of {folder}")
            if len(parts) <= strip:
                continue
            target = folder.joinpath(*parts[strip:])
            bar.update()
            if _size(target) == size and target.is_file():
                continue
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            with atomic_replace(target, sync=False) as temporary, temporary.open("wb") as output:
                shutil.copyfileobj(file, output, CHUNK_BYTES)


def members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield (name, size in bytes, content) of the files of an archive; links and devices are left out.

    Raises UserError if it is damaged or of another kind.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if not member.is_dir():
                        with archive.open(member) as file:
                            yield member.filename, member.file_size, file
            return
        with tarfile.open(path, "r|*") as tar:
            for each in tar:
                if each.isfile() and (content := tar.extractfile(each)):
                    yield each.name, each.size, content
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: damaged, or no zip or tar archive ({error})") from error
