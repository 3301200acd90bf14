"""Images from wherever they lie to batches on the training process: sources, decoding, crops and the endless `Stream`.

    source = open_source(config)                         # folders, lists, tar shards, hub sets: len(), read(i), name(i)
    stream = Stream(source, pretrain_transform(config), config, seed=0, batch=256)
    for batch in stream.batches(start, rank, world): ... # for ever; batch.images is Float[b,3,h,w] in [0,1]

Order and augmentation are functions of the seed and of an image's position in the run, of nothing else: position p is
row p % batch of micro-step p // batch, it shows image `permutation(seed, p // n)[p % n]`, and its crop is drawn from
`seed_for(seed, "augment", p)`. A run that was stopped and continued, one with other workers and one with other
processes all see the same pixels.

An image that cannot be read is replaced by the next readable one of the epoch's order, named once in the log, and
counted; the run ends with a `UserError` when more than `max_errors` images were unreadable. Each process counts what it
met itself, from its start.
"""

import atexit
import importlib.util
import io
import itertools
import logging
import math
import os
import random
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt
from PIL import Image, UnidentifiedImageError
from timm.data.readers import create_reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from addp_core.errors import UserError, nearest
from addp_core.rng import generator, seed_for

log = logging.getLogger("addp")

# What Pillow may try. Its other formats are no photographs, and one of them (EPS) starts a program.
Image.init()
FORMATS = [
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
]
EXPECTED = ".jpg, .jpeg, .png, .webp, .gif, .bmp, .tif, .tiff, .ppm, .pgm, .jp2, .avif"
EXTENSIONS = frozenset([*EXPECTED.split(", "), ".jpe", ".jfif", ".pbm", ".pnm", ".j2k"])
MAX_PIXELS = 178_956_970  # beyond this a file is taken for a decompression bomb: twice Pillow's own warning
SPLITS = {"train": ("train",), "val": ("val", "validation"), "validation": ("validation", "val"), "test": ("test",)}
STREAM_ONLY = ("wds", "hfids", "tfds")
TRIES = 1000  # unreadable images in a row before the set, not an image, is taken to be broken
WHITE = (255, 255, 255, 255)


@dataclass
class DataConfig:
    """Which images, how they are cropped and how they are loaded."""

    __shorthand__ = "source"
    source: Annotated[
        str,
        "folder of images (flat or nested), ImageNet root (train/<class>/...), root with meta/<split>.txt lists, "
        ".tar file or folder of them, or hub set hfds/<name>",
    ] = ""
    split: Annotated[str, "part of the set: a folder or list of this name where there is one"] = "train"
    size: Annotated[int | tuple[int, int], "pixels of the model's images: one side, or [height, width]"] = 256
    scale: Annotated[tuple[float, float], "range of a random crop's share of the image's area"] = (0.2, 1.0)
    ratio: Annotated[tuple[float, float], "range of a crop's width / height, as a multiple of the size's"] = (
        0.75,
        4 / 3,
    )
    flip: Annotated[bool, "mirror every other image, by chance"] = True
    max_errors: Annotated[float, Ge(0), "unreadable images to tolerate: a count, or below 1 a share of the set"] = 0.01
    classes: Annotated[str | None, "file that names class 0, 1, ... a line each (default: sorted folders)"] = None
    image_key: Annotated[str, "hub sets: column of the images"] = "image"
    label_key: Annotated[str, "hub sets: column of the labels"] = "label"
    cache: Annotated[Literal["none", "ram"], "ram: decode and downscale all images once, at the start"] = "none"
    cache_gb: Annotated[float, Gt(0), "memory for cache=ram, per process; what does not fit is decoded each time"] = 8.0
    workers: Annotated[
        int | None, Ge(0), "loading processes a training process; 0: none (default: 1 on a CPU, with a GPU up to 12)"
    ] = None
    prefetch: Annotated[int, Ge(1), "batches that each worker prepares ahead"] = 2

    def __post_init__(self) -> None:
        if min(self.hw) < 8:
            raise ValueError(f"size: {self.size}, expected at least 8 pixels; set size=256 or size=[256,192]")
        for key, low in (("scale", 0.0), ("ratio", 0.0)):
            first, last = getattr(self, key)
            if not low < first <= last or (key == "scale" and last > 1):
                bounds = "0 < low <= high <= 1" if key == "scale" else "0 < low <= high"
                raise ValueError(f"{key}: [{first}, {last}], expected {bounds}")

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)


# ------------------------------------------------------------------------------------------------------------ one image


class ImageError(Exception):
    """One image cannot be read; the message says why, without the image's name."""


@contextmanager
def _image_errors() -> Iterator[None]:
    """What goes wrong while bytes are read and decoded is the image's fault: Pillow raises a dozen classes for it."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image of a known format") from error
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    except Exception as error:
        raise ImageError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


class Picture:
    """An encoded image, decoded only as far as a crop needs. `width` and `height` are those of the upright picture.

    JPEGs are decoded at 1/2, 1/4 or 1/8 where the crop still has at least twice the pixels asked for: the same to the
    eye (64 dB PSNR from the full decode) and several times faster on large photographs. Take one `crop` or one
    `image`.
    """

    def __init__(self, encoded: bytes | Image.Image, size: tuple[int, int] | None = None):
        """`encoded`: a file's bytes, or a Pillow image, perhaps a shrunk copy of one of this `size` (width, height).

        Raises `ImageError` where the header is no image's.
        """
        with _image_errors():
            if isinstance(encoded, bytes):
                if not encoded:
                    raise ImageError("the file is empty")
                encoded = Image.open(io.BytesIO(encoded), formats=FORMATS)
            if encoded.width * encoded.height > MAX_PIXELS:
                raise ImageError(f"{encoded.width} x {encoded.height} pixels, more than {MAX_PIXELS}: a bomb?")
            self._image = encoded
            self._turn = TURNS.get(_orientation(encoded))
            self._stored = encoded.size[::-1] if self._turn in SIDEWAYS else encoded.size
            self.width, self.height = size or self._stored

    def image(self) -> Image.Image:
        """The whole upright picture as 8-bit RGB."""
        with _image_errors():
            image = self._image.transpose(self._turn) if self._turn is not None else self._image
            return _to_rgb(image)

    def crop(self, box: tuple[float, float, float, float], size: tuple[int, int], flip: bool = False) -> Image.Image:
        """The part (left, top, right, bottom) of the upright picture, resized bicubically to `size` (width, height)."""
        with _image_errors():
            image = self._image
            left, top, right, bottom = box
            wanted = (
                math.ceil(2 * size[0] * self.width / (right - left)),
                math.ceil(2 * size[1] * self.height / (bottom - top)),
            )
            width = image.width
            reduced = image.draft(None, wanted[::-1] if self._turn in SIDEWAYS else wanted)
            scale = reduced[1][2] / width if reduced else 1.0  # exact, where sizes are rounded up
            x, y = scale * self._stored[0] / self.width, scale * self._stored[1] / self.height
            if self._turn is not None:
                image = image.transpose(self._turn)
            if image.mode not in ("RGB", "L") or "transparency" in image.info:
                image = _to_rgb(image)
            image = image.resize(size, Image.Resampling.BICUBIC, box=(left * x, top * y, right * x, bottom * y))
            if flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return image.convert("RGB")


TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {TURNS[5], TURNS[6], TURNS[7], TURNS[8]}


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF beside sound pixels: the picture as it is stored
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: 16 bits scaled to 8, transparency laid on white, CMYK and palettes converted."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)  # 0..65535; Pillow's own conversion would clip at 255
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("32-bit greyscale has no fixed range: save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


# ----------------------------------------------------------------------------------------------------------- transforms


class Crop:
    """One crop, one resize, perhaps a mirror image. Called with a Pillow image or a `Picture` -> Float[3,h,w] in [0,1].

    A `Stream` calls `pixels` instead, so that a picture is decoded no further than its crop needs and travels as bytes.
    """

    def __init__(self, hw: tuple[int, int]):
        self.hw = hw

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the crop from an image of this size."""
        raise NotImplementedError

    def flip(self) -> bool:
        return False

    def pixels(self, picture: Picture) -> Tensor:
        """UInt8[3,h,w]."""
        box = self.box(picture.width, picture.height)
        image = picture.crop(box, self.hw[::-1], self.flip())
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __call__(self, image: Image.Image | Picture) -> Tensor:
        picture = image if isinstance(image, Picture) else Picture(image)
        return self.pixels(picture).contiguous().float().div_(255)


class RandomCrop(Crop):
    """A crop of random area and shape (Inception's, as in MAE), mirrored by chance. Draws from Python's `random`."""

    def __init__(
        self,
        hw: tuple[int, int],
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (0.75, 4 / 3),
        flip: bool = True,
    ):
        super().__init__(hw)
        self.scale, self.ratio, self.mirror = scale, ratio, flip

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        shape = self.hw[1] / self.hw[0]
        for _ in range(10):
            area = width * height * random.uniform(*self.scale)
            ratio = shape * math.exp(random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
            if w <= width and h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        return _central(width, height, shape)

    def flip(self) -> bool:
        return self.mirror and random.random() < 0.5


class CentreCrop(Crop):
    """The largest central part of the target's shape, or `share` of its sides: shorter side resized, centre cropped."""

    def __init__(self, hw: tuple[int, int], share: float = 1.0):
        super().__init__(hw)
        self.share = share

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        return _central(width, height, self.hw[1] / self.hw[0], self.share)


def _central(width: int, height: int, shape: float, share: float = 1.0) -> tuple[float, float, float, float]:
    """The largest box of this width / height in the middle, its sides times `share`."""
    w, h = min(width, height * shape) * share, min(height, width / shape) * share
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def pretrain_transform(config: DataConfig) -> RandomCrop:
    """Random crop and mirror of pretraining (App. D: area 0.2-1, bicubic) -> Float[3,h,w] in [0,1], not normalised."""
    return RandomCrop(config.hw, config.scale, config.ratio, config.flip)


def eval_transform(size: int | tuple[int, int], share: float = 1.0) -> CentreCrop:
    """Centre crop -> Float[3,h,w] in [0,1]. `share` 0.875 with size 224 is the usual resize to 256, crop to 224."""
    return CentreCrop((size, size) if isinstance(size, int) else tuple(size), share)


# -------------------------------------------------------------------------------------------------------------- sources


class ImageSource:
    """Images with random access. `classes[label]` names a label; it is empty where the images have none (label -1)."""

    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label (-1: none). May raise anything."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image lies, for messages."""
        raise NotImplementedError

    def picture(self, index: int) -> tuple[Picture, int]:
        """The image, decoded as far as its header, and its label. Raises `ImageError`."""
        with _image_errors():
            encoded, label = self.load(index)
        return Picture(encoded), label

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        """The whole image, upright 8-bit RGB, and its label or None. Raises `ImageError`."""
        picture, label = self.picture(index)
        return picture.image(), None if label < 0 else label


class _Names(Sequence):
    """Many strings in two blocks of memory: of a list, forked workers copy page after page by counting references."""

    def __init__(self, names: Sequence[str]):
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])


class Files(ImageSource):
    """Image files `root/name`, with a label each or none."""

    def __init__(
        self, root: Path, names: Sequence[str], labels: Sequence[int] | None = None, classes: Sequence[str] = ()
    ):
        self.root, self.classes = root, tuple(classes)
        self._names = _Names(names)
        self._labels = np.full(len(names), -1) if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> tuple[bytes, int]:
        with open(os.path.join(self.root, self._names[index]), "rb") as file:
            return file.read(), int(self._labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._names[index])


class TarShards(ImageSource):
    """A .tar file or a folder of them, through timm's indexed reader; one level of tars within tars is read too.

    As there, the class is the innermost folder inside the tar, or the tar itself where it has no folders. The label
    files of webdataset shards are not read. The tars are indexed at every start, which reads them through once.
    """

    def __init__(self, path: Path):
        try:
            # timm's cache of the index would be a pickle beside the data that does not notice a changed tar
            self._reader = ReaderImageInTar(str(path), cache_tarinfo=False)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"data.source: {path} cannot be read as .tar ({error}); make the archive anew") from error
        except (ValueError, AssertionError) as error:
            raise UserError(f"data.source: {path} holds no image; expected {EXPECTED} inside the .tar") from error
        for shard in [path] if path.is_file() else sorted(path.glob("*.tar")):
            _warn_of_cut(shard)
        names = [self._inside(index) for index in range(len(self._reader))]
        # timm sorts by the name within the shard alone and leaves ties in the order of the file system
        self._order = sorted(range(len(names)), key=lambda index: natural_key(names[index]))
        self._names = _Names(names)
        self._root = path
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.classes = tuple(sorted(self._reader.class_name_to_idx, key=self._reader.class_name_to_idx.get))

    def _inside(self, index: int) -> str:
        member, shard, nested = self._reader.samples[index]
        return "/".join(part for part in (shard, nested.name if nested else None, member.name) if part)

    def __len__(self) -> int:
        return len(self._order)

    def load(self, index: int) -> tuple[bytes, int]:
        with self._lock:  # one file offset for all threads
            if self._pid != os.getpid():  # and, after a fork, for all processes: each opens its own
                states = [self._reader.tar_state] if self._reader.root_is_tar else self._reader.tar_state.values()
                for state in states:
                    for each in (state, *state.children.values()):
                        each.reset()
                self._pid = os.getpid()
            file, label = self._reader[self._order[index]]
            return file.read(), int(label)

    def name(self, index: int) -> str:
        return f"{self._root}/{self._names[self._order[index]]}"


def _warn_of_cut(path: Path) -> None:
    """A tar that was cut between two members reads as a sound, shorter one: only the zeros at its end are missing."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        if file.read().strip(b"\0"):
            log.warning("data: %s does not end as a .tar does: is it cut short?", path)


class HubSet(ImageSource):
    """`hfds/<name or path>`: a set of the Hugging Face hub, or a folder `datasets` knows, through timm's reader."""

    def __init__(self, source: str, config: DataConfig):
        if importlib.util.find_spec("datasets") is None:
            raise UserError(f"data.source: {source!r} needs the package datasets: pip install datasets")
        try:
            self._reader = create_reader(
                source, split=config.split, input_key=config.image_key, target_key=config.label_key
            )
        except Exception as error:  # not found, offline, no such split or column: the hub says it best
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"data.source: {source!r} (split {config.split!r}) cannot be opened: {reason}") from error
        self._source, self._image_key = source, config.image_key
        if not len(self._reader):
            raise UserError(f"data.source: {source!r} (split {config.split!r}) holds no image")
        columns = self._reader.dataset[0]
        if columns.get(config.image_key) is None:  # to ask for a column makes it, empty
            known = [name for name in columns if name != config.image_key]
            found = (
                f"no column {config.image_key!r}; expected one of {', '.join(known)}{nearest(config.image_key, known)}"
            )
            raise UserError(f"data.image_key: {source!r} has {found}")
        names = self._reader.class_to_idx
        self.classes = tuple(sorted(names, key=names.get))
        self._labelled = config.label_key in columns

    def __len__(self) -> int:
        return len(self._reader)

    def load(self, index: int) -> tuple[bytes, int]:
        if not self._labelled:
            item = self._reader.dataset[index][self._image_key]
            return item["bytes"] or Path(item["path"]).read_bytes(), -1
        file, label = self._reader[index]
        with file:
            return file.read(), int(label)

    def name(self, index: int) -> str:
        return f"{self._source}[{index}]"


class Cached(ImageSource):
    """Another source's images held in memory, larger ones shrunk to a shorter side of `side` pixels.

    Filled at once, before workers start, so that they share the memory. Unreadable images stay errors. What does not
    fit into `gigabytes` comes from the source each time.
    """

    def __init__(self, source: ImageSource, side: int, gigabytes: float):
        self.classes = source.classes
        self._source, self._side = source, side
        self._held: list[tuple[np.ndarray | ImageError, tuple[int, int], int] | None] = [None] * len(source)
        room = gigabytes * 2**30
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(source), 256):
                indices = range(first, min(first + 256, len(source)))
                for index, held in zip(indices, pool.map(self._shrunk, indices), strict=True):
                    self._held[index] = held
                    room -= held[0].nbytes if isinstance(held[0], np.ndarray) else 0
                if room <= 0:
                    log.warning("data.cache: %.1f GB hold %d of %d images", gigabytes, indices.stop, len(source))
                    break

    def _shrunk(self, index: int) -> tuple[np.ndarray | ImageError, tuple[int, int], int]:
        """(pixels or what is wrong with them, (width, height) of the original, label)."""
        try:
            picture, label = self._source.picture(index)
            size = picture.width, picture.height
            factor = min(1.0, self._side / min(size))
            shrunk = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
            return np.array(picture.crop((0, 0, *size), shrunk)), size, label
        except ImageError as error:
            return error, (0, 0), -1

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def load(self, index: int) -> tuple[bytes, int]:
        return self._source.load(index)

    def picture(self, index: int) -> tuple[Picture, int]:
        held = self._held[index]
        if held is None:
            return self._source.picture(index)
        image, size, label = held
        if isinstance(image, ImageError):
            raise ImageError(str(image))
        return Picture(Image.fromarray(image), size), label


def open_source(
    config: DataConfig | str, split: str | None = None, classes: Sequence[str] | None = None
) -> ImageSource:
    """Opens what lies at `config.source`. `split` and `classes` (names by label) override the config's.

    In this order: a hub set `hfds/<name>`; a .tar file; `root/meta/<split>.txt` with lines "path label" and the images
    under `root/<split>/`; the folder `root/<split>`; the root itself. A folder holds .tar files, or images at any
    depth: where every image lies in a folder below it, the topmost such folder is its class (as torchvision has it),
    else it has none. Files of other kinds and hidden ones are passed over. Raises `UserError` where there is nothing
    to read.
    """
    config = DataConfig(source=config) if isinstance(config, str) else config
    split = split or config.split
    if not config.source:
        raise UserError(
            "data.source: missing; expected a folder of images, a .tar file or a hub set, as in data=photos"
        )
    if classes is None and config.classes:
        classes = [line for line in _lines(Path(config.classes), "data.classes") if line]
    path = Path(config.source).expanduser()
    kind, _, rest = config.source.partition("/")
    if rest and not path.exists():
        if kind == "hfds":
            return _opened(HubSet(config.source, _with_split(config, split)), config)
        if kind in STREAM_ONLY:
            raise UserError(
                f"data.source: {config.source!r} is a stream: without random access, no exact continuing and no order "
                "that is the same for any number of workers; expected a folder of .tar files, or hfds/<name>"
            )
    try:
        return _opened(_open_path(path, split, classes), config)
    except PermissionError as error:
        raise UserError(f"data.source: no permission to read {error.filename or path}") from error


def _with_split(config: DataConfig, split: str) -> DataConfig:
    return DataConfig(**{**vars(config), "split": split})


def _opened(source: ImageSource, config: DataConfig) -> ImageSource:
    kind = f"{len(source.classes):,} classes" if source.classes else "no classes"
    log.info("data: %s: %s images, %s", config.source, f"{len(source):,}", kind)
    return source


def _open_path(path: Path, split: str, classes: Sequence[str] | None) -> ImageSource:
    if not path.exists():
        near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise UserError(f"data.source: {path} does not exist; expected a folder of images or a .tar file{near}")
    if path.is_file():
        if path.suffix.lower() == ".tar":
            return TarShards(path)
        raise UserError(f"data.source: {path} is a file; expected a folder of images or a .tar file; unpack others")
    listed = path / "meta" / f"{split}.txt"
    if listed.is_file():
        return _open_list(path, split, listed, classes)
    folders = {entry.name for entry in os.scandir(path) if entry.is_dir()}
    part = next((name for name in SPLITS.get(split, (split,)) if name in folders), None)
    others = sorted(folders & {name for names in SPLITS.values() for name in names})
    if part is None and others:
        raise UserError(f"data.split: {path} has no folder {split!r}; it has {', '.join(others)}")
    return _open_folder(path / part if part else path, classes)


def _open_folder(root: Path, classes: Sequence[str] | None) -> ImageSource:
    names, others = _scan(root)
    if not names and any(root.glob("*.tar")):
        return TarShards(root)
    if not names:
        if not others:
            raise UserError(f"data.source: {root} holds no file at all; expected images ({EXPECTED})")
        kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in others.most_common(3))
        raise UserError(f"data.source: {root} holds no image but {others.total()} files ({kinds}); expected {EXPECTED}")
    if not all(os.sep in name for name in names):
        return Files(root, names)
    folders = [name.split(os.sep, 1)[0] for name in names]
    found = sorted(set(folders) | {entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."})
    labels = {name: label for label, name in enumerate(found if classes is None else classes)}
    for folder in set(folders) - set(labels):
        raise UserError(f"data.classes: {root / folder} is none of the {len(labels)} classes{nearest(folder, labels)}")
    return Files(root, names, [labels[folder] for folder in folders], tuple(labels))


def _scan(root: Path) -> tuple[list[str], Counter]:
    """Image files below `root`, sorted, relative to it; and how many files there are of other extensions."""
    names, others, seen, pending = [], Counter(), set(), [""]
    while pending:
        folder = pending.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:  # a link back up, or a second way to the same folder
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                if entry.name.startswith("."):  # among them ._x.jpg, which is no image
                    continue
                if entry.is_dir():
                    pending.append(name)
                elif entry.is_file():
                    extension = os.path.splitext(entry.name)[1].lower()
                    if extension in EXTENSIONS:
                        names.append(name)
                    else:
                        others[extension] += 1
    return sorted(names), others


def _lines(path: Path, key: str) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error


def _open_list(root: Path, split: str, listed: Path, classes: Sequence[str] | None) -> Files:
    """The published lists: `root/meta/<split>.txt`, a line "path label" for each image `root/<split>/path`."""
    names, labels = [], []
    for number, line in enumerate(_lines(listed, "data.source"), 1):
        if not line:
            continue
        name, _, label = line.rpartition(" ")
        if not name or not label.isdecimal():
            raise UserError(f'data.source: {listed} line {number} is {line!r}; expected "relative/path label"')
        names.append(name.strip())
        labels.append(int(label))
    if not names:
        raise UserError(f'data.source: {listed} lists no image; expected lines "relative/path label"')
    for name in (names[0], names[len(names) // 2], names[-1]):
        if not (root / split / name).is_file():
            raise UserError(f"data.source: {listed} lists {name}, but {root / split / name} does not exist")
    if classes is None:
        folders: dict[int, set[str]] = {}
        for name, label in zip(names, labels, strict=True):
            folders.setdefault(label, set()).add(os.path.dirname(name))
        named = {label: next(iter(known)) for label, known in folders.items() if len(known) == 1}
        distinct = len(named) == len(folders) == len(set(named.values()))
        classes = [named.get(label, str(label)) if distinct else str(label) for label in range(max(labels) + 1)]
    elif max(labels) >= len(classes):
        raise UserError(f"data.classes: {listed} has label {max(labels)}, but there are {len(classes)} classes")
    return Files(root / split, names, labels, classes)


# --------------------------------------------------------------------------------------------------------------- stream


@dataclass
class Batch:
    """One process's rows of a micro-batch. `indices` are those of the images shown, replacements included."""

    images: Tensor  # Float[b,3,h,w]; in [0,1] from the transforms of this module
    labels: Tensor  # Long[b], -1 where there is none
    indices: Tensor  # Long[b], into the source
    errors: list[tuple[str, str]]  # (name, reason) of images that could not be read

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class _Loaded:
    """What a worker sends: images as bytes where the transform gives bytes, a quarter of the traffic.

    `images` is empty where `TRIES` images in a row could not be read.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    errors: list[tuple[str, str]]

    def batch(self) -> Batch:
        images = self.images.float().div_(255) if self.images.dtype == torch.uint8 else self.images
        return Batch(images, self.labels, self.indices, self.errors)

    def pin_memory(self) -> Batch:
        """Called in the loader's own thread when there is a GPU."""
        batch = self.batch()
        return Batch(batch.images.pin_memory(), batch.labels.pin_memory(), batch.indices.pin_memory(), batch.errors)


class _Rows(Dataset):
    """Micro-step -> the rows `rows` of its batch."""

    def __init__(self, source: ImageSource, transform: Callable, seed: int, batch: int, rows: slice):
        self.source, self.transform, self.seed, self.batch, self.rows = source, transform, seed, batch, rows
        self._order = lru_cache(2)(self._permutation)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _order=lru_cache(2)(self._permutation))

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.source), generator=generator(self.seed, "order", epoch))

    def __getitem__(self, step: int) -> _Loaded:
        images, labels, indices, errors = [], [], [], []
        with _rng_kept():
            for position in range(step * self.batch + self.rows.start, step * self.batch + self.rows.stop):
                sample = self._sample(position, errors)
                if sample is None:
                    return _Loaded(torch.empty(0), torch.empty(0), torch.empty(0), errors)
                images.append(sample[0])
                labels.append(sample[1])
                indices.append(sample[2])
        stacked = torch.empty((len(images), *images[0].shape), dtype=images[0].dtype)  # whatever strides the rows have
        for row, image in zip(stacked, images, strict=True):
            row.copy_(image)
        return _Loaded(stacked, torch.tensor(labels), torch.tensor(indices), errors)

    def _sample(self, position: int, errors: list[tuple[str, str]]) -> tuple[Tensor, int, int] | None:
        """(image, label, index) at this position of the run, or None where nothing can be read."""
        epoch, place = divmod(position, len(self.source))
        order = self._order(epoch)
        for offset in range(min(len(order), TRIES)):
            index = int(order[(place + offset) % len(order)])
            try:
                picture, label = self.source.picture(index)
                image = None if isinstance(self.transform, Crop) else picture.image()
                _seed_all(seed_for(self.seed, "augment", position))
                return self.transform.pixels(picture) if image is None else self.transform(image), label, index
            except ImageError as error:
                errors.append((self.source.name(index), str(error)))
        return None


@contextmanager
def _rng_kept() -> Iterator[None]:
    """Puts the CPU's random states back: with workers=0 the training's numbers must not depend on the images."""
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(tensor)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's generators too


def _start_worker(_: int) -> None:
    """Signals are the training process's to handle: it finishes its step, for which it needs its workers."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class Stream:
    """Batches of a source for ever, each a function of (seed, micro-step) alone. `len()` is the number of images.

    `transform` is one of this module's crops, or any function of an RGB Pillow image that gives Float[3,h,w]: it may
    draw from `random`, numpy and torch, which are seeded for each image. `batch` counts the images of one micro-step
    over all processes.
    """

    def __init__(
        self, source: ImageSource, transform: Callable[[Any], Tensor], config: DataConfig, *, seed: int, batch: int
    ):
        if batch < 1:
            raise UserError(f"batch: {batch}, expected at least 1")
        if config.cache == "ram":
            # no crop of this recipe is enlarged more from this size than from the original
            side = math.ceil(max(config.hw) / math.sqrt(config.scale[0] * min(config.ratio[0], 1 / config.ratio[1])))
            source = Cached(source, side, config.cache_gb)
        self.source, self.transform, self.config, self.seed, self.batch = source, transform, config, seed, batch
        self.errors: dict[str, str] = {}  # name -> reason of every unreadable image this process has met

    def __len__(self) -> int:
        return len(self.source)

    @property
    def tolerated(self) -> int:
        """The number of unreadable images that may be replaced; any share above 0 allows one."""
        limit = self.config.max_errors
        return int(limit) if limit >= 1 else max(1, round(limit * len(self))) if limit else 0

    def rows(self, rank: int, world: int) -> slice:
        """The contiguous rows of each micro-batch that process `rank` of `world` gets."""
        if not 0 <= rank < world <= self.batch:
            raise UserError(f"batch: {self.batch} images a step for {world} processes; expected at least one for each")
        return slice(self.batch * rank // world, self.batch * (rank + 1) // world)

    def batches(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """This process's rows of micro-steps `start`, `start + 1`, ..., for ever.

        Close it or drop it to end its workers. When a worker dies (out of memory, say) all are started anew and the
        batch is made again; the third death in a row is raised. Raises `UserError` past `max_errors`.
        """
        dataset = _Rows(self.source, self.transform, self.seed, self.batch, self.rows(rank, world))
        running: list[Iterator] = []

        def stop() -> None:
            # Not left to reference counts: a traceback may hold the iterator until the interpreter ends, and there
            # multiprocessing would wait for ever for workers that do not heed its SIGTERM.
            if running and workers:
                running[0]._shutdown_workers()
            running.clear()

        atexit.register(stop)
        workers = _default_workers() if self.config.workers is None else self.config.workers
        step, deaths = start, 0
        try:
            while True:
                if not running:
                    running.append(iter(self._loader(dataset, step, workers)))
                try:
                    loaded = next(running[0])
                except RuntimeError as error:
                    if not str(error).startswith("DataLoader worker (pid"):  # an error in a worker, not its death
                        raise
                    stop()
                    deaths += 1
                    if deaths == 3:
                        raise RuntimeError(
                            f"data workers died three times at micro-step {step}, for lack of memory or /dev/shm? "
                            f"use data.workers=1, or data.workers=0 ({error})"
                        ) from error
                    log.warning("starting the data workers anew at micro-step %d: %s", step, error)
                    continue
                batch = loaded if isinstance(loaded, Batch) else loaded.batch()
                self._count(batch)
                yield batch
                step, deaths = step + 1, 0
        finally:
            atexit.unregister(stop)
            stop()

    def _loader(self, dataset: _Rows, start: int, workers: int) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=_From(start),
            num_workers=workers,
            prefetch_factor=self.config.prefetch if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # or the loader would draw its base seed from the training's generator
        )

    def _count(self, batch: Batch) -> None:
        for name, reason in batch.errors:
            if name not in self.errors:
                self.errors[name] = reason
                log.warning(
                    "unreadable image %d of %d tolerated: %s (%s)", len(self.errors), self.tolerated, name, reason
                )
        if len(self.errors) > self.tolerated or not len(batch):
            shown = ", ".join(f"{name} ({reason})" for name, reason in itertools.islice(self.errors.items(), 5))
            more = f" and {len(self.errors) - 5} more" if len(self.errors) > 5 else ""
            raise UserError(
                f"data.max_errors: {len(self.errors)} of {len(self)} images unreadable, {self.tolerated} tolerated: "
                f"{shown}{more}; repair or remove them, or raise data.max_errors"
            )


def example_images(source: ImageSource, config: DataConfig, n: int) -> Tensor:
    """Images for previews, always the same ones: up to n readable ones spread over the set, centre-cropped,
    Float[n,3,h,w] in [0,1]."""
    crop, images = eval_transform(config.hw), []
    for index in torch.linspace(0, len(source) - 1, min(n, len(source))).long().tolist():
        try:
            images.append(crop(source.picture(index)[0]))
        except ImageError:  # the stream names it when training meets it
            continue
    return torch.stack(images) if images else torch.empty(0, 3, *config.hw)


class _From:
    """A sampler: `start`, `start + 1`, ... for ever."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _default_workers() -> int:
    """One beside a training on the CPU, which needs the cores itself; else as many as there are cores, up to 12."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not torch.cuda.is_available():
        return 1 if cores > 1 else 0
    return max(1, min(12, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
