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
import itertools
import logging
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from addp_core.base.errors import UserError
from addp_core.base.rng import generator, seed_for
from addp_core.data.cache import CachedSource
from addp_core.data.config import DataConfig
from addp_core.data.images import Crop, ImageError, eval_transform
from addp_core.data.sources import ImageSource

log = logging.getLogger("addp")

TRIES = 1000  # unreadable images in a row before the set, not an image, is taken to be broken


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

    def __init__(
        self,
        source: ImageSource,
        transform: Callable,
        collate: Callable,
        seed: int,
        batch: int,
        rows: slice,
        repeats: int,
    ):
        self.source, self.transform, self.collate = source, transform, collate
        self.seed, self.batch, self.rows, self.repeats = seed, batch, rows, repeats
        self._order = lru_cache(2)(self._permutation)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _order=lru_cache(2)(self._permutation))

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.source), generator=generator(self.seed, "order", epoch))

    def __getitem__(self, step: int) -> Any:
        samples, labels, indices, errors = [], [], [], []
        with preserve_rng():
            for position in range(step * self.batch + self.rows.start, step * self.batch + self.rows.stop):
                sample = self._sample(position, errors)
                if sample is None:
                    return _Loaded(torch.empty(0), torch.empty(0), torch.empty(0), errors)
                samples.append(sample[0])
                labels.append(sample[1])
                indices.append(sample[2])
        return self.collate(samples, torch.tensor(labels), torch.tensor(indices), errors)

    def _sample(self, position: int, errors: list[tuple[str, str]]) -> tuple[Any, int, int] | None:
        """(what the transform made of it, label, index) at this position of the run; None where nothing can be read."""
        epoch, place = divmod(position // self.repeats, len(self.source))
        order = self._order(epoch)
        for offset in range(min(len(order), TRIES)):
            index = int(order[(place + offset) % len(order)])
            try:
                picture, label = self.source.open_image(index)
                image = None if isinstance(self.transform, Crop) else picture.decode()
                seed_cpu(seed_for(self.seed, "augment", position))
                return self.transform.pixels(picture) if image is None else self.transform(image), label, index
            except ImageError as error:
                errors.append((self.source.name(index), str(error)))
        return None


def _stacked(images: list[Tensor], labels: Tensor, indices: Tensor, errors: list[tuple[str, str]]) -> _Loaded:
    stacked = torch.empty((len(images), *images[0].shape), dtype=images[0].dtype)  # whatever strides the rows have
    for row, image in zip(stacked, images, strict=True):
        row.copy_(image)
    return _Loaded(stacked, labels, indices, errors)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Puts the CPU's random states back: with workers=0 the training's numbers must not depend on the images."""
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(tensor)


def seed_cpu(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's generators too


def ignore_signals(_: int) -> None:
    """Signals are the training process's to handle: it finishes its step, for which it needs its workers."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class Stream:
    """Batches of a source for ever, each a function of (seed, micro-step) alone. `len()` is the number of images.

    `transform` is one of this module's crops, or any function of an RGB Pillow image that gives Float[3,h,w]: it may
    draw from `random`, numpy and torch, which are seeded for each image. `batch` counts the images of one micro-step
    over all processes. A task whose transform gives more than an image brings
    `collate(samples, labels, indices, errors)`: what it returns has `errors` and a length, as a `Batch` does.
    `repeats`: times that an image is shown in a row, each time transformed anew (repeated augmentation, arXiv
    1901.09335; timm's sampler for it is tied to epochs and processes); `len()` positions then see fewer images.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Any], Any],
        config: DataConfig,
        *,
        seed: int,
        batch: int,
        collate: Callable[..., Any] = _stacked,
        repeats: int = 1,
    ):
        if batch < 1:
            raise UserError(f"batch: {batch}, expected at least 1")
        if config.cache == "ram":
            # no crop of this recipe is enlarged more from this size than from the original
            side = math.ceil(max(config.hw) / math.sqrt(config.scale[0] * min(config.ratio[0], 1 / config.ratio[1])))
            source = CachedSource(source, side, config.cache_gb)
        self.source, self.transform, self.config, self.seed, self.batch = source, transform, config, seed, batch
        self.collate, self.repeats = collate, repeats
        self.errors: dict[str, str] = {}  # name -> reason of every unreadable image this process has met

    def __len__(self) -> int:
        return len(self.source)

    @property
    def error_limit(self) -> int:
        """The number of unreadable images that may be replaced."""
        return error_limit(self.config.max_errors, len(self))

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
        rows = self.rows(rank, world)
        dataset = _Rows(self.source, self.transform, self.collate, self.seed, self.batch, rows, self.repeats)
        running: list[Iterator] = []

        def stop() -> None:
            # Not left to reference counts: a traceback may hold the iterator until the interpreter ends, and there
            # multiprocessing would wait for ever for workers that do not heed its SIGTERM.
            if running and workers:
                running[0]._shutdown_workers()
            running.clear()

        atexit.register(stop)
        workers = default_workers() if self.config.workers is None else self.config.workers
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
                batch = loaded.batch() if isinstance(loaded, _Loaded) else loaded
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
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # or the loader would draw its base seed from the training's generator
        )

    def _count(self, batch: Batch) -> None:
        for name, reason in batch.errors:
            if name not in self.errors:
                self.errors[name] = reason
                log.warning(
                    "unreadable image %d of %d tolerated: %s (%s)", len(self.errors), self.error_limit, name, reason
                )
        if len(self.errors) > self.error_limit or not len(batch):
            shown = ", ".join(f"{name} ({reason})" for name, reason in itertools.islice(self.errors.items(), 5))
            more = f" and {len(self.errors) - 5} more" if len(self.errors) > 5 else ""
            raise UserError(
                f"data.max_errors: {len(self.errors)} of {len(self)} images unreadable, {self.error_limit} tolerated: "
                f"{shown}{more}; repair or remove them, or raise data.max_errors"
            )


def error_limit(limit: float, images: int) -> int:
    """The number of unreadable images of so many that `max_errors` allows; any share above 0 allows one."""
    return int(limit) if limit >= 1 else max(1, round(limit * images)) if limit else 0


def example_images(source: ImageSource, config: DataConfig, n: int) -> Tensor:
    """Images for previews, always the same ones: up to n readable ones spread over the set, centre-cropped,
    Float[n,3,h,w] in [0,1]."""
    crop, images = eval_transform(config.hw), []
    for index in torch.linspace(0, len(source) - 1, min(n, len(source))).long().tolist():
        try:
            images.append(crop(source.open_image(index)[0]))
        except ImageError:  # the stream names it when training meets it
            continue
    return torch.stack(images) if images else torch.empty(0, 3, *config.hw)


class _From:
    """A sampler: `start`, `start + 1`, ... for ever."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def default_workers() -> int:
    """One beside a training on the CPU, which needs the cores itself; else as many as there are cores, up to 12."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not torch.cuda.is_available():
        return 1 if cores > 1 else 0
    return max(1, min(12, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
