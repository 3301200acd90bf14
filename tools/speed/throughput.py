"""`addp throughput`: images per second of a training step and of sampling, where the time goes, and how much of the
machine's peak this is. With `published=<clone of the authors' repository>`, their loops are timed in turns with ours;
with `data=<images>`, so is loading, in turns with timm's and torchvision's pipelines; with `det`, `seg` and `finetune`,
so are steps of these tasks, in turns with detectron2's, mmseg's and timm's own ViT.

MFU, the model FLOP utilization, is the model's FLOP per second (tools/speed/flops.py) divided by those of the fastest
matrix product, measured in the same run and precision. It can exceed 1, since Winograd convolutions need fewer FLOP.
"""

import dataclasses
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addp_core.base.cpu import cpu_name
from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.rng import generator
from addp_core.base.tables import text_table
from addp_core.method.addp import ADDP, ADDPConfig, DenoiserConfig
from addp_core.method.sampler import sample
from addp_core.networks.decoder import DecoderConfig
from addp_core.networks.encoder import VIT_SIZES, EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.training.compute import DTYPES, accelerate_model, autocast
from addp_core.training.optimization import make_optimizer
from addp_core.training.precision import matrix_width, resolve_precision
from addp_core.training.stage import TrainConfig
from addp_core.training.timing import PartTimer, matmul_peak, peak_memory, reset_peak_memory
from addp_core.weights.loading import load_addp
from tools.speed import published
from tools.speed.flops import fixed_masks, sampling_flop, training_flop
from tools.speed.loading import loading_table, measure_loading
from tools.speed.recipe import Recipe as Recipe
from tools.speed.spread import spread
from tools.speed.transfer import chosen_tasks, measure_transfer, transfer_table

log = logging.getLogger("addp")

TimedStep = Callable[[], dict[str, float]]  # returns the seconds of each part, and of the `whole`

PARTS = ("vq_encode", "predictor", "vq_decode", "encoder", "decoder", "denoiser", "backward", "optimizer", "other")


def run(recipe: Recipe) -> None:
    """Measure, write the JSON file and print the tables."""
    tasks = chosen_tasks(recipe)
    device = pick_device(recipe) if tasks else None  # loading is the CPU's
    report: dict[str, Any] = {"settings": dataclasses.asdict(recipe) | machine(device)}
    if recipe.train or recipe.sample:
        report = measure_model(recipe)
    if recipe.data:
        size = report["settings"]["size"] or ADDPConfig.image_size
        hw = (size, size) if isinstance(size, int) else size
        report["loading"] = measure_loading(recipe.data, hw, recipe.repeats, recipe.warmup)
    if tasks and device:
        report["transfer"] = measure_transfer(recipe, device, tasks)
    if recipe.json:
        write_json(Path(recipe.json), report)
    sys.stdout.write(as_text(report))


def measure_model(recipe: Recipe) -> dict[str, Any]:
    """Return the metrics of training steps and of sampling."""
    device = pick_device(recipe)
    model = build(recipe)
    recipe = dataclasses.replace(recipe, precision=resolve_precision(recipe.precision, device, matrix_width(model)))
    flop = {"train": training_flop(model, recipe.mask_ratio)} if recipe.train else {}
    if recipe.sample:
        flop["sample"] = sampling_flop(model, recipe.steps)
    ours = OurCode(model.to(device), recipe, device)
    theirs = None
    if recipe.published:
        theirs = published.PublishedCode(recipe.published, recipe.model, recipe.batch, device, recipe.precision)
    try:
        return measure(ours, theirs, recipe, flop)
    finally:
        if theirs:
            theirs.close()


def pick_device(recipe: Recipe) -> torch.device:
    """Return the recipe's device. Raises UserError if it does not exist or does not support the precision."""
    name = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device: found {name!r}, expected cpu, cuda or cuda:<n>")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(
            f"device: found {name}, but torch sees {count} CUDA devices; expected device=cpu or one of them"
        )
    if recipe.precision == "fp16" and device.type == "cpu":
        raise UserError("precision: found fp16, which needs a GPU; expected bf16 or fp32 on a CPU")
    return device


def build(recipe: Recipe) -> ADDP:
    """Load the model from a file, or build one of a named size with random weights."""
    size = (recipe.size, recipe.size) if recipe.size else None
    if recipe.model not in VIT_SIZES:
        model = load_addp(recipe.model, image_size=size)
        if recipe.train and model.predictor is None:
            raise UserError(f"model: {recipe.model} has no token predictor, which training needs; expected train=false")
        return model
    shape = VIT_SIZES[recipe.model]
    encoder = EncoderConfig(shape["width"], shape["depth"], shape["heads"], dropout=0.1, tokenizer_norm=True)
    torch.manual_seed(0)
    config = ADDPConfig(
        image_size=size or ADDPConfig.image_size,
        predictor=PredictorConfig(**shape) if recipe.train else None,
        denoiser=DenoiserConfig(encoder, DecoderConfig()),
    )
    return ADDP(config).eval()


class OurCode:
    """A training step as the engine does it, and a batch of sampling, with random images."""

    def __init__(self, model: ADDP, recipe: Recipe, device: torch.device):
        self.model, self.recipe, self.device = model, recipe, device
        images = torch.rand(recipe.batch, 3, *model.config.image_size, generator=generator(0, "images"))
        self.images = images.to(device)
        self.masks = fixed_masks(recipe.batch, model.config.tokens, recipe.mask_ratio)
        self.ids: Tensor | None = None
        if recipe.accelerate:
            for part in (model.tokenizer, model.predictor, model.denoiser):
                if part is not None:
                    accelerate_model(part, recipe.compile, recipe.channels_last)
        if recipe.train:
            self.optimizer = make_optimizer(model.denoiser, TrainConfig(lr=1e-6))
            self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.parts = PartTimer(device)
        self.parts.wrap(model.tokenizer, "encode", "vq_encode")
        self.parts.wrap(model.tokenizer, "decode", "vq_decode")
        if model.predictor is not None:  # sampling does not need one
            self.parts.wrap(model, "predictor", "predictor")
        if recipe.compile:  # it is one graph then
            self.parts.wrap(model, "denoiser", "denoiser")
        else:
            self.parts.wrap(model.denoiser, "encode", "encoder")
            self.parts.wrap(model.denoiser, "decoder", "decoder")

    def autocast(self) -> AbstractContextManager:
        """Return the context that computes in the recipe's precision."""
        return autocast(self.recipe.precision, self.device)

    def train(self, ids: Tensor | None = None) -> dict[str, float]:
        """Run one training step, on the images or their ids; return the seconds of each part, and of the `whole`."""
        self.model.train()
        with self.parts("whole"):
            with self.autocast():
                if ids is None:
                    loss = self.model.training_loss(self.model.denoiser, self.images, *self.masks)
                else:
                    loss = self.model.loss_of_ids(self.model.denoiser, ids, *self.masks)
            with self.parts("backward"):
                self.scaler.scale(loss).backward()
            with self.parts("optimizer"):
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.denoiser.parameters(), TrainConfig.clip_grad or math.inf)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
        return self.parts.take()

    def train_on_ids(self) -> dict[str, float]:
        """Run one training step on ids that are known; they are computed once, outside of the time."""
        if self.ids is None:
            with self.autocast():
                self.ids = self.model.encode_images(self.images)
            self.parts.take()
        return self.train(self.ids)

    def sample(self) -> dict[str, float]:
        """Generate one batch; return the seconds of each part, and of the `whole`."""
        self.model.eval()
        with self.parts("whole"), self.autocast():
            sample(self.model, self.recipe.batch, self.recipe.steps, batch=self.recipe.batch)
        return self.parts.take()


# -------------------- measuring


def measure(
    ours: OurCode, theirs: published.PublishedCode | None, recipe: Recipe, flop: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return all metrics, as the JSON file holds them. `flop`: of each task, by part, per image."""
    peak = matmul_peak(ours.device, DTYPES.get(recipe.precision, torch.float32))
    report: dict[str, Any] = {"settings": settings(ours, recipe), "matmul_gflop_per_s": peak}
    for task, flop_of_parts in flop.items():
        reset_peak_memory(ours.device)
        sides: dict[str, TimedStep] = {"addp": getattr(ours, task)}
        if theirs:
            theirs.peak_memory()
            argument = recipe.mask_ratio if task == "train" else recipe.steps
            sides["published"] = partial(getattr(theirs, task), argument)
        if task == "train" and recipe.tokens:
            sides["cached_ids"] = ours.train_on_ids
        rows = time_in_turns(sides, recipe, task)

        gflop = {part: count / 1e9 for part, count in flop_of_parts.items()}
        metrics = summarize(rows["addp"], recipe.batch) | {"peak_memory_bytes": peak_memory(ours.device)}
        metrics |= {"gflop_per_image": sum(gflop.values()), "gflop_of_parts": gflop}
        metrics["mfu"] = metrics["gflop_per_image"] * metrics["images_per_s"]["median"] / max(peak.values())
        report[task] = metrics
        if "cached_ids" in rows:
            metrics["cached_ids"] = summarize(rows["cached_ids"], recipe.batch)
        if theirs:
            published_metrics = summarize(rows["published"], recipe.batch)
            metrics["published"] = published_metrics | {"peak_memory_bytes": theirs.peak_memory()}
            metrics["times_published"] = _ratios(rows["addp"], rows["published"])
            if "cached_ids" in rows:
                metrics["cached_ids"]["times_published"] = _ratios(rows["cached_ids"], rows["published"])
    return report


def _ratios(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    """Return how many times the speed of theirs ours has, pair by pair."""
    return spread([b["whole"] / a["whole"] for a, b in zip(ours, theirs, strict=True)])


def time_in_turns(sides: dict[str, TimedStep], recipe: Recipe, task: str) -> dict[str, list[dict[str, float]]]:
    """Run the sides in turns (A B A B ...); return the seconds of each side's timed repeats, by part.

    `other` is the time that no part covers.
    """
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for repeat in range(-recipe.warmup, recipe.repeats):
        for side, timed_step in sides.items():
            torch.manual_seed(repeat)
            seconds = timed_step()
            seconds["other"] = 2 * seconds["whole"] - sum(seconds.values())
            name = "warm-up" if repeat < 0 else f"{repeat + 1} of {recipe.repeats}"
            log.info("%s, %s, %s: %.3f s", task, side, name, seconds["whole"])
            if repeat >= 0:
                rows[side].append(seconds)
    return rows


def summarize(rows: list[dict[str, float]], batch: int) -> dict[str, Any]:
    """Return images per second, seconds per step, and the median seconds of each part."""
    parts = [part for part in PARTS if any(part in row for row in rows)]
    return {
        "images_per_s": spread([batch / row["whole"] for row in rows]),
        "seconds": spread([row["whole"] for row in rows]),
        "seconds_of_parts": {part: statistics.median(row.get(part, 0.0) for row in rows) for part in parts},
    }


def settings(ours: OurCode, recipe: Recipe) -> dict[str, Any]:
    """Return the recipe, the model's size and the hardware."""
    return dataclasses.asdict(recipe) | {
        "device": str(ours.device),
        "size": ours.model.config.image_size,
        "trained_parameters": sum(p.numel() for p in ours.model.denoiser.parameters() if p.requires_grad),
        **machine(ours.device),
    }


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return what is measured on, by which version of torch, and when. device: None for the CPU."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device and device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


# -------------------- reporting


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the JSON file. Raises UserError if it cannot be written."""
    try:
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"json: {path} cannot be written ({error.strerror}); expected a writable path") from error


def as_text(report: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    settings = report["settings"]
    text = f"{settings['hardware']}, {settings['threads']} CPU threads, torch {settings['torch']}\n"
    if "matmul_gflop_per_s" in report:
        text += _model_text(report)
    text += f"\n{loading_table(report['loading'])}" if "loading" in report else ""
    return text + (transfer_table(report["transfer"], settings) if "transfer" in report else "")


def _model_text(report: dict[str, Any]) -> str:
    """Return the part on training steps and sampling."""
    settings, peak = report["settings"], report["matmul_gflop_per_s"]
    side = max(peak, key=peak.get)
    height, width = settings["size"]
    text = (
        f"{settings['model']}, {height} x {width} px, batch {settings['batch']}, {settings['precision']}\n"
        f"best matrix product: {peak[side]:.1f} GFLOP/s at {side} x {side}\n"
    )
    titles = {"train": "training step", "sample": f"sampling, {settings['steps']} steps"}
    return text + "".join(f"\n{task_table(titles[task], report[task])}" for task in titles if task in report)


def task_table(title: str, metrics: dict[str, Any]) -> str:
    """Return the table of one task: ours, the published code's if it was timed, and GFLOP per image."""
    columns = {"addp": metrics} | ({"published": metrics["published"]} if "published" in metrics else {})
    rows = [[title, *columns, "GFLOP/img"]]
    for label, statistic in (("images/s, median", "median"), ("  lowest", "low"), ("  highest", "high")):
        rows.append([label, *(f"{column['images_per_s'][statistic]:.4g}" for column in columns.values())])
    seconds = [f"{column['seconds']['median']:.3f}" for column in columns.values()]
    rows.append(["seconds, median", *seconds, f"{metrics['gflop_per_image']:.4g}"])
    for part in PARTS:
        of_part = [column["seconds_of_parts"].get(part) for column in columns.values()]
        if any(value is not None for value in of_part):
            gflop = metrics["gflop_of_parts"].get(part)
            cells = ["" if value is None else f"{value:.3f}" for value in of_part]
            rows.append([f"  {part}", *cells, "" if gflop is None else f"{gflop:.4g}"])
    memory = [f"{column['peak_memory_bytes'] / 2**30:.2f}" for column in columns.values()]
    rows += [["peak memory, GiB", *memory], ["MFU", f"{metrics['mfu']:.1%}"]]
    text = text_table(rows)
    if "times_published" in metrics:
        text += f"{_times_published(metrics['times_published'])}\n"
    if "cached_ids" in metrics:
        cached = metrics["cached_ids"]
        rate = cached["images_per_s"]
        text += f"on cached ids: {rate['median']:.4g} images/s ({rate['low']:.4g} to {rate['high']:.4g})"
        text += f", {_times_published(cached['times_published'])}\n" if "times_published" in cached else "\n"
    return text


def _times_published(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} times the published speed ({ratio['low']:.2f} to {ratio['high']:.2f})"
