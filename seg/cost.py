"""`addp seg cost`: seconds and peak memory of a segmentor's training step and of one test crop.

Images and labels are noise and weights are random, which costs as much as real ones. A training step is forward,
backward and the config's optimizer. On a CPU, the peak memory is that of the whole process; on a GPU, that of the
tensors.
"""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, cast

import torch

from addp_core.networks.cnn import CnnEncoder
from addp_core.training.compute import accelerate_model, autocast
from addp_core.training.precision import resolve_precision
from addp_core.training.timing import PartTimer, peak_memory, reset_peak_memory
from seg.mmseg_config import fill_model, import_mmseg, read_config
from seg.recipe import CostRecipe as Recipe
from seg.recipe import TrainScenes
from seg.segmentor import Segmentor
from seg.train import Recipe as TrainRecipe
from seg.train import describe_segmentor, load_model, resolve, resolve_for_cnn

ADE20K_CLASSES = 150


def run(recipe: Recipe) -> None:
    """Measure and print."""
    costs = measure(recipe)
    if recipe.json:
        sys.stdout.write(json.dumps(costs, indent=2) + "\n")
        return
    for name in ("test", "train"):
        cost = costs[name]
        seconds = f"{cost['seconds_per_crop']:.3g} s per crop ({cost['low']:.3g} to {cost['high']:.3g})"
        sys.stdout.write(f"{name:<5}  {seconds}, peak memory {cost['peak_memory_bytes'] / 2**30:.2f} GiB\n")
    sys.stdout.write(f"{costs['crop']} px, batch {recipe.batch} in training, {costs['device']}\n")


def measure(recipe: Recipe) -> dict[str, Any]:
    """Return the device, the crop, and what `time_step` returns for a test crop and for a training step."""
    import_mmseg()
    from mmengine.optim import build_optim_wrapper
    from mmseg.structures import SegDataSample

    from seg.launch import build_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg, segmentor = read_segmentor(recipe)
    fill_model(cfg, segmentor)
    model = cast(Any, build_model(cfg).to(device))  # an mmseg EncoderDecoder
    model.backbone.encoder.checkpointing = recipe.checkpointing
    accelerate_model(model)
    precision = resolve_precision(recipe.precision, device, segmentor.width)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    crop = segmentor.crop
    images = torch.rand(recipe.batch, 3, crop, crop, device=device)
    samples = [SegDataSample(metainfo={"img_shape": (crop, crop), "ori_shape": (crop, crop)}) for _ in images]
    for sample in samples:
        sample.gt_sem_seg = random_labels(crop, device)

    def test() -> None:
        with torch.inference_mode(), autocast(precision, device):
            model.eval().encode_decode(images[:1], [samples[0].metainfo])

    def train() -> None:
        with autocast(precision, device):
            losses = model.train().loss(images, samples)
            total = sum(value for name, value in losses.items() if "loss" in name)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    costs = {"test": time_step(recipe, device, test, 1), "train": time_step(recipe, device, train, recipe.batch)}
    return {"device": name, "crop": crop, "precision": precision, **costs}


def time_step(recipe: Recipe, device: torch.device, step: Callable[[], None], crops: int) -> dict[str, float]:
    """Return the median, lowest and highest seconds per crop of a step with this many crops, and its peak memory."""
    reset_peak_memory(device)
    timer, seconds = PartTimer(device), []
    for i in range(1 + recipe.steps):
        torch.manual_seed(i)
        with timer("step"):
            step()
        seconds.append(timer.take()["step"] / crops)
    timed = seconds[1:]
    return {
        "seconds_per_crop": statistics.median(timed),
        "low": min(timed),
        "high": max(timed),
        "peak_memory_bytes": peak_memory(device),
    }


def read_segmentor(recipe: Recipe) -> tuple[Any, Segmentor]:
    """Return the config, and the segmentor that `addp seg train` would train with the same keys."""
    cfg = read_config(recipe.config)
    data = TrainScenes(source="", crop=recipe.crop)
    train_recipe = TrainRecipe(
        out="", data=data, config=recipe.config, model=recipe.model, init="random", relative=recipe.relative
    )
    class_names = tuple(map(str, range(ADE20K_CLASSES)))
    resolved = resolve(train_recipe, cfg)
    encoder = load_model(resolved, cfg)
    if isinstance(encoder, CnnEncoder):
        resolved = resolve_for_cnn(train_recipe, resolved, cfg)
    return cfg, describe_segmentor(resolved, cfg, class_names, encoder)


def random_labels(side: int, device: torch.device) -> Any:
    """Return a random class for each pixel, as mmseg's samples hold it."""
    from mmengine.structures import PixelData

    return PixelData(data=torch.randint(ADE20K_CLASSES, (1, side, side), device=device))
