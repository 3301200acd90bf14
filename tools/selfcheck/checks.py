"""The checks of `addp doctor check=true`, in the order in which they run, and what a failure of each means."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from addp_core.base.paths import MODEL_FILE
from tools.selfcheck.commands import CommandFailed, Commands, read_metrics
from tools.selfcheck.outcome import Outcome

CheckName = Literal["parity", "float64", "precision", "sampling", "memory", "processes", "resume", "throughput"]

STEPS, STOP_AFTER = 40, 5  # of the training runs; the stopped one gets its signal after so many
LOSS_LIMIT, FIRST_LIMIT = 1e-3, 1e-4  # relative: any step; the first step
TRAINING = (
    *("data.size=32", "data.workers=0", "model.encoder.width=64", "model.encoder.depth=3", "model.encoder.heads=4"),
    *("model.decoder.depth=2", "model.decoder.heads=4", f"train.steps={STEPS}", "train.batch=16", "train.lr=1e-3"),
    *("train.warmup_steps=5", "train.log_every=1", "train.checkpoint_every=0", "train.ema=0.99"),
    "train.precision=fp32",
)
NO_DROPOUT = ("model.encoder.dropout=0", "model.encoder.input_dropout=0", "model.decoder.dropout=0")


@dataclass(frozen=True)
class Check:
    """title: what it does. failure: what a failure means. seconds: about how long it takes on two CPU cores.

    minimum: the same where time is short, if it does less then.
    """

    title: str
    failure: str
    seconds: int
    run: Callable[[Commands], Outcome]
    minimum: int | None = None


# -------------------- computing on the device


def on_device(name: str) -> Callable[[Commands], Outcome]:
    """Return the function that runs a check of tools/selfcheck/on_device.py in a process of its own."""

    def run(commands: Commands) -> Outcome:
        path = commands.folder / f"{name}.json"
        commands.python(name, "tools.selfcheck.on_device", name, commands.device.name, str(path))
        return Outcome(**json.loads(path.read_text()))

    return run


# -------------------- training runs


def train(commands: Commands, out: Path, *settings: str, **options: Any) -> None:
    """Run `addp pretrain` with the tiny network, whose files are written by the first call."""
    files = commands.folder / "files"
    if not files.exists():
        commands.python("files", "tools.selfcheck.on_device", "files", str(files))
    network = files / "network.safetensors"
    sources = [f"tokenizer={network}", f"predictor={network}", f"data={files / 'images'}", f"out={out}"]
    commands.addp(out.name, ["pretrain", *sources, *TRAINING, *settings], **options)


def processes(commands: Commands) -> Outcome:
    """Train in one process and in two, with NCCL on two GPUs or else with gloo on the CPU."""
    device, gpus = commands.device.name, commands.device.gpus
    backend = "NCCL on two GPUs" if device == "cuda" and gpus > 1 else "gloo on the CPU"
    where = device if gpus > 1 else "cpu"
    one, two = commands.folder / "one-process", commands.folder / "two-processes"
    train(commands, one, *NO_DROPOUT, device=where)
    train(commands, two, *NO_DROPOUT, device=where, processes=2)
    errors = {key: _relative_errors(read_metrics(one), read_metrics(two), key) for key in ("loss", "grad_norm")}
    first, largest = max(values[0] for values in errors.values()), max(errors["loss"])
    failed = not (first < FIRST_LIMIT and largest < LOSS_LIMIT)
    note = f"{backend}: loss and gradient differ by {first:.1e} in the first step, the loss by {largest:.1e} in {STEPS}"
    if device == "cuda" and gpus == 1:
        note += "; NCCL needs two GPUs, and there is one"
    return Outcome("failed" if failed else "ok", note, {"backend": backend, "relative_errors": errors})


def resume(commands: Commands) -> Outcome:
    """Train with and without a stop; where they differ, once more without one, because a GPU may not repeat itself."""
    whole, stopped = commands.folder / "not-stopped", commands.folder / "stopped"
    train(commands, whole)
    train(commands, stopped, stop_when=lambda: len(read_metrics(stopped)) >= STOP_AFTER)
    stop = read_metrics(stopped)[-1]["step"]
    if (stopped / MODEL_FILE).exists():
        raise CommandFailed(f"stopped: had ended after {STEPS} steps when the signal to stop came")
    train(commands, stopped)
    note = f"stopped after step {stop} of {STEPS} and continued"
    values = {"stopped_after": stop, "sha256": {run.name: _digest(run) for run in (whole, stopped)}}
    if _digest(whole) == _digest(stopped):
        return Outcome("ok", f"{note}: all weights are equal bit by bit", values)
    again = commands.folder / "not-stopped-again"
    train(commands, again)
    first = _first_difference(read_metrics(whole), read_metrics(stopped))
    values |= {"first_different_step": first, "repeated_sha256": _digest(again)}
    if _digest(again) == _digest(whole):
        return Outcome("failed", f"{note}: differs from step {first} on", values)
    error = max(_relative_errors(read_metrics(whole), read_metrics(stopped), "loss"))
    note = f"this device does not repeat itself bit by bit, stopped or not; the losses differ by {error:.1e}"
    return Outcome("ok" if error < LOSS_LIMIT else "failed", note, values | {"relative_error": error})


def _relative_errors(expected: list[dict[str, Any]], found: list[dict[str, Any]], key: str) -> list[float]:
    """Return the relative error of a metric in each step, infinite where it is not finite.

    Raises CommandFailed if a run lacks steps.
    """
    steps = [[line[key] for line in lines if key in line] for lines in (expected, found)]
    if not STEPS == len(steps[0]) == len(steps[1]):
        raise CommandFailed(f"metrics.jsonl: found {len(steps[0])} and {len(steps[1])} steps, expected {STEPS}")
    errors = [math.inf if None in pair else abs(pair[0] - pair[1]) / abs(pair[0]) for pair in zip(*steps, strict=True)]
    return [error if math.isfinite(error) else math.inf for error in errors]


def _first_difference(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> int:
    """Return the first step whose loss differs, or the number of steps."""
    pairs = zip(expected, found, strict=False)
    return next((a["step"] for a, b in pairs if a.get("loss") != b.get("loss")), STEPS)


def _digest(run: Path) -> str:
    return hashlib.sha256((run / MODEL_FILE).read_bytes()).hexdigest()


# -------------------- speed

WHOLE_SECONDS = 150  # what the throughput of ViT-B at 256 px needs on two CPU cores; with less time, a smaller one
GIB_PER_IMAGE = 0.4  # of a training step of ViT-B in float32, with a margin
MAX_BATCH = 64


def throughput(commands: Commands) -> Outcome:
    """Run `addp throughput` in float32 and, on a GPU, in bf16: ViT-B where there is time for it."""
    device, needed = commands.device, WHOLE_SECONDS * commands.pace
    model, size = ("base", 256) if device.name == "cuda" or commands.seconds_left() > needed else ("tiny", 64)
    batch = max(1, min(MAX_BATCH, int(device.gib / GIB_PER_IMAGE))) if device.name == "cuda" else 2
    settings = [f"model={model}", f"size={size}", f"batch={batch}", "repeats=3", "steps=6", f"device={device.name}"]
    values, notes = {}, []
    for precision in ("fp32", "bf16") if device.name == "cuda" else ("fp32",):
        path = commands.folder / f"throughput-{precision}.json"
        commands.addp(path.stem, ["throughput", *settings, f"precision={precision}", f"json={path}"])
        values[precision] = report = json.loads(path.read_text())
        speeds = {task: report[task]["images_per_s"]["median"] for task in ("train", "sample")}
        notes.append(
            f"{precision}: {speeds['train']:.3g} images/s (MFU {report['train']['mfu']:.0%}, "
            f"{report['train']['peak_memory_bytes'] / 2**30:.1f} GiB), sampling in 6 steps {speeds['sample']:.3g}"
        )
    return Outcome("ok", f"{model} at {size} px, batch {batch}, {'; '.join(notes)}", values)


CHECKS: dict[CheckName, Check] = {
    "parity": Check(
        "the networks' golden numbers in float32",
        "networks compute other numbers here than where they were written: look for a torch that does not fit the "
        "machine, TF32 that is switched on elsewhere, or a faulty device; do not trust results until it passes",
        8,
        on_device("parity"),
    ),
    "float64": Check(
        "networks of published widths beside float64 on the CPU",
        "large matrix products or convolutions are wrong or less precise than float32 on this device",
        25,
        on_device("float64"),
    ),
    "precision": Check(
        "distance of bf16 and fp16 from the golden numbers",
        "the device rounds far more than bf16 or fp16 should: train with train.precision=fp32",
        8,
        on_device("precision"),
    ),
    "sampling": Check(
        "sampling steps and inpainting",
        "generated images are wrong or depend on more than the seed: `addp generate` cannot be trusted here",
        8,
        on_device("sampling"),
    ),
    "memory": Check(
        "memory in use while training",
        "memory grows with every step: long runs will end without memory",
        12,
        on_device("memory"),
    ),
    "processes": Check(
        "one training process beside two",
        "processes do not compute one step together: train in one process until it passes; see docs/many-gpus.md",
        40,
        processes,
    ),
    "resume": Check(
        "stopping and continuing a training",
        "a run that is stopped and continued is another run: do not rely on continued runs here",
        50,
        resume,
    ),
    "throughput": Check(
        "images per second of training and sampling",
        "`addp throughput` does not run here, so training would not either",
        WHOLE_SECONDS,
        throughput,
        minimum=20,
    ),
}
