"""CIFAR-10's binary files as folders of PNG images: train/<class>/<number>.png, test/<class>/<number>.png."""

from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace
from tools.datasets.archives import members

CLASS_NAMES = "batches.meta.txt"
SIDE = 32  # pixels
RECORD_BYTES = 1 + 3 * SIDE * SIDE  # the label, then one plane for each color


def write_images(path: Path, folder: Path) -> None:
    """Write the images of the binary archive; the caller flushes them to the disk.

    Raises UserError if it is not as CIFAR-10's page describes it.
    """
    files = {PurePosixPath(name).name: file.read() for name, _, file in members(path)}
    batches = {name: content for name, content in files.items() if name.endswith(".bin")}
    classes = files.get(CLASS_NAMES, b"").decode().split()
    if not batches or not classes or any(len(content) % RECORD_BYTES for content in batches.values()):
        raise UserError(f"{path}: found {', '.join(sorted(files)) or 'nothing'}, expected CIFAR-10's binary version")
    numbers = dict.fromkeys(("train", "test"), 0)
    for name, content in sorted(batches.items()):
        split = "test" if name.startswith("test") else "train"
        for record in np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES):
            image = Image.fromarray(record[1:].reshape(3, SIDE, SIDE).transpose(1, 2, 0))
            target = folder / split / classes[record[0]] / f"{numbers[split]:05d}.png"
            numbers[split] += 1
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_replace(target, sync=False) as temporary:
                image.save(temporary, "png")
