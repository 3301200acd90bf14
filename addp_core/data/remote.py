"""Ranges of bytes of files at addresses (https, s3 and whatever else fsspec reads), with retries and timeouts."""

import asyncio
import http.client
import io
import logging
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from addp_core.base.addresses import CREDENTIALS_FIX, TEMPORARY_STATUS, fill_variables, has_credentials, without_secrets
from addp_core.base.errors import UserError

log = logging.getLogger("addp")

MAX_ADDRESSES = 1_000_000  # that braces may stand for
CONNECTIONS = 32  # requests of one process at the same time
FIRST_REQUEST, LONGEST_REQUEST = 1 << 14, 1 << 20  # bytes of a `RemoteFile`
SMALL_SKIP = 1 << 16  # bytes that are read rather than skipped
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries; it doubles
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
# What changes with a file's content, under the names that the file systems of fsspec give it: checksums, then times.
TAGS = (
    *("ETag", "etag", "xet_hash", "blob_id", "sha", "Content-MD5", "Digest", "generation"),
    *("LastModified", "Last-Modified", "last_modified", "modified", "mtime"),
)
BRACES = re.compile(r"(?<!\$)\{([^{}]*)\}")


class Address(NamedTuple):
    """The address of a file."""

    shown: str  # by messages and run folders: without the query
    url: str  # as it is read, with credentials
    text: str  # as the recipe has it: with the query, and with variables in place of credentials


class Version(NamedTuple):
    """A file's number of bytes, and what changes with its content: a checksum or a time; "" if the server has none."""

    size: int
    tag: str


class Range(NamedTuple):
    """The bytes `start` to `end` (not included) of the file at an address."""

    address: Address
    start: int
    end: int


def expand(pattern: str, key: str = "data.source") -> list[Address]:
    """Return the addresses that a pattern stands for: {000..999} are numbers, {a,b} alternatives, ${NAME} a variable.

    Raises UserError if the pattern holds credentials or its braces cannot be read.
    """
    if has_credentials(pattern):
        raise UserError(f"{key}: {CREDENTIALS_FIX}")
    parts, count = [], 1
    for i, part in enumerate(BRACES.split(pattern)):
        choices = _choices(part, key) if i % 2 else [part]
        count *= len(choices)
        if count > MAX_ADDRESSES:
            raise UserError(f"{key}: {pattern} stands for more than {MAX_ADDRESSES:,} files; give fewer")
        parts.append(choices)
    texts = ["".join(choice) for choice in product(*parts)]
    return [Address(text.partition("?")[0], fill_variables(text, key), text) for text in texts]


def _choices(braces: str, key: str) -> Sequence[str]:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
    if match is None:
        if "," in braces:
            return braces.split(",")
        raise UserError(f"{key}: found {{{braces}}}, expected numbers such as {{000..999}} or a list such as {{a,b}}")
    first, last, digits = int(match[1]), int(match[2]), len(match[1])
    if last < first or last - first >= MAX_ADDRESSES:
        raise UserError(f"{key}: found {{{braces}}}, expected at most {MAX_ADDRESSES:,} ascending numbers")
    return [f"{number:0{digits}d}" for number in range(first, last + 1)]


@dataclass
class RemoteFiles:
    """Reads ranges of files that have one scheme. It may be sent to other processes, which connect for themselves.

    A connection that breaks or stays silent for `timeout` seconds is tried again, up to `tries` times in all, and so is
    an answer of the server that it is busy or failed. All errors are `UserError`s that name the address.
    """

    tries: int
    timeout: float

    def __post_init__(self) -> None:
        self._system: Any = None  # fsspec's, which is of one process
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"tries": self.tries, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def version(self, address: Address) -> Version:
        """Return the version of a file."""
        system = self._connect(address)
        # Hugging Face's would say the size only, or what it has said before.
        options = {"expand_info": True} if _scheme(address) == "hf" else {}
        for attempt in self._attempts(address):
            try:
                info = system.info(address.url, **options)
                if info.get("size") is None:
                    raise _UselessAnswerError("the server does not say how large it is")
                return Version(int(info["size"]), next((str(info[tag]) for tag in TAGS if info.get(tag)), ""))
            except Exception as error:
                attempt.failed(error)
        raise AssertionError("unreachable")

    def check_ranges(self, address: Address) -> None:
        """Raise UserError if the server of a file cannot send parts of files."""
        size = self.version(address).size
        system = self._connect(address)
        if size < 2 or PACKAGES.get(_scheme(address)) != "aiohttp":
            return
        for attempt in self._attempts(address):
            try:
                # fsspec's files, other than its ranges, look at the answer before they read all of it.
                with system.open(address.url, "rb", size=size, block_size=1, cache_type="none") as file:
                    file.seek(size - 1)
                    file.read(1)
                return
            except ValueError:
                attempt.failed(_UselessAnswerError("the server sends whole files only (no range requests)"))
            except Exception as error:
                attempt.failed(error)

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of all ranges, which are requested together."""
        # No request stands for zero bytes: HTTP counts the last byte in.
        found = {i: b"" for i, each in enumerate(ranges) if each.start == each.end}
        missing = [i for i in range(len(ranges)) if i not in found]
        if not missing:
            return [b""] * len(ranges)
        system = self._connect(ranges[0].address)
        attempts = self._attempts(ranges[0].address)
        while missing:
            attempt = next(attempts)
            answers = self._request(system, [ranges[i] for i in missing])
            failures: list[tuple[int, Exception]] = []
            for i, answer in zip(missing, answers, strict=True):
                start, end = ranges[i].start, ranges[i].end
                if isinstance(answer, bytes) and len(answer) == end - start:
                    found[i] = answer
                elif isinstance(answer, bytes) and len(answer) > end - start:
                    failures.append((i, _UselessAnswerError("the server sent more than the part that was asked for")))
                elif isinstance(answer, bytes):
                    failures.append((i, OSError(f"sent {len(answer):,} of {end - start:,} bytes")))
                else:
                    failures.append((i, answer))
            missing = [i for i, _ in failures]
            if failures:
                worst = max(failures, key=lambda failure: _is_final(failure[1]))
                attempt.address = ranges[worst[0]].address
                attempt.failed(worst[1])
        return [found[i] for i in range(len(ranges))]

    def _request(self, system: Any, ranges: Sequence[Range]) -> list[Any]:
        """Return the bytes of each range, or the exception."""
        urls = [each.address.url for each in ranges]
        options = {"batch_size": CONNECTIONS} if system.async_impl else {}
        try:
            starts, ends = [each.start for each in ranges], [each.end for each in ranges]
            return list(system.cat_ranges(urls, starts, ends, on_error="return", **options))
        except Exception as error:
            return [error] * len(ranges)

    def _attempts(self, address: Address) -> "Iterator[_Attempt]":
        for number in range(1, self.tries + 1):
            yield _Attempt(address, number, self.tries, self.timeout)

    def _connect(self, address: Address) -> Any:
        """Return fsspec's file system (untyped), connected in this process."""
        if self._process == os.getpid():
            return self._system
        scheme = _scheme(address)
        try:
            from fsspec.core import url_to_fs

            self._system, _ = url_to_fs(address.url, **_options(scheme, self.timeout))
        except ImportError as error:
            package = PACKAGES.get(scheme) or (error.name or "").partition(".")[0] or "fsspec"
            extra = (
                'pip install "addp[stream]"' if package in ("aiohttp", "s3fs", "fsspec") else f"pip install {package}"
            )
            raise UserError(f"data.source: {scheme}:// needs the package {package}; add it with: {extra}") from error
        except ValueError as error:
            raise UserError(
                f"data.source: fsspec cannot read {address.shown} ({without_secrets(str(error))})"
            ) from None
        self._process = os.getpid()
        return self._system


class RemoteFile(io.RawIOBase):
    """A file at an address, of which the parts are requested that are read. Wrap it in `io.BufferedReader`.

    A request is for `FIRST_REQUEST` bytes. If little is skipped between requests, each is twice as long as the one
    before, so that a tar of small images is read in few requests, and one of large images without their contents.
    """

    def __init__(self, files: RemoteFiles, address: Address, size: int):
        self._files, self._address, self._size, self._position = files, address, size, 0
        self._first, self._content = 0, b""  # the last request
        self._length = FIRST_REQUEST

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return true."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to another position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read bytes of one request; none at the end of the file."""
        if self._position >= self._size:
            return 0
        if not self._first <= self._position < self._first + len(self._content):
            self._request(self._position)
        start = self._position - self._first
        part = self._content[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _request(self, start: int) -> None:
        skipped = start - self._first - len(self._content)
        small = 0 <= skipped <= SMALL_SKIP and self._content
        self._length = min(2 * self._length, LONGEST_REQUEST) if small else FIRST_REQUEST
        [self._content] = self._files.read([Range(self._address, start, min(start + self._length, self._size))])
        self._first = start


class _UselessAnswerError(Exception):
    """The server's answer will not become better."""


@dataclass
class _Attempt:
    address: Address
    number: int
    tries: int
    timeout: float

    def failed(self, error: Exception) -> None:
        """Log an error and wait, if it may pass and there are tries left. Raises UserError otherwise."""
        reason = _reason(error, self.address, self.timeout)
        if _is_final(error):
            raise UserError(f"data.source: {self.address.shown}: {reason}{_fix(error)}") from None
        if self.number == self.tries:
            raise UserError(
                f"data.source: {self.address.shown}: {reason}, {self.tries} times; check the connection and start the "
                "command again, or raise data.tries"
            ) from None
        log.warning("data: %s: %s; try %d of %d follows", self.address.shown, reason, self.number + 1, self.tries)
        pause = min(FIRST_PAUSE * 2 ** (self.number - 1), LONGEST_PAUSE)
        # Not from the random numbers of training; and not all processes at the same moment.
        time.sleep(pause * random.SystemRandom().uniform(0.5, 1.0))


def _scheme(address: Address) -> str:
    return address.url.partition(":")[0].lower()


def _options(scheme: str, timeout: float) -> dict[str, Any]:
    """Return the options of fsspec's file system of a scheme; the user's own (fsspec.config) go on top."""
    from fsspec.config import conf

    given = conf.get(scheme, {})
    if PACKAGES.get(scheme) == "aiohttp":
        import aiohttp

        # A transfer may take longer than a silence, but not for ever.
        limits = aiohttp.ClientTimeout(total=10 * timeout, sock_connect=timeout, sock_read=timeout)
        # trust_env: of ~/.netrc and of proxies
        return {"client_kwargs": {"timeout": limits, "trust_env": True, **given.get("client_kwargs", {})}}
    if PACKAGES.get(scheme) == "s3fs":
        # No tries of its own, each with as many pauses: `_Attempt` is told of every failure.
        ours = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 0}}
        return {"config_kwargs": {**ours, **given.get("config_kwargs", {})}}
    return {}


def _cause(error: BaseException) -> BaseException:
    """Return what was behind fsspec's FileNotFoundError, which it raises for broken connections too."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(cause: BaseException) -> int | None:
    """Return the HTTP status of aiohttp's and botocore's errors."""
    status = getattr(cause, "status", None)
    response = getattr(cause, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def _is_final(error: Exception) -> bool:
    """Check whether another try would end in the same way."""
    cause = _cause(error)
    status = _status(cause)
    if status is not None:
        return 400 <= status < 500 and status not in TEMPORARY_STATUS
    final = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, _UselessAnswerError)
    return isinstance(cause, final) or _lacks_credentials(cause)


def _lacks_credentials(cause: BaseException) -> bool:
    return "Credential" in type(cause).__name__  # botocore's NoCredentialsError and its kin


def _reason(error: Exception, address: Address, timeout: float) -> str:
    cause = _cause(error)
    status = _status(cause)
    if status is not None:
        return f"HTTP {status} {http.client.responses.get(status, '')}".strip()
    if isinstance(cause, FileNotFoundError):
        return "not found (404)"
    if isinstance(cause, PermissionError):
        return "access denied (403)"
    if isinstance(cause, TimeoutError | asyncio.TimeoutError):
        return f"no answer within {timeout:g} seconds"
    text = " ".join(str(cause).replace(address.url, address.shown).split()).partition(": <")[0]
    text = without_secrets(text)
    if isinstance(cause, _UselessAnswerError) or _lacks_credentials(cause):
        return text
    return f"the connection failed ({type(cause).__name__}{f': {text}' if text else ''})"


def _fix(error: Exception) -> str:
    cause = _cause(error)
    status = _status(cause)
    if isinstance(cause, FileNotFoundError) or status in (404, 410):
        return "; check the address"
    if isinstance(cause, PermissionError) or status in (401, 403):
        return "; check your credentials (docs/data.md, Shards at an address)"
    if _lacks_credentials(cause):
        return "; see docs/data.md (Shards at an address); for a public bucket, export FSSPEC_S3_ANON=true"
    if isinstance(cause, _UselessAnswerError):
        return "; expected a server that can send a part of a file"
    return ""
