"""`addp throughput`: images a second of a training step and of sampling, where the time goes, and what share of the
machine that is. With `published=<clone of the authors' repository>` their own loops are timed in turns with ours.

MFU, the model FLOP utilisation, is the FLOP of the model (tools/speed/flops.py) a second over the machine's best matrix
product, measured in the same run and precision. Winograd's convolutions do with fewer, so that it may pass 1.
"""

import dataclasses
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Interval, MultipleOf
from torch import nn

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.rng import generator
from addp_core.method.addp import ADDP, ADDPConfig, DenoiserConfig
from addp_core.method.sampler import sample
from addp_core.networks.decoder import DecoderConfig
from addp_core.networks.encoder import VIT_SIZES, EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.training.compute import accelerate_model
from addp_core.training.engine import TrainConfig, make_optimizer
from addp_core.training.timing import Parts, matmul_peak, peak_memory, reset_peak_memory
from addp_core.weights.checkpoint import load_addp
from tools.speed import published
from tools.speed.flops import fixed_masks, sampling_flop, training_flop

log = logging.getLogger("addp")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("vq_encode", "predictor", "vq_decode", "encoder", "decoder", "denoiser", "backward", "optimizer", "other")


@dataclass
class Recipe:
    """Keys of `addp throughput`."""

    model: Annotated[str, f"{', '.join(VIT_SIZES)} (random weights), or a run or file of `addp pretrain`"] = "base"
    batch: Annotated[int, Ge(1), "images of a step"] = 4
    size: Annotated[int | None, Ge(16), MultipleOf(16), "pixels a side; null: the file's, or 256"] = None
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "of matrix products, by autocast"] = "fp32"
    device: Annotated[str, "cpu, cuda or cuda:<n>; empty: a GPU where there is one"] = ""
    train: Annotated[bool, "time training steps"] = True
    sample: Annotated[bool, "time sampling"] = True
    mask_ratio: Annotated[float, Interval(gt=0, lt=1), "of training steps: unreliable tokens, always as many"] = 0.75
    steps: Annotated[int, Ge(1), "of sampling, with the cosine schedule"] = 20
    repeats: Annotated[int, Ge(1), "timed repeats; their median is reported"] = 5
    warmup: Annotated[int, Ge(0), "repeats before, not timed"] = 1
    accelerate: Annotated[bool, "the switches of addp_core/training/compute.py; false shows what they are worth"] = True
    compile: Annotated[bool, "one of them: torch.compile"] = False
    channels_last: Annotated[bool, "one of them: the memory format of convolutions"] = False
    published: Annotated[str, "a clone of the authors' repository (base and large at 256 px), timed in turns"] = ""
    json: Annotated[str, "file for the figures"] = ""

    def __post_init__(self):
        if not (self.train or self.sample):
            raise ValueError("train: found false, and sample is false too; expected one of them true")
        if self.published and self.model not in published.MODELS:
            known = " or ".join(published.MODELS)
            raise ValueError(f"published: found model={self.model}; expected {known}, which the authors' code has")
        if self.published and self.size not in (None, published.IMAGE_SIZE):
            raise ValueError(f"published: found size={self.size}; expected {published.IMAGE_SIZE}, all it knows")


def run(recipe: Recipe) -> None:
    """Measure, print the table, write the JSON file."""
    device = pick_device(recipe)
    model = build(recipe)
    flop = {"train": training_flop(model, recipe.mask_ratio)} if recipe.train else {}
    if recipe.sample:
        flop["sample"] = sampling_flop(model, recipe.steps)
    ours = Ours(model.to(device), recipe, device)
    theirs = None
    if recipe.published:
        theirs = published.Clone(recipe.published, recipe.model, recipe.batch, device, recipe.precision)
    try:
        report = measure(ours, theirs, recipe, flop)
    finally:
        if theirs:
            theirs.close()
    if recipe.json:
        write_json(Path(recipe.json), report)
    sys.stdout.write(table(report))


def pick_device(recipe: Recipe) -> torch.device:
    """The device of the recipe. UserError for one that is not there or cannot compute in the precision."""
    name = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device: found {name!r}, expected cpu, cuda or cuda:<n>")
    if device.type == "cuda" and (device.index or 0) >= (seen := torch.cuda.device_count()):
        raise UserError(f"device: found {name}, but torch sees {seen} CUDA devices; expected device=cpu or one of them")
    if recipe.precision == "fp16" and device.type == "cpu":
        raise UserError("precision: found fp16, which needs a GPU; expected bf16 or fp32 on a CPU")
    return device


def build(recipe: Recipe) -> ADDP:
    """The model of a file, or one of a named size with random weights."""
    size = recipe.size and (recipe.size, recipe.size)
    if recipe.model not in VIT_SIZES:
        model = load_addp(recipe.model, image_size=size)
        if recipe.train and model.predictor is None:
            raise UserError(f"model: {recipe.model} has no token predictor, which training needs; expected train=false")
        return model
    shape = VIT_SIZES[recipe.model]
    torch.manual_seed(0)
    config = ADDPConfig(
        image_size=size or ADDPConfig.image_size,
        predictor=PredictorConfig(**shape) if recipe.train else None,
        denoiser=DenoiserConfig(EncoderConfig(**shape, dropout=0.1, tokenizer_norm=True), DecoderConfig()),
    )
    return ADDP(config).eval()


class Ours:
    """A training step as the engine does it, and a batch of sampling; on random images."""

    def __init__(self, model: ADDP, recipe: Recipe, device: torch.device):
        self.model, self.recipe, self.device = model, recipe, device
        images = torch.rand(recipe.batch, 3, *model.config.image_size, generator=generator(0, "images"))
        masks = fixed_masks(recipe.batch, model.config.tokens, recipe.mask_ratio)
        self.images, self.mask, self.next_mask = (x.to(device) for x in (images, *masks))
        if recipe.accelerate:
            for part in (model.tokenizer, model.predictor, model.denoiser):
                if part is not None:
                    accelerate_model(part, recipe.compile, recipe.channels_last)
        if recipe.train:
            self.optimizer = make_optimizer(model.denoiser, TrainConfig(lr=1e-6))
            self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.parts = Parts(device)
        self.parts.wrap(model.tokenizer, "encode", "vq_encode")
        self.parts.wrap(model.tokenizer, "decode", "vq_decode")
        if model.predictor is not None:  # sampling does without
            self.parts.wrap(model, "predictor", "predictor")
        if recipe.compile:  # what is compiled is one part
            self.parts.wrap(model, "denoiser", "denoiser")
        else:
            self.parts.wrap(model.denoiser, "encode", "encoder")
            self.parts.wrap(model.denoiser, "decoder", "decoder")

    def precision(self) -> AbstractContextManager:
        if self.recipe.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.recipe.precision])

    def train(self) -> dict[str, float]:
        """One training step; seconds of each part and of the `whole`."""
        self.model.train()
        with self.parts("whole"):
            with self.precision():
                ids = self.model.encode_images(self.images)
                corrupted = self.model.corrupt(ids, self.mask, self.next_mask)
                loss = self.model.denoiser(corrupted.images, ids, self.mask, corrupted.target)
            with self.parts("backward"):
                self.scaler.scale(loss).backward()
            with self.parts("optimizer"):
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.denoiser.parameters(), TrainConfig.clip_grad)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
        return self.parts.take()

    def sample(self) -> dict[str, float]:
        """One batch of sampling; seconds of each part and of the `whole`."""
        self.model.eval()
        with self.parts("whole"), self.precision():
            sample(self.model, self.recipe.batch, self.recipe.steps, batch=self.recipe.batch)
        return self.parts.take()


# -------------------- measuring


def measure(
    ours: Ours, theirs: published.Clone | None, recipe: Recipe, flop: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """All figures, as the JSON file holds them. flop: of each task, by part, per image."""
    peak = matmul_peak(ours.device, DTYPES[recipe.precision])
    report: dict[str, Any] = {"settings": settings(ours, recipe), "matmul_gflop_per_s": peak}
    for task, of_parts in flop.items():
        reset_peak_memory(ours.device)
        sides: dict[str, Callable[[], dict[str, float]]] = {"addp": getattr(ours, task)}
        if theirs:
            theirs.peak_memory()
            argument = recipe.mask_ratio if task == "train" else recipe.steps
            sides["published"] = lambda argument=argument, task=task: getattr(theirs, task)(argument)
        rows = in_turns(sides, recipe, task)

        gflop = {part: count / 1e9 for part, count in of_parts.items()}
        figures = summary(rows["addp"], recipe.batch) | {"peak_memory_bytes": peak_memory(ours.device)}
        figures |= {"gflop_per_image": sum(gflop.values()), "gflop_of_parts": gflop}
        figures["mfu"] = figures["gflop_per_image"] * figures["images_per_s"]["median"] / max(peak.values())
        report[task] = figures
        if theirs:
            figures = summary(rows["published"], recipe.batch) | {"peak_memory_bytes": theirs.peak_memory()}
            ratios = [b["whole"] / a["whole"] for a, b in zip(rows["addp"], rows["published"], strict=True)]
            report[task] |= {"published": figures, "times_published": spread(ratios)}
    return report


def in_turns(
    sides: dict[str, Callable[[], dict[str, float]]], recipe: Recipe, task: str
) -> dict[str, list[dict[str, float]]]:
    """Run the sides A B A B ...; of each the seconds of its timed repeats, with `other` for what no part covers."""
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for repeat in range(-recipe.warmup, recipe.repeats):
        for side, timed in sides.items():
            torch.manual_seed(repeat)
            seconds = timed()
            seconds["other"] = 2 * seconds["whole"] - sum(seconds.values())
            name = "warm-up" if repeat < 0 else f"{repeat + 1} of {recipe.repeats}"
            log.info("%s, %s, %s: %.3f s", task, side, name, seconds["whole"])
            if repeat >= 0:
                rows[side].append(seconds)
    return rows


def summary(rows: list[dict[str, float]], batch: int) -> dict[str, Any]:
    """Images a second, seconds of a step, and the median seconds of its parts."""
    parts = [part for part in PARTS if any(part in row for row in rows)]
    return {
        "images_per_s": spread([batch / row["whole"] for row in rows]),
        "seconds": spread([row["whole"] for row in rows]),
        "seconds_of_parts": {part: statistics.median(row.get(part, 0.0) for row in rows) for part in parts},
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def settings(ours: Ours, recipe: Recipe) -> dict[str, Any]:
    gpu = ours.device.type == "cuda"
    return dataclasses.asdict(recipe) | {
        "device": str(ours.device),
        "size": ours.model.config.image_size,
        "trained_parameters": sum(p.numel() for p in ours.model.denoiser.parameters() if p.requires_grad),
        "hardware": torch.cuda.get_device_name(ours.device) if gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# -------------------- reporting


def write_json(path: Path, report: dict[str, Any]) -> None:
    """UserError where the file cannot be written."""
    try:
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"json: {path} cannot be written ({error.strerror}); expected a writable place") from error


def table(report: dict[str, Any]) -> str:
    """The figures as text."""
    chosen, peak = report["settings"], report["matmul_gflop_per_s"]
    side = max(peak, key=peak.get)
    height, width = chosen["size"]
    lines = [
        f"{chosen['model']}, {height} x {width} px, batch {chosen['batch']}, {chosen['precision']}",
        f"{chosen['hardware']}, {chosen['threads']} CPU threads, torch {chosen['torch']}",
        f"best matrix product: {peak[side]:.1f} GFLOP/s at {side} x {side}",
    ]
    for task in ("train", "sample"):
        if task in report:
            title = "training step" if task == "train" else f"sampling, {chosen['steps']} steps"
            lines += ["", *task_table(title, report[task])]
    return "\n".join(lines) + "\n"


def task_table(title: str, figures: dict[str, Any]) -> list[str]:
    """Rows of one task: ours, the authors' where they were timed, and GFLOP per image."""
    sides = {"addp": figures} | ({"published": figures["published"]} if "published" in figures else {})

    def row(label: str, values: list[str]) -> str:
        return f"{label:<22}" + "".join(f"{value:>12}" for value in values)

    lines = [row(title, [*sides, "GFLOP/img"])]
    for label, which in (("images/s, median", "median"), ("  lowest", "low"), ("  highest", "high")):
        lines.append(row(label, [f"{of['images_per_s'][which]:.4g}" for of in sides.values()]))
    gflop = f"{figures['gflop_per_image']:.4g}"
    lines.append(row("seconds, median", [*(f"{of['seconds']['median']:.3f}" for of in sides.values()), gflop]))
    for part in PARTS:
        seconds = [of["seconds_of_parts"].get(part) for of in sides.values()]
        if any(s is not None for s in seconds):
            count = figures["gflop_of_parts"].get(part)
            cells = ["" if s is None else f"{s:.3f}" for s in seconds]
            lines.append(row("  " + part, [*cells, "" if count is None else f"{count:.4g}"]))
    lines.append(row("peak memory, GiB", [f"{of['peak_memory_bytes'] / 2**30:.2f}" for of in sides.values()]))
    lines.append(row("MFU", [f"{figures['mfu']:.1%}"]))
    if "times_published" in figures:
        ratio = figures["times_published"]
        lines.append(f"{ratio['median']:.2f} times the published speed ({ratio['low']:.2f} to {ratio['high']:.2f})")
    return lines
