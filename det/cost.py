"""`addp det cost`: seconds and peak memory of a detector's training step, with and without activation checkpointing.

Images are noise with filled boxes, and weights are random. Both cost the same as real ones, except that the time of the
heads depends on the number of objects. A step is forward, backward and AdamW. CPU seconds are summed over all threads;
on a busy machine they are more reliable than wall-clock seconds. The peak memory is that of the process on a CPU,
libraries included, and that of the tensors on a GPU.
"""

import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from addp_core.base.errors import UserError
from addp_core.training.compute import accelerate_model, autocast
from addp_core.training.optimization import make_optimizer
from addp_core.training.precision import matrix_width, resolve_precision
from addp_core.training.stage import TrainConfig
from addp_core.training.timing import PartTimer, peak_memory, reset_peak_memory
from det.augment import DetectionSample
from det.config import (
    Category,
    CocoConfig,
    DetectorArchitecture,
    describe_encoder,
)
from det.model import Detector, build_detector
from det.recipe import CostRecipe as Recipe
from det.train import Recipe as TrainRecipe
from det.train import build_encoder, resolve_engine

COCO_CLASSES = 80


def run(recipe: Recipe) -> None:
    """Measure, and print each measurement as soon as it is done.

    Raises UserError if the system kills the measuring process.
    """
    measurements: dict[str, dict[str, Any]] = {}
    for name in ("on", "off") if recipe.checkpointing == "both" else (recipe.checkpointing,):
        try:
            # one process per measurement, because a process may keep memory that it once had
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                measurements[name] = pool.submit(measure, recipe, name == "on").result()
        except BrokenProcessPool as error:
            raise UserError(
                f"checkpointing={name}: the measuring process was killed, most likely because memory ran out; expected "
                "a smaller size or batch, or checkpointing=on"
            ) from error
        if not recipe.json:
            sys.stdout.write(format_measurement(name, measurements[name]))
            sys.stdout.flush()
    if recipe.json:
        sys.stdout.write(json.dumps(measurements, indent=2) + "\n")


def format_measurement(name: str, measurement: dict[str, Any]) -> str:
    """Return the line for activation checkpointing "on" or "off"."""
    seconds = "{seconds_per_image:.3g} s an image ({low:.3g} to {high:.3g})".format(**measurement)
    cpu_seconds = f"{measurement['processor_seconds_per_image']:.3g} CPU seconds"
    gib = measurement["peak_memory_bytes"] / 2**30
    return f"checkpointing {name:<3}  {seconds}, {cpu_seconds}, peak memory {gib:.2f} GiB, {measurement['device']}\n"


def measure(recipe: Recipe, checkpointing: bool) -> dict[str, Any]:
    """Return the median, lowest and highest seconds per image over the timed steps, and the peak memory of all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reset_peak_memory(device)
    model = make_model(recipe, checkpointing).to(device).train()
    accelerate_model(model)
    precision = resolve_precision(recipe.precision, device, matrix_width(model))
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.8))
    samples, parts = make_samples(recipe, device), PartTimer(device)
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    for step in range(recipe.warmup + recipe.steps):
        torch.manual_seed(step)
        begin = time.process_time()
        with parts("step"):
            with autocast(precision, device):
                loss = sum(model(samples).values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(parts.take()["step"] / recipe.batch)
        cpu_seconds.append((time.process_time() - begin) / recipe.batch)
    timed = seconds[recipe.warmup :]
    return {
        "precision": precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "seconds_per_image": statistics.median(timed),
        "low": min(timed),
        "high": max(timed),
        "processor_seconds_per_image": statistics.median(cpu_seconds[recipe.warmup :]),
        "peak_memory_bytes": peak_memory(device),
    }


def make_model(recipe: Recipe, checkpointing: bool) -> Detector:
    """Return a detector with random weights."""
    encoder = build_encoder(
        TrainRecipe(
            out="",
            model=recipe.model,
            init="random",
            data=CocoConfig(size=recipe.size),
            attention=recipe.attention,
            checkpointing=checkpointing,
            drop_path=0.1,
        )
    )
    architecture = DetectorArchitecture(
        engine=resolve_engine(recipe.engine),
        **describe_encoder(encoder),
        size=recipe.size,
        detector=recipe.detector,
        categories=tuple(Category(i, str(i)) for i in range(COCO_CLASSES)),
    )
    return build_detector(architecture, encoder)


def make_samples(recipe: Recipe, device: torch.device) -> list[DetectionSample]:
    """Return noise images with filled boxes whose sides are an eighth to a half of the image's."""
    size, generator = recipe.size, torch.Generator().manual_seed(0)
    samples = []
    for _ in range(recipe.batch):
        sides = torch.randint(size // 8, size // 2 + 1, (recipe.objects, 2), generator=generator)
        corners = (torch.rand(recipe.objects, 2, generator=generator) * (size - sides)).long()
        boxes = torch.cat([corners, corners + sides], 1)
        masks = torch.zeros(recipe.objects, size, size, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        image = torch.randint(256, (3, size, size), dtype=torch.uint8, generator=generator)
        labels = torch.randint(COCO_CLASSES, (recipe.objects,), generator=generator)
        image, boxes, labels, masks = (part.to(device) for part in (image, boxes.float(), labels, masks))
        samples.append(DetectionSample(image, boxes, labels, None if recipe.detector.masks is False else masks))
    return samples
