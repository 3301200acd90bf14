"""`addp det cost`: seconds and peak memory of a detector's training step, with and without activation checkpointing.

The images are noise with filled boxes on it, the weights random: both cost what real ones do, but for what the heads
make of more or fewer objects. A step is forward, backward and AdamW. Processor seconds are those of all threads; on a
busy machine they say more than the clock. On a CPU the peak is that of the process, libraries included; on a GPU that
of the tensors.
"""

import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge

from addp_core.base.errors import UserError
from addp_core.networks.attention import AttentionConfig
from addp_core.training.compute import accelerate_model, arithmetic
from addp_core.training.engine import TrainConfig, make_optimizer
from addp_core.training.timing import Parts, peak_memory, reset_peak_memory
from det.augment import Scene
from det.config import Category, CocoConfig, DetectorConfig, DetectorFile, vitdet_attention
from det.model import build
from det.train import Recipe as TrainRecipe
from det.train import build_encoder, choose_engine

CLASSES = 80  # COCO's


@dataclass
class Recipe:
    """Keys of `addp det cost`."""

    model: Annotated[str, "tiny, small, base, large, or a file whose architecture is taken"] = "base"
    engine: Annotated[Literal["auto", "detectron2", "torchvision"], "as `addp det train` takes it"] = "torchvision"
    size: Annotated[int, Ge(16), "pixels of the training square"] = 1024
    batch: Annotated[int, Ge(1), "images a step"] = 1
    objects: Annotated[int, Ge(1), "an image"] = 7
    warmup: Annotated[int, Ge(0), "steps before those that are timed"] = 1
    steps: Annotated[int, Ge(1), "steps that are timed"] = 3
    checkpointing: Annotated[Literal["both", "on", "off"], "which of the two ways"] = "both"
    attention: AttentionConfig = field(default_factory=vitdet_attention)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "of matrix products"] = "fp32"
    json: Annotated[bool, "print JSON instead of lines"] = False


def run(recipe: Recipe) -> None:
    """Measure and write to stdout, each way as soon as it is known. UserError where the system ends a measurement."""
    figures = {}
    for name in ("on", "off") if recipe.checkpointing == "both" else (recipe.checkpointing,):
        try:
            # a process each: what one has once taken, it may keep
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                of = figures[name] = pool.submit(measure, recipe, name == "on").result()
        except BrokenProcessPool as error:
            raise UserError(
                f"checkpointing={name}: the measuring process was killed, most likely for want of memory; expected a "
                "smaller size or batch, or checkpointing=on"
            ) from error
        seconds = f"{of['seconds_per_image']:.3g} s an image ({of['low']:.3g} to {of['high']:.3g})"
        seconds += f", {of['processor_seconds_per_image']:.3g} s of processors"
        gib = of["peak_memory_bytes"] / 2**30
        if not recipe.json:
            sys.stdout.write(f"checkpointing {name:<3}  {seconds}, peak memory {gib:.2f} GiB, {of['device']}\n")
            sys.stdout.flush()
    if recipe.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def measure(recipe: Recipe, checkpointing: bool) -> dict[str, Any]:
    """Median, lowest and highest seconds an image over the timed steps, and the peak of all steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reset_peak_memory(device)
    model = make_model(recipe, checkpointing).to(device).train()
    accelerate_model(model)
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.8))
    scenes, parts, seconds, busy = make_scenes(recipe, device), Parts(device), [], []
    for step in range(recipe.warmup + recipe.steps):
        torch.manual_seed(step)
        begin = time.process_time()
        with parts("step"):
            with arithmetic(recipe.precision, device):
                loss = sum(model(scenes).values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(parts.take()["step"] / recipe.batch)
        busy.append((time.process_time() - begin) / recipe.batch)
    timed = seconds[recipe.warmup :]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "seconds_per_image": statistics.median(timed),
        "low": min(timed),
        "high": max(timed),
        "processor_seconds_per_image": statistics.median(busy[recipe.warmup :]),
        "peak_memory_bytes": peak_memory(device),
    }


def make_model(recipe: Recipe, checkpointing: bool) -> torch.nn.Module:
    """A detector with random weights."""
    settings = {"attention": recipe.attention, "checkpointing": checkpointing, "drop_path": 0.1}
    data = CocoConfig(size=recipe.size)
    encoder = build_encoder(TrainRecipe(out="", model=recipe.model, init="random", data=data, **settings))
    categories = tuple(Category(i, str(i)) for i in range(CLASSES))
    engine = choose_engine(recipe.engine)
    file = DetectorFile(
        engine, encoder.config, encoder.attention, encoder.patch_size, recipe.size, recipe.detector, categories
    )
    return build(file, encoder)


def make_scenes(recipe: Recipe, device: torch.device) -> list[Scene]:
    """Noise with boxes of an eighth to a half of the side."""
    size, generator = recipe.size, torch.Generator().manual_seed(0)
    scenes = []
    for _ in range(recipe.batch):
        sides = torch.randint(size // 8, size // 2 + 1, (recipe.objects, 2), generator=generator)
        corners = (torch.rand(recipe.objects, 2, generator=generator) * (size - sides)).long()
        boxes = torch.cat([corners, corners + sides], 1)
        masks = torch.zeros(recipe.objects, size, size, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        image = torch.randint(256, (3, size, size), dtype=torch.uint8, generator=generator)
        labels = torch.randint(CLASSES, (recipe.objects,), generator=generator)
        scenes.append(Scene(*(part.to(device) for part in (image, boxes.float(), labels, masks))))
    return scenes
