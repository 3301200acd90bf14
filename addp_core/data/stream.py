"""The stream of training batches.

    source = open_source(config)                         # folders, lists, tar shards, hub datasets
    stream = Stream(source, pretrain_transform(config), config, seed=0, batch=256)
    for batch in stream.batches(start, rank, world): ... # endless; batch.images is Float[b,3,h,w] in [0,1]

Order and augmentation are functions of the seed and of an image's position in the run only: position p is row
p % batch of micro-step p // batch, it shows image `epoch_order(n, seed, p // n)[p % n]`, and its crop is drawn from
`seed_for(seed, "augment", p)`. A run that was stopped and resumed, or that has other numbers of workers or processes,
sees the same pixels.

An image that cannot be read is replaced by the next readable one in the order of its epoch, named once in the log, and
counted. The run ends with a `UserError` when more than `max_errors` images were unreadable, over all its processes and
since they were started.
"""

import atexit
import itertools
import logging
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from addp_core.base.cpu import usable_cores
from addp_core.base.errors import UserError
from addp_core.base.rng import generator, seed_for
from addp_core.data.cache import CachedSource
from addp_core.data.config import DataConfig
from addp_core.data.images import Cut, ImageError, LazyTransform, eval_transform
from addp_core.data.pixels import stack_pixels, to_float
from addp_core.data.sources import ImageSource

log = logging.getLogger("addp")

MAX_REPLACEMENTS = 1000  # after this many unreadable images in a row, the whole dataset is taken to be unreadable

ReadErrors = list[tuple[str, str]]  # (name, reason) of images that could not be read


@dataclass
class Batch:
    """One process's rows of a micro-batch, as data loading processes send them: images are bytes until the device."""

    pixels: Tensor  # UInt8[b,3,h,w] of the crops of `addp_core.data.images`; Float[b,3,h,w] of other transforms
    labels: Tensor  # Long[b], -1 where an image has no label
    indices: Tensor  # Long[b], into the source; replacements of unreadable images have their own index
    errors: ReadErrors
    mirrored: Tensor | None = None  # Bool[b], which of the crops are still to be mirrored

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def images(self) -> Tensor:
        """Float[b,3,h,w], in [0,1] from crops: converted and mirrored on the device that the pixels are on."""
        return to_float(self.pixels, self.mirrored) if self.pixels.dtype == torch.uint8 else self.pixels

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; the loader calls this in its own thread if there is a GPU."""
        tensors = (self.pixels, self.labels, self.indices)
        pixels, labels, indices = (tensor.pin_memory() for tensor in tensors)
        mirrored = None if self.mirrored is None else self.mirrored.pin_memory()
        return Batch(pixels, labels, indices, self.errors, mirrored)


class _MicroBatches(Dataset):
    """Maps a micro-step to the rows `rows` of its batch."""

    def __init__(
        self,
        source: ImageSource,
        transform: LazyTransform | Callable[[Any], Any],
        collate: Callable[..., Any],
        seed: int,
        batch: int,
        rows: slice,
        repeats: int,
        block: int,
    ):
        self.source, self.transform, self.collate = source, transform, collate
        self.seed, self.batch, self.rows, self.repeats, self.block = seed, batch, rows, repeats, block
        self._epoch_order = lru_cache(2)(self._permutation)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_epoch_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _epoch_order=lru_cache(2)(self._permutation))

    def _permutation(self, epoch: int) -> Tensor:
        return epoch_order(len(self.source), self.seed, epoch, self.block)

    def _place(self, position: int) -> tuple[Tensor, int]:
        """Return the order of the epoch that a position of the run belongs to, and the position in it."""
        epoch, place = divmod(position // self.repeats, len(self.source))
        return self._epoch_order(epoch), place

    def __getitem__(self, step: int) -> Any:
        samples, labels, indices = [], [], []
        errors: ReadErrors = []
        positions = range(step * self.batch + self.rows.start, step * self.batch + self.rows.stop)
        self.source.read_ahead([int(order[place]) for order, place in map(self._place, positions)])
        with preserve_rng():
            for position in positions:
                sample = self._read_sample(position, errors)
                if sample is None:
                    return Batch(torch.empty(0), torch.empty(0), torch.empty(0), errors)
                samples.append(sample[0])
                labels.append(sample[1])
                indices.append(sample[2])
        return self.collate(samples, torch.tensor(labels), torch.tensor(indices), errors)

    def _read_sample(self, position: int, errors: ReadErrors) -> tuple[Any, int, int] | None:
        """Return (output of the transform, label, index) for this position of the run, or None if nothing is readable.

        Unreadable images are appended to `errors`.
        """
        order, first = self._place(position)
        for offset in range(min(len(order), MAX_REPLACEMENTS)):
            index = int(order[(first + offset) % len(order)])
            try:
                image, label = self.source.open_image(index)
                if isinstance(self.transform, LazyTransform):
                    self.transform.seed(seed_for(self.seed, "augment", position))
                    return self.transform.sample(image), label, index
                decoded = image.decode()
                seed_cpu(seed_for(self.seed, "augment", position))
                return self.transform(decoded), label, index
            except ImageError as error:
                errors.append((self.source.name(index), str(error)))
        return None


def _stack_images(samples: list[Cut] | list[Tensor], labels: Tensor, indices: Tensor, errors: ReadErrors) -> Batch:
    """Build a batch from the crops, or from the images Float[3,h,w] of another transform."""
    if isinstance(samples[0], Cut):
        pixels = stack_pixels([sample.pixels for sample in samples])
        return Batch(pixels, labels, indices, errors, torch.tensor([sample.mirrored for sample in samples]))
    return Batch(default_collate(samples), labels, indices, errors)


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Raise a `UserError` of a data worker with its message alone, of which torch makes a part of a traceback."""
    try:
        yield
    except UserError as error:
        lines = str(error).strip().splitlines()
        if not lines[0].startswith("Caught UserError in DataLoader worker"):
            raise
        raise UserError(lines[-1].partition("UserError: ")[2] or lines[-1]) from None


@contextmanager
def iterate(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """Yield an iterator over a loader, and stop its workers when the block ends.

    A `UserError` of a worker is raised with its message alone. Workers that ignore signals would outlive an error whose
    traceback holds the iterator, and multiprocessing waits for them.
    """
    batches: Any = iter(loader)
    try:
        with errors_of_workers():
            yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the CPU's random states after the block: with workers=0, loading must not change training's numbers."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def seed_cpu(seed: int) -> None:
    """Seed Python's random, numpy and torch on the CPU (torch.manual_seed would seed the GPU's generators too)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def ignore_signals(_: int) -> None:
    """Initialize a worker: only the training process handles signals, and it needs its workers to finish its step."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class Stream:
    """Endless batches of a source, each a function of (seed, micro-step) only. `len()` is the number of images.

    Args:
        source: the images.
        transform: a `LazyTransform` such as a `Crop`, or any function of an RGB Pillow image that returns Float[3,h,w].
            It may draw from `random`, numpy and torch, which are seeded for each image.
        config: of its keys, those about loading; the transform knows about cropping.
        seed: of order and augmentation.
        batch: number of images of one micro-step over all processes.
        collate: called as collate(samples, labels, indices, errors) for transforms that return more than an image. Its
            result has `errors` and a length, as a `Batch` does.
        repeats: how many times in a row an image is shown, each time with a new augmentation (repeated augmentation,
            arXiv 1901.09335; timm's sampler for it is tied to epochs and processes). `len()` positions then show fewer
            images.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: LazyTransform | Callable[[Any], Any],
        config: DataConfig,
        *,
        seed: int,
        batch: int,
        collate: Callable[..., Any] = _stack_images,
        repeats: int = 1,
    ):
        if batch < 1:
            raise UserError(f"batch: found {batch}, expected at least 1")
        if config.cache == "ram":
            # At this size, even the smallest crop of the recipe is enlarged no more than from the original.
            side = math.ceil(max(config.hw) / math.sqrt(config.scale[0] * min(config.ratio[0], 1 / config.ratio[1])))
            source = CachedSource(source, side, config.cache_gb)
        self.source, self.transform, self.config, self.seed, self.batch = source, transform, config, seed, batch
        self.collate, self.repeats = collate, repeats
        self.errors: dict[str, str] = {}  # name -> reason of every unreadable image that is known to this process

    def __len__(self) -> int:
        return len(self.source)

    @property
    def error_limit(self) -> int:
        """The number of unreadable images that may be replaced."""
        return error_limit(self.config.max_errors, len(self))

    def rows_of(self, rank: int, world: int) -> slice:
        """Return the contiguous rows of each micro-batch that process `rank` of `world` gets."""
        return rows_of(self.batch, rank, world)

    def batches(self, start: int = 0, rank: int = 0, world: int = 1) -> Generator[Batch, None, None]:
        """Yield this process's rows of micro-steps `start`, `start + 1`, ... without end.

        Close or delete the generator to stop its workers. If a worker dies (for lack of memory, say), all workers are
        restarted and the batch is loaded again; the third death in a row is raised. Raises `UserError` when more than
        `max_errors` images are unreadable.
        """
        rows = self.rows_of(rank, world)
        block = self.config.shuffle_block
        dataset = _MicroBatches(
            self.source, self.transform, self.collate, self.seed, self.batch, rows, self.repeats, block
        )
        workers = default_workers() if self.config.workers is None else self.config.workers
        loader: list[Any] = []  # the running iterator of a DataLoader, if there is one

        def stop_workers() -> None:
            # Not left to reference counting: a traceback may keep the iterator until the interpreter exits, and then
            # multiprocessing would wait forever for workers that ignore its SIGTERM.
            if loader and workers:
                loader[0]._shutdown_workers()
            loader.clear()

        atexit.register(stop_workers)
        step, deaths = start, 0
        try:
            while True:
                if not loader:
                    loader.append(iter(self._loader(dataset, step, workers)))
                try:
                    with errors_of_workers():
                        batch = next(loader[0])
                except RuntimeError as error:
                    if not str(error).startswith("DataLoader worker (pid"):  # an error in a worker, not its death
                        raise
                    stop_workers()
                    deaths += 1
                    if deaths == 3:
                        raise RuntimeError(
                            f"data workers died three times at micro-step {step}, possibly for lack of memory or "
                            f"/dev/shm; set data.workers=1 or data.workers=0 ({error})"
                        ) from error
                    log.warning("restarting the data workers at micro-step %d: %s", step, error)
                    continue
                self._count_errors(batch)
                yield batch
                step, deaths = step + 1, 0
        finally:
            atexit.unregister(stop_workers)
            stop_workers()

    def _loader(self, dataset: _MicroBatches, start: int, workers: int) -> DataLoader:
        # Forked workers share the memory of the cache; any other start method would send a copy to each of them.
        fork = workers and isinstance(self.source, CachedSource) and sys.platform == "linux"
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=_StepsFrom(start),
            num_workers=workers,
            multiprocessing_context="fork" if fork else None,
            prefetch_factor=self.config.prefetch if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # otherwise the loader would draw its base seed from training's generator
        )

    def _count_errors(self, batch: Batch) -> None:
        for name, reason in batch.errors:
            if name not in self.errors:
                self.errors[name] = reason
                log.warning(
                    "unreadable image %d of %d tolerated: %s (%s)", len(self.errors), self.error_limit, name, reason
                )
        self._check_errors(readable=len(batch) > 0)

    def add_errors(self, errors: ReadErrors) -> None:
        """Add the unreadable images of other processes. Raises UserError if they are now more than `max_errors`."""
        self.errors |= dict(errors)
        self._check_errors()

    def _check_errors(self, readable: bool = True) -> None:
        if len(self.errors) > self.error_limit or not readable:
            examples = ", ".join(f"{name} ({reason})" for name, reason in itertools.islice(self.errors.items(), 5))
            more = f" and {len(self.errors) - 5} more" if len(self.errors) > 5 else ""
            raise UserError(
                f"data.max_errors: {len(self.errors)} of {len(self)} images unreadable, {self.error_limit} tolerated: "
                f"{examples}{more}; repair or remove them, or raise data.max_errors"
            )


def epoch_order(images: int, seed: int, epoch: int, block: int = 1) -> Tensor:
    """Return the order in which a run shows the images of an epoch, Long[images].

    block: this many images that are neighbors in the source are shown in a row. Where blocks begin, and so which images
    are in one, differs between epochs.
    """
    draw = generator(seed, "order", epoch)
    if block == 1:
        return torch.randperm(images, generator=draw)
    shift = int(torch.randint(block, (), generator=draw))
    block_of_image = torch.arange(shift, shift + images) // block
    place_of_block = torch.randperm(int(block_of_image[-1]) + 1, generator=draw)
    return place_of_block[block_of_image].argsort(stable=True)


def rows_of(batch: int, rank: int, world: int) -> slice:
    """Return the contiguous rows of a batch that process `rank` of `world` gets. Raises UserError if there are none."""
    if not 0 <= rank < world <= batch:
        raise UserError(f"batch: found {batch} images per step for {world} processes, expected at least one for each")
    return slice(batch * rank // world, batch * (rank + 1) // world)


def error_limit(max_errors: float, images: int) -> int:
    """Return how many unreadable images `max_errors` allows; any fraction above 0 allows at least one."""
    if max_errors >= 1:
        return int(min(max_errors, images))  # .inf tolerates all
    return max(1, round(max_errors * images)) if max_errors else 0


def example_images(source: ImageSource, config: DataConfig, n: int) -> Tensor:
    """Return up to n readable images for previews, Float[n,3,h,w] in [0,1]: always the same ones, center-cropped.

    They are spread over the dataset.
    """
    crop, images = eval_transform(config.hw), []
    indices = torch.linspace(0, len(source) - 1, min(n, len(source))).long().tolist()
    source.read_ahead(indices)
    for index in indices:
        try:
            images.append(crop(source.open_image(index)[0]))
        except ImageError:  # the stream logs it when training reads it
            continue
    return torch.stack(images) if images else torch.empty(0, 3, *config.hw)


class _StepsFrom(Sampler[int]):
    """A sampler that yields `start`, `start + 1`, ... without end."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def default_workers() -> int:
    """Return the default number of workers per training process.

    On a CPU it is 1, because training needs the cores itself; with a GPU, the process's share of the cores, at most 12.
    """
    cores = usable_cores()
    if not torch.cuda.is_available():
        return 1 if cores > 1 else 0
    return max(1, min(12, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
