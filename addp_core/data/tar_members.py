"""What one tar holds: images, with their labels from files beside them, and what is passed over."""

import contextlib
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import IO, NamedTuple

from addp_core.base.errors import UserError
from addp_core.data.images import IMAGE_EXTENSIONS
from addp_core.data.listing import SYSTEM_FOLDERS, Listing, is_image, is_tar, why_passed_over
from addp_core.data.tar_index import Index

log = logging.getLogger("addp")

# A WebDataset's label of the image x.jpg is the text of x.cls, or one of these numbers or names in x.json.
LABEL_FILE, JSON_FILE = ".cls", ".json"
JSON_LABELS = ("label", "cls", "class", "class_id", "target")
MAX_LABEL_BYTES = 1 << 20  # of a label file; longer ones hold something else
MAX_LABEL = 10_000_000  # of a class's number; larger ones number something else, and each class takes memory
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
BLOCK = 512  # bytes of a tar's header; contents are padded to as many
MAX_PADDING = 1 << 22  # bytes of zeros at the end of a tar among which the beginning of another one is looked for
RULES = [sorted(IMAGE_EXTENSIONS), sorted(SYSTEM_FOLDERS)]  # by which members are sorted out


class Extent(NamedTuple):
    """Where the content of a member lies in the file of its shard, in bytes."""

    offset: int
    size: int


class Label(NamedTuple):
    """What a label file says: a class's number or name, or None if it is JSON without one; or why it says nothing."""

    value: int | str | None
    problem: str = ""


class TarMembers:
    """The members of one tar, by their paths; a tar inside is a folder of its name without the extension.

    where: the path or address of the tar, for messages.
    """

    def __init__(self, where: str):
        self.where = where
        self.images: dict[str, Extent] = {}  # the later of two members of one name replaces the earlier, as in tar
        self.printed: dict[str, str] = {}  # paths with the extensions of tars inside, for messages
        self.labels: dict[str, Label] = {}  # contents of label files
        self.listing = Listing()
        self.is_truncated = False  # it lacks the zeros at the end of a tar

    @classmethod
    def from_index(cls, where: str, index: Index) -> "TarMembers":
        """Return the members that `as_index` has described."""
        members = cls(where)
        members.images = {name: Extent(*extent) for name, extent in index["images"].items()}
        members.printed = {name: index["printed"].get(name, name) for name in members.images}
        members.labels = {name: Label(*label) for name, label in index["labels"].items()}
        members.listing.passed_over.update(index["passed_over"])
        members.listing.others.update(index["others"])
        members.is_truncated = index["is_truncated"]
        return members

    def as_index(self) -> Index:
        """Return the members as `from_index` takes them."""
        return {
            "images": self.images,
            "printed": {name: printed for name, printed in self.printed.items() if printed != name},
            "labels": self.labels,
            "passed_over": self.listing.passed_over,
            "others": self.listing.others,
            "is_truncated": self.is_truncated,
        }

    def warn_if_truncated(self) -> None:
        """Log that the tar lacks its end, if it does."""
        if self.is_truncated:
            log.warning("data: %s has no end-of-archive marker and is probably truncated", self.where)

    def read(self, open_file: Callable[[], IO[bytes]]) -> "TarMembers":
        """Read the headers and the label files; return itself. Raises UserError if the file is no tar."""
        try:
            with open_file() as file:
                self._read_members(file, file, 0, "", "")
        except (tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, PermissionError):
                raise
            raise UserError(f"data.source: {self.where} cannot be read as .tar ({error}); create it again") from error
        return self

    def _read_members(self, file: IO[bytes], shard: IO[bytes], start: int, folder: str, printed_folder: str) -> None:
        """Add the members of a tar `file` that begins at byte `start` of the shard, under `folder`."""
        where = os.path.join(self.where, printed_folder) if printed_folder else self.where
        _check_beginning(file, where)
        extents: dict[str, Extent] = {}
        labels: dict[str, Label] = {}
        links: list[tuple[str, str]] = []
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every member's header
                name = os.path.normpath(member.name).lstrip("/")
                reason = why_passed_over(name)
                if reason:
                    self.listing.passed_over[reason] += not member.isdir()
                elif member.islnk() or member.issym():
                    base = "" if member.islnk() else os.path.dirname(name)
                    links.append((name, os.path.normpath(os.path.join(base, member.linkname))))
                elif member.isfile() and member.issparse():
                    self.listing.passed_over["sparse file"] += 1
                elif member.isfile():
                    extents[name] = Extent(start + member.offset_data, member.size)
                    if is_label(name):
                        labels[name] = _read_label(shard, extents[name], name)
                    elif is_tar(name):
                        inner = tar.extractfile(member)
                        assert inner is not None
                        path = os.path.join(folder, os.path.splitext(name)[0])
                        place = os.path.join(printed_folder, name)
                        self._read_members(inner, shard, extents[name].offset, path, place)
                elif not member.isdir():
                    self.listing.passed_over["special file"] += 1
            self._check_end(file, tar.offset, where)
        for name, target in _resolve_links(links, extents):
            if target is None:
                self.listing.passed_over["dangling link"] += 1
            else:
                extents[name] = extents[target]
                if is_label(name):
                    labels[name] = _read_label(shard, extents[name], name)
        for name, extent in extents.items():
            self._add(os.path.join(folder, name), os.path.join(printed_folder, name), extent, labels.get(name))

    def _add(self, name: str, printed: str, extent: Extent, label: Label | None) -> None:
        if is_image(name):
            self.images[name], self.printed[name] = extent, printed
        elif label is not None:
            self.labels[name] = label
        elif not is_tar(name):
            self.listing.add(name)

    def _check_end(self, file: IO[bytes], end: int, where: str) -> None:
        """Check that a tar ends in zeros; Python's reader takes damage, and a cut between two members, for the end.

        Raises UserError if another tar follows, which tar and Python's reader pass over without a word.
        """
        file.seek(end)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            self.is_truncated = True
        elif block.strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {end:,}")
        padding = file.read(MAX_PADDING)
        zeros = (len(padding) - len(padding.lstrip(b"\0"))) // BLOCK * BLOCK
        with contextlib.suppress(tarfile.HeaderError):  # the end of the file, or what some programs append
            tarfile.TarInfo.frombuf(padding[zeros : zeros + BLOCK], tarfile.ENCODING, "surrogateescape")
            raise UserError(
                f"data.source: {where} holds another .tar behind its end at byte {end:,}, as cat joins them; "
                "expected one .tar: keep them as files of a folder, or join them with tar --concatenate"
            )


def is_label(name: str) -> bool:
    """Check whether a file's name has the extension of WebDataset's labels."""
    return os.path.splitext(name)[1].lower() in (LABEL_FILE, JSON_FILE)


def _check_beginning(file: IO[bytes], where: str) -> None:
    """Raise UserError if a file is empty or compressed; go back to its first byte otherwise."""
    beginning = file.read(max(map(len, COMPRESSED)))
    file.seek(0)
    if not beginning:
        raise UserError(f"data.source: {where} is empty (0 bytes); download it again or remove it")
    for magic, program in COMPRESSED.items():
        if beginning.startswith(magic):
            raise UserError(
                f"data.source: {where} is compressed ({program}), but images are read at random; expected a plain "
                f".tar: decompress it with {program} first"
            )


def _resolve_links(links: list[tuple[str, str]], extents: dict[str, Extent]) -> Iterator[tuple[str, str | None]]:
    """Yield each link with the member that it leads to, over other links, or None."""
    targets = dict(links)
    ends: dict[str, str | None] = {}  # of every link that has been followed, so that long chains are followed once
    for name, _ in links:
        chain: dict[str, None] = {}
        end = name
        while end in targets and end not in ends and end not in chain:
            chain[end] = None
            end = targets[end]
        ends.update(dict.fromkeys(chain, ends.get(end, end if end in extents else None)))
        yield name, ends[name]


def _read_label(shard: IO[bytes], extent: Extent, name: str) -> Label:
    extension = os.path.splitext(name)[1].lower()
    if extent.size > MAX_LABEL_BYTES:
        return Label(
            None, "" if extension == JSON_FILE else f"is {extent.size:,} bytes long; expected a number or a name"
        )
    shard.seek(extent.offset)
    return _parse_label(shard.read(extent.size), extension)


def _parse_label(content: bytes, extension: str) -> Label:
    try:
        text = content.decode("utf-8").strip()
        if extension == JSON_FILE:
            value = json.loads(text)
            values = [value[key] for key in JSON_LABELS if key in value] if isinstance(value, dict) else []
            labels = [v for v in values if isinstance(v, int | str) and not isinstance(v, bool) and v != ""]
            if not labels:
                return Label(None)
            text = str(labels[0])
    except ValueError as error:
        return Label(None, f"cannot be read as a label ({error}); expected a number")
    if not text or text.startswith("-"):
        return Label(None, f"is {text!r}; expected the number or the name of a class")
    if not text.isdecimal():
        return Label(text)
    if Decimal(text) > MAX_LABEL:  # int() has a limit of 4,300 digits
        return Label(None, f"is {text[:20]!r}; expected the number of a class, at most {MAX_LABEL:,}")
    return Label(int(text))
