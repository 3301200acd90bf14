"""Speed of loading training images, beside timm's and torchvision's pipelines on the same files.

All three read the files, draw random crops of the same distribution, resize them bicubically, mirror half of them and
build batches of bytes, as they are sent to the device; conversion to float and normalization are the device's, as in
timm's loader. timm's is its `create_loader`; torchvision's is the v2 transforms of its training references.
"""

import io
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_loader
from timm.data.dataset import ImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from addp_core.base.cpu import usable_cores
from addp_core.base.errors import UserError
from addp_core.base.tables import text_table
from addp_core.data.config import DataConfig
from addp_core.data.image_source import ImageSource, Subset
from addp_core.data.images import pretrain_transform
from addp_core.data.sources import open_source
from addp_core.data.stream import Stream
from tools.speed.spread import spread

log = logging.getLogger("addp")

BATCH = 64  # images
MAX_IMAGES = 1024  # that a repeat loads

Batches = Iterator[Any]


class Rate(NamedTuple):
    """The speed of one pass over the images."""

    images_per_s: float
    cpu_ms_per_image: float | None  # of the only process; None if others load


def measure_loading(data: str, size: tuple[int, int], repeats: int, warmup: int) -> dict[str, Any]:
    """Time the pipelines in turns (A B C A B C ...) on one core and on all cores.

    Args:
        data: the images, as in the key `data` of training.
        size: height and width of the crops.
        repeats: timed passes of each pipeline.
        warmup: passes that are not timed.

    Returns:
        For "one_core" and "all_cores" and each pipeline: images per second, CPU milliseconds per image, and how many
        times the speed of each other pipeline ours has, pair by pair.

    Raises:
        UserError: there are fewer images than two batches have.
    """
    config = DataConfig(data, size=size)
    source = open_source(config)
    count = min(len(source), MAX_IMAGES) // BATCH * BATCH
    if count < 2 * BATCH:
        raise UserError(f"data: {data} has {len(source)} images; expected at least {2 * BATCH}, two batches")
    source = Subset(source, torch.linspace(0, len(source) - 1, count).long().numpy())
    report: dict[str, Any] = {"images": count, "batch": BATCH, "size": size, "cores": usable_cores()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, workers in (("one_core", 0), ("all_cores", usable_cores())):
            report[name] = _measure(pipelines(source, config, workers), count, workers, repeats, warmup)
    finally:
        torch.set_num_threads(threads)
    return report


def _measure(
    sides: dict[str, Callable[[], Batches]], count: int, workers: int, repeats: int, warmup: int
) -> dict[str, Any]:
    """Return the speed of each pipeline, and ours as a multiple of the others'."""
    rates: dict[str, list[Rate]] = {name: [] for name in sides}
    for repeat in range(-warmup, repeats):
        for name, start in sides.items():
            rate = one_pass(start(), count, workers)
            log.info("loading, %d workers, %s: %.0f images/s", workers, name, rate.images_per_s)
            if repeat >= 0:
                rates[name].append(rate)
    report: dict[str, Any] = {}
    for name, rows in rates.items():
        report[name] = {"images_per_s": spread([row.images_per_s for row in rows])}
        cpu = [row.cpu_ms_per_image for row in rows if row.cpu_ms_per_image is not None]
        report[name] |= {"cpu_ms_per_image": spread(cpu)} if cpu else {}
        if name != "addp":
            pairs = zip(rates["addp"], rows, strict=True)
            ratios = [ours.images_per_s / theirs.images_per_s for ours, theirs in pairs]
            report[name]["addp_times_this"] = spread(ratios)
    return report


def one_pass(batches: Batches, count: int, workers: int) -> Rate:
    """Load `count` images; the clock starts with the arrival of the first batch, when all processes are at work."""
    next(batches)
    begin, cpu = time.perf_counter(), time.process_time()
    loaded = sum(BATCH for _ in itertools.islice(batches, count // BATCH - 1))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if hasattr(batches, "close"):
        batches.close()
    return Rate(loaded / seconds, None if workers else 1e3 * cpu / loaded)


def pipelines(source: ImageSource, config: DataConfig, workers: int) -> dict[str, Callable[[], Batches]]:
    """Return what starts each pipeline over the images, with this many loading processes."""
    config.workers = workers
    ours = Stream(source, pretrain_transform(config), config, seed=0, batch=BATCH)
    # the loader beneath the one that converts and normalizes on the device
    timm_loader: Any = create_loader(
        ImageDataset("", reader=_FileReader(source)),
        (3, *config.hw),
        BATCH,
        is_training=True,
        use_prefetcher=True,
        scale=config.scale,
        ratio=config.ratio,
        color_jitter=None,  # type: ignore[arg-type]
        interpolation="bicubic",
        num_workers=workers,
        persistent_workers=False,
        device=torch.device("cpu"),
    ).loader
    torchvision_loader: Any = DataLoader(
        _TorchvisionDataset(source, config), BATCH, shuffle=True, drop_last=True, num_workers=workers
    )
    return {
        "addp": lambda: ours.batches(),
        "timm": lambda: iter(timm_loader),
        "torchvision": lambda: iter(torchvision_loader),
    }


class _FileReader(Reader):
    """timm's interface to the encoded images."""

    def __init__(self, source: ImageSource):
        super().__init__()
        self.source = source

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        encoded, label = self.source.read_bytes(index)
        return io.BytesIO(encoded), label

    def __len__(self) -> int:
        return len(self.source)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.source.name(index)


class _TorchvisionDataset(Dataset):
    """Images read by Pillow, as in torchvision's datasets, with the transforms of its references for Pillow images."""

    def __init__(self, source: ImageSource, config: DataConfig):
        self.source = source
        crop = v2.RandomResizedCrop(config.hw, config.scale, config.ratio, InterpolationMode.BICUBIC)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        encoded, label = self.source.read_bytes(index)
        return self.transform(Image.open(io.BytesIO(encoded)).convert("RGB")), label

    def __len__(self) -> int:
        return len(self.source)


def loading_table(report: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    height, width = report["size"]
    sides = list(report["one_core"])
    rows = [[f"loading, {report['images']} images, {height} x {width} px", *sides]]
    for title, key in (("one core", "one_core"), (f"all {report['cores']} cores", "all_cores")):
        for label, statistic in ((f"{title}, images/s, median", "median"), ("  lowest", "low"), ("  highest", "high")):
            rates = [report[key][side]["images_per_s"][statistic] for side in sides]
            rows.append([label, *(f"{rate:.4g}" for rate in rates)])
        if key == "one_core":
            cpu = [report[key][side]["cpu_ms_per_image"]["median"] for side in sides]
            rows.append(["  CPU ms/image, median", *(f"{value:.3g}" for value in cpu)])
        ratios = [report[key][side]["addp_times_this"] for side in sides[1:]]
        cells = [f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" for ratio in ratios]
        rows.append(["  addp: times its speed", "", *cells])
    return text_table(rows)
