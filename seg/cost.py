"""`addp seg cost`: seconds and peak memory of a segmentor's training step and of one test crop.

Pictures and labels are noise, weights random: both cost what real ones do. A step is forward, backward and the
config's optimizer. On a CPU the peak is that of the process, libraries included; on a GPU that of the tensors.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge

from addp_core.training.compute import accelerate_model, arithmetic
from addp_core.training.timing import Parts, peak_memory, reset_peak_memory
from seg.scenes import SceneConfig
from seg.settings import Segmentor, fill_model, import_mmseg, read_config
from seg.train import Recipe as TrainRecipe
from seg.train import describe, resolve

CLASSES = 150  # ADE20K's


@dataclass
class Recipe:
    """Keys of `addp seg cost`."""

    config: Annotated[str, "a config of seg/configs, without .py"] = "upernet_addp-b_80k_ade20k-512x512"
    model: Annotated[str, "a size or a file whose architecture is taken; by default the config's"] = ""
    relative: Annotated[Literal["table", "none"] | None, "as `addp seg train` takes it"] = None
    crop: Annotated[int | None, Ge(16), "pixels of a side; null: the config's"] = None
    batch: Annotated[int, Ge(2), "crops a training step"] = 2
    steps: Annotated[int, Ge(1), "that are timed, after one that is not"] = 3
    checkpointing: Annotated[bool, "compute the blocks twice to save memory"] = False
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "of matrix products"] = "fp32"
    json: Annotated[bool, "print JSON instead of lines"] = False


def run(recipe: Recipe) -> None:
    """Measure and write to stdout."""
    figures = measure(recipe)
    if recipe.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for name in ("test", "train"):
        of = figures[name]
        seconds = f"{of['seconds_per_crop']:.3g} s a crop ({of['low']:.3g} to {of['high']:.3g})"
        sys.stdout.write(f"{name:<5}  {seconds}, peak memory {of['peak_memory_bytes'] / 2**30:.2f} GiB\n")
    sys.stdout.write(f"{figures['crop']} px, batch {recipe.batch} in training, {figures['device']}\n")


def measure(recipe: Recipe) -> dict[str, Any]:
    """Of a test crop and of a training step: median, lowest and highest seconds a crop, and the peak so far."""
    import_mmseg()
    from mmengine.optim import build_optim_wrapper
    from mmseg.structures import SegDataSample

    from seg.launch import build

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg, segmentor = settings(recipe)
    fill_model(cfg, segmentor)
    model = build(cfg).to(device)
    model.backbone.encoder.checkpointing = recipe.checkpointing
    accelerate_model(model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    side = segmentor.crop
    images = torch.rand(recipe.batch, 3, side, side, device=device)
    samples = [SegDataSample(metainfo={"img_shape": (side, side), "ori_shape": (side, side)}) for _ in images]
    for sample in samples:
        sample.gt_sem_seg = label_map(side, device)

    def test() -> None:
        with torch.inference_mode(), arithmetic(recipe.precision, device):
            model.eval().encode_decode(images[:1], [samples[0].metainfo])

    def train() -> None:
        with arithmetic(recipe.precision, device):
            losses = model.train().loss(images, samples)
            total = sum(value for name, value in losses.items() if "loss" in name)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    timed = {"test": timings(recipe, device, test, 1), "train": timings(recipe, device, train, recipe.batch)}
    return {"device": name, "crop": side, **timed}


def timings(recipe: Recipe, device: torch.device, step: Callable[[], None], crops: int) -> dict[str, float]:
    """The figures of one kind of step."""
    reset_peak_memory(device)
    parts, seconds = Parts(device), []
    for i in range(1 + recipe.steps):
        torch.manual_seed(i)
        with parts("step"):
            step()
        seconds.append(parts.take()["step"] / crops)
    timed = seconds[1:]
    return {
        "seconds_per_crop": statistics.median(timed),
        "low": min(timed),
        "high": max(timed),
        "peak_memory_bytes": peak_memory(device),
    }


def settings(recipe: Recipe) -> tuple[Any, Segmentor]:
    """The config and the segmentor that training with these settings would use."""
    cfg = read_config(recipe.config)
    data = SceneConfig(source="", crop=recipe.crop)
    train = TrainRecipe(
        out="", data=data, config=recipe.config, model=recipe.model, init="random", relative=recipe.relative
    )
    segmentor = describe(resolve(train, cfg), cfg, tuple(map(str, range(CLASSES))))
    return cfg, segmentor


def label_map(side: int, device: torch.device) -> Any:
    """A class for each pixel, at random."""
    from mmengine.structures import PixelData

    return PixelData(data=torch.randint(CLASSES, (1, side, side), device=device))
