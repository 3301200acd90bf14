"""A stage of a few hundred weights with everything that can break on resuming: dropout, batch statistics, a buffer that
`after_step` writes, random loss weights; and faults on request. `start_process` runs it in a process of its own.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from addp_core.base import job, rng
from addp_core.base.errors import UserError
from addp_core.recipes import cli
from addp_core.recipes import config as recipes
from addp_core.training import engine
from addp_core.training.evaluation import check_evaluation
from addp_core.training.metrics import RunLogger
from addp_core.training.run_folder import prepare_out
from addp_core.training.stage import MicroStep, Stage, TrainConfig

N = 40  # images

# Under these settings, the way in which a batch is split changes results by rounding only.
ROUNDING_ONLY = ["dropout=0", "norm=false", "train.log_every=1", "train.steps=20", "train.checkpoint_every=0"]

TIMING = ("img_s", "evaluation_seconds", "evaluation_share")  # metrics that differ from run to run


@dataclass
class Recipe:
    out: str
    dropout: float = 0.1
    norm: bool = True
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=12, batch=8, lr=0.05, warmup_steps=3, log_every=4, checkpoint_every=4, preview_every=6, ema=0.9
        )
    )


@dataclass
class Faults:
    """The faults that the loss causes, by optimizer step."""

    signals: dict[int, int] = field(default_factory=dict)  # step -> signal that the process sends itself
    evaluation_signals: dict[int, int] = field(default_factory=dict)  # the same in the evaluation after a step
    only_rank: int | None = None  # only this process gets signals and NaN losses
    nan_loss: tuple[int, ...] = ()
    nan_gradient: tuple[int, ...] = ()
    huge_gradient: int | None = None


@dataclass
class Batch:
    images: Tensor  # Float[b,3,6,6]
    labels: Tensor  # Long[b]
    errors: list[tuple[str, str]]


class ToyStream:
    """N noise images, labelled by the sign of their mean; the order and some noise are functions of the position."""

    def __init__(self, seed: int, batch: int):
        self.seed, self.batch = seed, batch

    def __len__(self) -> int:
        return N

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        share = self.batch // world
        while True:
            first = start * self.batch + rank * share
            images, labels = zip(*(self.at(position) for position in range(first, first + share)), strict=True)
            yield Batch(torch.stack(images), torch.stack(labels), [])
            start += 1

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        epoch, offset = divmod(position, N)
        index = int(torch.randperm(N, generator=rng.generator(self.seed, "order", epoch))[offset].item())
        image = torch.randn(3, 6, 6, generator=rng.generator(self.seed, "image", index))
        noise = 0.1 * torch.randn(3, 6, 6, generator=rng.generator(self.seed, "noise", position))
        return image + noise, (image.mean() > 0).long()


class Net(nn.Module):
    def __init__(self, dropout: float, norm: bool):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 2)
        self.fixed = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        """Float[b,3,h,w] -> Float[b,2]"""
        return self.head(self.drop(self.norm(self.conv(images)).relu().mean(dim=(2, 3))))


class ToyStage(Stage):
    name = "toy"
    metrics = {"accuracy": True}  # noqa: RUF012

    def __init__(self, dropout: float = 0.1, norm: bool = True, faults: Faults | None = None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Net(dropout, norm)
            self.frozen = [nn.Linear(3, 3)]
        for parameter in self.frozen[0].parameters():
            nn.init.ones_(parameter)  # the same fingerprint on every CPU, for runs that the tests store
        self.faults = faults or Faults()

    def loss(self, model: nn.Module, batch: Batch, micro_step: MicroStep) -> dict[str, Tensor]:
        faults = self.faults
        affected = faults.only_rank in (None, micro_step.rank)
        if micro_step.step in faults.signals and affected:
            os.kill(os.getpid(), faults.signals[micro_step.step])
        assert not self.frozen[0].training
        assert not self.frozen[0].weight.requires_grad
        logits = model(batch.images)
        cross_entropy = nn.functional.cross_entropy(logits.float(), batch.labels)
        # drawn for the whole micro-batch, so that the number of processes does not matter
        weights = torch.rand(micro_step.batch, generator=micro_step.generator("weights"))[micro_step.rows].to(
            logits.device
        )
        size = (weights[:, None] * logits.float() ** 2).mean()
        if micro_step.step in faults.nan_loss and affected:
            cross_entropy = cross_entropy * float("nan")
        if micro_step.step in faults.nan_gradient:
            logits.register_hook(lambda gradient: gradient * float("inf"))
        if micro_step.step == faults.huge_gradient:
            logits.register_hook(lambda gradient: gradient * 1e12)
        return {"loss": cross_entropy + 0.1 * size, "ce": cross_entropy, "size": size}

    def after_step(self, model, micro_step, accelerator) -> dict[str, Tensor]:
        model.seen[micro_step.step % 2] += micro_step.batch
        return {"seen": model.seen.sum()}

    def preview(self, model, step) -> dict[str, Tensor]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"noise": torch.rand(5, 3, 6, 6)}

    def evaluate(self, model, step) -> dict[str, float]:
        faults = self.faults
        if step in faults.evaluation_signals:
            os.kill(os.getpid(), faults.evaluation_signals[step])
        check_evaluation([], 0)
        images, labels = zip(*map(ToyStream(0, 8).at, range(N)), strict=True)
        hits = model(torch.stack(images).to(model.head.weight.device)).argmax(1).cpu() == torch.stack(labels)
        return {"accuracy": hits.float().mean().item()}

    def export(self, model, path: Path) -> None:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path, {"kind": "toy"})


def run(settings: list[str], faults: Faults | None = None) -> Path:
    """Run the stage as a verb of the command line does."""
    recipe = recipes.load(Recipe, None, settings)
    finished = prepare_out(recipe.out, recipe)
    if finished:
        return finished
    stage = ToyStage(recipe.dropout, recipe.norm, faults)
    stream = ToyStream(recipe.train.seed, recipe.train.micro_batch)
    return engine.train(stage, stream, recipe.train, recipe.out, recipe)


def stopped_run(out: Path, step: int = 9) -> None:
    """Start a run that a signal stops during the optimizer step `step`, counted from 0."""
    with pytest.raises(SystemExit):
        run([f"out={out}"], Faults(signals={step: signal.SIGTERM}))


def command(settings: list[str], faults: Faults | None = None, log: Path | None = None, environment=None, before=None):
    """Run the stage with the exit codes of the command line; write messages to `log`, and call `before` first."""
    torch.set_num_threads(1)
    patch.object(RunLogger, "plot_curves", lambda self: None).start()  # slow, and tested elsewhere
    os.environ |= environment or {}
    if log:
        logging.basicConfig(filename=log, format="%(message)s", level=logging.INFO, force=True)
    if before:
        before()
    try:
        run(settings, faults)
    except UserError as error:
        logging.error("addp: %s", error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(1)


def exit_code(settings: list[str]) -> int:
    """Run the stage as the command line runs a verb, and return the exit code."""
    patch.object(RunLogger, "plot_curves", lambda self: None).start()  # slow, and tested elsewhere

    def join_and_run() -> int:
        job.join()
        run(settings)
        return 0

    return cli.exit_code(join_and_run)


def start_process(*arguments, **options) -> BaseProcess:
    """Start `command` in a process of its own, forked from one that has loaded torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["addp_core.training.engine", "addp_core.recipes.config"])
    process = context.Process(target=command, args=arguments, kwargs=options)
    process.start()
    return process


def wait_for(process: BaseProcess, limit: float = 60.0) -> int:
    """Wait for a process and return its exit code, which is negative after a signal."""
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running after {limit} s")
    return process.exitcode


# -------------------- what a run has written


def metrics(out: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without timing."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def checkpoint_names(out: Path) -> list[str]:
    """Return the names in the folder of checkpoints, sorted."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def assert_same(out: Path, expected: Path) -> None:
    """Check that two runs of 12 steps are equal bit for bit: weights, buffers, average, optimizer and metrics."""
    for name in ("model.safetensors", "model-raw.safetensors"):
        ours, theirs = load_file(out / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), (name, key)
    ours, theirs = (torch.load(folder / "checkpoints/step-12/training.pt") for folder in (out, expected))
    for index, state in theirs["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(ours["optimizer"]["state"][index][key], value), (index, key)
    assert metrics(out) == metrics(expected)


if __name__ == "__main__":
    command(sys.argv[2:], log=Path(sys.argv[1]))
