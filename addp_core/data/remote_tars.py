"""Tar shards at addresses: the same images, classes and order as those of the same shards on a disk.

An index of each shard, read once and kept in the user's cache, says where its images lie; each image is then a request
for a part of a shard. Requests for the images of a batch run together, and images that lie next to each other are one
request (`data.shuffle_block`).
"""

import io
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import commonprefix
from typing import IO, Any, cast

from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.base.launch import rank, world_size
from addp_core.data.listing import is_tar
from addp_core.data.remote import CONNECTIONS, Address, Range, RemoteFile, RemoteFiles, Version, expand
from addp_core.data.tar_index import Index, stored_index
from addp_core.data.tar_members import RULES, TarMembers
from addp_core.data.tars import TarShards

log = logging.getLogger("addp")

LONG_LIST = 8  # shards whose indexes take long enough to show progress
MAX_GAP = 1 << 15  # bytes between two images that are read too, so that they are one request
MAX_REQUEST = 1 << 24  # bytes that several images in one request may take
MAX_AHEAD = 1 << 26  # bytes of images that a process holds before they are asked for
MAX_IMAGES_AHEAD = 8 * CONNECTIONS
MAX_HEADER = 1 << 24  # bytes of a header, long names and comments included
MAX_IMAGE = 1 << 28  # bytes of a single image; larger ones count as unreadable


class RemoteTarShards(TarShards):
    """The images of .tar files at addresses.

    Args:
        pattern: their address, with numbers in braces if there are several (`remote.expand`).
        files: reads them.
        split, classes: as those of `TarShards`.

    Raises UserError as `TarShards` does, and if a shard cannot be reached.
    """

    def __init__(self, pattern: str, files: RemoteFiles, split: str, classes: Sequence[str] | None = None):
        addresses = expand(pattern)
        for address in addresses:
            if not is_tar(address.shown):
                raise UserError(
                    f"data.source: {address.shown} is no .tar file; expected the address of .tar shards, as in "
                    "'s3://bucket/train-{000..999}.tar'"
                )
        shown = [address.shown for address in addresses]
        name, times = Counter(shown).most_common(1)[0]
        if times > 1:
            raise UserError(
                f"data.source: {times} of the shards are {name} (without what follows the ?), but images are named "
                "after their shard; expected addresses that differ before the ?"
            )
        shared = commonprefix(shown)  # noqa: RUF071 (of paths, it would make https:/ of https://)
        root = shown[0] if len(shown) == 1 else shared.rpartition("/")[0]
        names = [text[len(root) :].lstrip("/") for text in shown]
        self._files = files
        self._addresses = dict(zip(names, addresses, strict=True))
        self._plan = _Plan()
        super().__init__(root, names if len(names) > 1 else (), split, classes)

    def names_below(self, source: str) -> list[str]:
        """Return the images' paths below the address that all shards share."""
        return super().names_below(str(self._root))

    def _read_indexes(self, shards: Sequence[str]) -> list[TarMembers]:
        addresses = [self._addresses[shard] for shard in shards]
        self._files.check_ranges(addresses[0])
        members, without_tag = [], 0
        # Each process begins elsewhere and finds what the others have read meanwhile.
        first = len(addresses) * rank() // world_size()
        order = [*range(first, len(addresses)), *range(first)]
        with ThreadPoolExecutor(min(CONNECTIONS, len(shards))) as pool:
            indexes = {i: pool.submit(_read_index, self._files, addresses[i]) for i in order}
            hidden = len(shards) < LONG_LIST or rank() > 0
            try:
                for i in tqdm(range(len(addresses)), "indexes", leave=False, unit="shard", disable=hidden):
                    version, index = indexes.pop(i).result()
                    members.append(TarMembers.from_index(addresses[i].shown, index))
                    without_tag += not version.tag
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if without_tag:
            log.info(
                "data: %s: no checksum or time of change is known of %d shards; their headers are read at each start",
                *(self._root, without_tag),
            )
        for each in members:
            each.warn_if_truncated()
        return members

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Announce which images are read next, in this order."""
        self._plan.start(indices)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the image, which is requested together with those that `read_ahead` announced after it."""
        if self.encoded_size(index) > MAX_IMAGE:
            raise OSError(f"{self.encoded_size(index):,} bytes, more than the limit of {MAX_IMAGE:,}")
        with self._plan.lock:
            while (content := self._plan.take(index)) is None and self._plan.is_coming(index):
                group = self._plan.next_group(self.encoded_size)
                self._plan.put(group, self._fetch(group))
        if content is None:
            [content] = self._fetch([index])
        return content, int(self.labels[index])

    def _fetch(self, indices: Sequence[int]) -> list[bytes]:
        """Return the contents of images; those that are neighbors in a shard are one request."""
        ranges: list[Range] = []
        owners: list[list[int]] = []  # of each range, the places in `indices` of its images
        places = [(*self.extent(index), place) for place, index in enumerate(indices)]
        for shard, extent, place in sorted(places):
            address, end = self._addresses[shard], extent.offset + extent.size
            last = ranges[-1] if ranges else None
            if (
                last is not None
                and last.address == address
                and extent.offset - last.end <= MAX_GAP
                and max(end, last.end) - last.start <= MAX_REQUEST
            ):
                ranges[-1] = last._replace(end=max(end, last.end))
                owners[-1].append(place)
            else:
                ranges.append(Range(address, extent.offset, end))
                owners.append([place])
        contents = [b""] * len(indices)
        for part, content, own in zip(ranges, self._files.read(ranges), owners, strict=True):
            for place in own:
                _, extent = self.extent(indices[place])
                first = extent.offset - part.start
                contents[place] = content[first : first + extent.size]
        return contents


class _Plan:
    """The images that are read next, and those of them that have arrived. Threads share it under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._coming: deque[int] = deque()
        self._uses: Counter[int] = Counter()  # how often each image is still read
        self._arrived: dict[int, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def start(self, indices: Sequence[int]) -> None:
        """Forget what was planned before; plan these images."""
        with self.lock:
            self._uses = Counter(int(index) for index in indices)
            self._coming = deque(self._uses)
            self._arrived.clear()

    def take(self, index: int) -> bytes | None:
        """Return an image that has arrived, and forget it after its last use."""
        if index not in self._arrived:
            return None
        self._uses[index] -= 1
        return self._arrived[index] if self._uses[index] > 0 else self._arrived.pop(index)

    def is_coming(self, index: int) -> bool:
        """Check whether an image is planned and has not been requested."""
        return index in self._coming

    def next_group(self, size_of: Callable[[int], int]) -> list[int]:
        """Return the next images, as many as may be held at once."""
        group: list[int] = []
        held = sum(map(len, self._arrived.values()))
        while self._coming and len(group) < MAX_IMAGES_AHEAD:
            size = size_of(self._coming[0])
            if group and held + size > MAX_AHEAD:
                break
            index = self._coming.popleft()
            if size <= MAX_IMAGE:
                group.append(index)
                held += size
        return group

    def put(self, indices: Sequence[int], contents: Sequence[bytes]) -> None:
        """Take images that have arrived."""
        self._arrived.update(zip(indices, contents, strict=True))


class _Headers(io.BufferedReader):
    """A tar that is read for its headers, whose sizes are what the tar itself says."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return as many bytes. Raises OSError if they are more than a header may have."""
        if size is None or not 0 <= size <= MAX_HEADER:
            raise OSError(f"a header of more than {MAX_HEADER:,} bytes")
        return super().read(size)


def _read_index(files: RemoteFiles, address: Address) -> tuple[Version, Index]:
    """Return the version of a shard and its index, which is stored if the version says when the shard has changed."""
    version = files.version(address)

    def open_file() -> IO[bytes]:
        return cast(IO[bytes], _Headers(RemoteFile(files, address, version.size)))

    def build() -> Index:
        return TarMembers(address.shown).read(open_file).as_index()

    return version, stored_index(address.text, list(version), RULES, build) if version.tag else build()
