"""The token cache: the ids of K crops of each image, computed once by `addp tokenizer cache`, which the later stages
read in place of pixels (`data.tokens`). They need nothing else of an image: the noisy image is decoded from ids.

    <cache>/tokens.json    whose crops these are and which tokenizer computed them (`TokenCacheKey`)
    <cache>/ids-00000.npy  UInt16[rows,N], the ids of crops in the order of a run with the cache's seed, `rows_per_file`
                           in each file; memory-mapped

Row p is what position p of a run with this seed shows (`addp_core.data.stream`): the first K epochs of such a run are
the same with and without the cache. Later epochs repeat the crops of the first K, in an order of their own.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.base.paths import TOKENS_FILE
from addp_core.data.config import DEFAULT_RESIZE, DataConfig, Interpolation, Resize
from addp_core.data.image_source import ImageSource
from addp_core.data.stream import ReadErrors, epoch_order, rows_of
from addp_core.networks.tokenizer import Tokenizer
from addp_core.weights.fingerprint import fingerprint

MAX_CODES = 2**16  # that an id of 16 bits can name
KEYS_OF_DATA = (
    "size",
    "scale",
    "ratio",
    "flip",
    "resize",
    "shuffle_block",
)  # of the section `data`, which are the same in a run
FORMAT = 1


@dataclass(frozen=True)
class TokenCacheKey:
    """What the ids of a cache depend on. `data` is the digest of the dataset's listing."""

    images: int
    data: str
    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    resize: Resize
    interpolation: Interpolation
    shuffle_block: int = 1
    tokenizer: str = ""  # fingerprint of its weights

    @classmethod
    def of(cls, data: DataConfig, interpolation: Interpolation, source: ImageSource) -> "TokenCacheKey":
        """Return the key of a recipe's crops, without the tokenizer."""
        scale, ratio = ((low, high) for low, high in (data.scale, data.ratio))
        return cls(
            images=len(source),
            data=source.digest(),
            size=data.hw,
            scale=scale,
            ratio=ratio,
            flip=data.flip,
            resize=data.resize or DEFAULT_RESIZE,
            interpolation=interpolation,
            shuffle_block=data.shuffle_block,
        )


@dataclass
class TokenBatch:
    """One process's rows of a micro-batch: Long[b,N] ids in place of images."""

    ids: Tensor
    errors: ReadErrors

    def __len__(self) -> int:
        return len(self.ids)


def file_name(number: int) -> str:
    """Return the name of a file of ids."""
    return f"ids-{number:05d}.npy"


class TokenCache:
    """A complete cache on disk.

    Raises UserError if the folder holds none, it is incomplete or damaged, or its crops are others than those of `key`.
    """

    def __init__(self, folder: Path, key: TokenCacheKey):
        self.folder = folder
        self.record = read_record(folder)
        self._check_key(key)
        self.crops, self.seed, self.images = self.record["crops"], self.record["seed"], key.images
        self.shuffle_block = key.shuffle_block
        self.rows_per_file, tokens = self.record["rows_per_file"], self.record["grid"][0] * self.record["grid"][1]
        rows = self.crops * self.images
        self.files = []
        for number, first in enumerate(range(0, rows, self.rows_per_file)):
            path, shape = folder / file_name(number), (min(self.rows_per_file, rows - first), tokens)
            try:
                ids = np.load(path, mmap_mode="r")
            except FileNotFoundError:
                raise UserError(
                    f"data.tokens: {folder} lacks {path.name}; `addp tokenizer cache` has not come to its end, start "
                    "it again"
                ) from None
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"data.tokens: {path} is damaged ({error}); remove it and compute it again") from error
            if ids.shape != shape or ids.dtype != np.uint16:
                raise UserError(
                    f"data.tokens: {path} holds {ids.dtype}{list(ids.shape)}, expected uint16{list(shape)}; remove it "
                    "and compute it again"
                )
            self.files.append(ids)
        self._row_of_image = lru_cache(2)(self._invert_order)

    def _check_key(self, key: TokenCacheKey) -> None:
        expected = as_record(key)
        for name in (*KEYS_OF_DATA, "interpolation"):
            if self.record.get(name) != expected[name]:
                prefix = "data." if name in KEYS_OF_DATA else ""
                raise UserError(
                    f"{prefix}{name}: found {expected[name]}, but data.tokens={self.folder} has crops with "
                    f"{self.record.get(name)}; expected the same value, or another cache"
                )
        if (self.record.get("images"), self.record.get("data")) != (expected["images"], expected["data"]):
            raise UserError(
                f"data.tokens: {self.folder} has the ids of {self.record.get('images', 0):,} images, which are not the "
                f"{expected['images']:,} images of data.source; expected a cache of these"
            )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise UserError if the ids are not those of this tokenizer."""
        if self.record.get("tokenizer") != fingerprint(tokenizer):
            raise UserError(
                f"data.tokens: {self.folder} was computed with another tokenizer than `tokenizer`; expected the one it "
                "was computed with, or a cache of this one"
            )

    def _invert_order(self, crop: int) -> Tensor:
        """Return the place of each image in epoch `crop` of a run with the cache's seed, Long[n]."""
        return epoch_order(self.images, self.seed, crop, self.shuffle_block).argsort()

    def read(self, image: int, epoch: int) -> np.ndarray:
        """Return the ids of the crop of an image that an epoch shows, UInt16[N]."""
        crop = epoch % self.crops
        file, row = divmod(crop * self.images + int(self._row_of_image(crop)[image]), self.rows_per_file)
        return self.files[file][row]


class TokenStream:
    """Endless batches of ids in place of a `Stream` of images, with the same order."""

    def __init__(self, cache: TokenCache, *, seed: int, batch: int):
        self.cache, self.seed, self.batch = cache, seed, batch
        self.errors: dict[str, str] = {}  # of images that could not be read; the cache has the ids of others for them

    def __len__(self) -> int:
        return self.cache.images

    def add_errors(self, errors: ReadErrors) -> None:
        """Add the unreadable images of other processes, of which there are none."""

    def batches(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[TokenBatch]:
        """Yield this process's rows of micro-steps `start`, `start` + 1, ... without end."""
        rows = rows_of(self.batch, rank, world)
        block = self.cache.shuffle_block
        order = lru_cache(2)(lambda epoch: epoch_order(self.cache.images, self.seed, epoch, block))
        step = start
        while True:
            positions = range(step * self.batch + rows.start, step * self.batch + rows.stop)
            places = [divmod(position, self.cache.images) for position in positions]
            ids = np.stack([self.cache.read(int(order(epoch)[place]), epoch) for epoch, place in places])
            yield TokenBatch(torch.from_numpy(ids.astype(np.int64)), [])
            step += 1


def as_record(key: TokenCacheKey) -> dict:
    """Return a key as JSON has it."""
    return json.loads(json.dumps({"format": FORMAT, **asdict(key)}))


def read_record(folder: Path) -> dict:
    """Return the content of tokens.json. Raises UserError if there is none, or it is damaged."""
    try:
        record = {"shuffle_block": 1, **json.loads((folder / TOKENS_FILE).read_text())}  # caches from before the key
        if record["format"] == FORMAT and record["rows_per_file"] >= 1:
            return record
        raise ValueError(f"format {record['format']}")
    except FileNotFoundError:
        raise UserError(
            f"data.tokens: {folder} holds no {TOKENS_FILE}; expected a folder that `addp tokenizer cache` has written"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.tokens: {folder / TOKENS_FILE} cannot be read ({error}); compute it again") from error
