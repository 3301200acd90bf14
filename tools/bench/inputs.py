"""The datasets that a bench reads: a digest of each one's listing, and a few validation images to predict on."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from addp_core.base.files import write_atomically
from addp_core.base.paths import expand_home

if TYPE_CHECKING:  # `addp report` does without torch
    from addp_core.data.sources import ImageSource

SAMPLES = 4  # images of each dataset to predict on


@dataclass(frozen=True)
class SampleImage:
    """A validation image to predict on: the path that it is written to, its size (width, height) and its bytes."""

    path: Path
    size: tuple[int, int]
    content: bytes


@dataclass
class Inputs:
    """What is known of the datasets: path -> digest of its listing, dataset -> sample images, dataset -> what is wrong
    with one that no chosen step reads.
    """

    out: Path
    digests: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[SampleImage]] = field(default_factory=dict)

    def folder(self, dataset: str) -> Path:
        """Return the folder of a dataset's sample images."""
        return self.out / "inputs" / dataset

    def write(self) -> None:
        """Write the sample images, in place of those of an earlier dataset."""
        for dataset, images in self.samples.items():
            self.folder(dataset).mkdir(parents=True, exist_ok=True)
            for stale in set(self.folder(dataset).glob("[0-9]*")) - {image.path for image in images}:
                stale.unlink(missing_ok=True)
            for image in images:
                if not image.path.exists() or image.path.read_bytes() != image.content:
                    write_atomically(image.path, image.content)

    def take_samples(self, dataset: str, source: "ImageSource") -> None:
        """Remember a few evenly spaced images of a source; those that cannot be read are skipped."""
        from addp_core.data.images import IMAGE_EXTENSIONS, ImageError

        count = min(SAMPLES, len(source))
        self.samples[dataset] = []
        for number in range(count):
            index = number * len(source) // count
            suffix = Path(source.name(index)).suffix.lower()
            try:
                image = source.open_image(index)[0]
                content = source.read_bytes(index)[0]
            except (ImageError, OSError):
                continue
            path = self.folder(dataset) / f"{number:03d}{suffix if suffix in IMAGE_EXTENSIONS else '.png'}"
            self.samples[dataset].append(SampleImage(path, (image.width, image.height), content))


def listing_digest(path: str) -> str:
    """Return a digest of a dataset's listing, without reading its images.

    If the path does not exist (as for a dataset of the hub, or shards at an address), the digest is that of the path.
    Otherwise it covers all names at any depth, the size and time of each file that is not an image (annotations, lists,
    archives), and the time of each folder, which changes when an entry is added, removed or replaced. It does not stat
    the images: listing the 1.3 million names of ImageNet takes seconds, asking for each one's size takes minutes on a
    network disk. An image that is overwritten in place therefore goes unnoticed, and a copy of a dataset counts as the
    same one only if it keeps the times (cp -a, tar).
    """
    from addp_core.data.listing import entry_kind, is_image

    root, digest, visited = expand_home(path), hashlib.sha256(), set()

    def add(*items: object) -> None:
        digest.update(os.fsencode(" ".join(map(str, items))) + b"\0")

    if root.is_file():
        add(root.stat().st_size, root.stat().st_mtime_ns)
    elif not root.exists():
        add(path)
    pending = [""] if root.is_dir() else []
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(root / folder)
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError:  # unreadable folders and broken links are not part of the dataset
            continue
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder above
            continue
        visited.add((status.st_dev, status.st_ino))
        add(folder, status.st_mtime_ns)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            add(entry.name)
            if entry_kind(entry) == "folder":
                pending.append(os.path.join(folder, entry.name))
            elif not is_image(entry.name):
                with suppress(OSError):
                    add(entry.stat().st_size, entry.stat().st_mtime_ns)
    return digest.hexdigest()
