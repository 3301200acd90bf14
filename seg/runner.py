"""mmengine's Runner in a run folder of the suite: `AddpRunner` in RUNNERS and the hook `RunFolder` in HOOKS.

mmengine's own checkpoints hold objects that only an unpickler which may run code can read. These hold tensors and plain
values, are written whole or not at all, and are read as such: a file that wants more is refused.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, all_reduce_dict, broadcast_object_list, get_dist_info, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS, RUNNERS
from torch import nn

from addp_core.base.errors import UserError
from addp_core.base.rng import seed_for
from addp_core.training.engine import Signals
from addp_core.training.run_folder import Checkpoints, Report
from addp_core.weights.checkpoint import read_tensors

log = logging.getLogger("addp")


@RUNNERS.register_module()
class AddpRunner(Runner):
    """The Runner whose checkpoints are those of the hook `RunFolder`, in `<work_dir>/checkpoints`."""

    @property
    def bare(self) -> nn.Module:
        """The model as it was built."""
        return self.model.module if is_model_wrapper(self.model) else self.model

    @property
    def folder(self) -> "RunFolder":
        """The hook that keeps the run folder."""
        return next(hook for hook in self.hooks if isinstance(hook, RunFolder))

    def load_or_resume(self) -> None:
        """With `resume`, continue from the newest whole checkpoint, if there is one; else read `load_from`, if any."""
        if self._has_loaded:
            return
        self._has_loaded = True
        if self._resume:
            found = [self.folder.checkpoints.newest() if is_main_process() else None]
            broadcast_object_list(found)
            if found[0] is not None:
                self.resume(found[0])
        elif self._load_from is not None:
            self.load_checkpoint(self._load_from)

    def resume(self, step: int) -> None:  # type: ignore[override]
        """Continue from the checkpoint of this step. UserError where it belongs to another model or length."""
        payload, state = self.folder.checkpoints.read(step)
        where = self.folder.checkpoints.path(step)
        if state["iterations"] != self.max_iters:
            raise UserError(
                f"train.steps: {where} belongs to a run of {state['iterations']} iterations, found {self.max_iters}; "
                "its schedule cannot be stretched: put the length back or choose another out"
            )
        fill(self.bare, payload["model"], str(where))
        self.optim_wrapper.load_state_dict(payload["optimizer"])
        for scheduler, values in zip(self.param_schedulers, payload["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        self.train_loop._iter = state["iteration"]

    def load_checkpoint(self, filename: str, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Fill the model from a file of plain tensors. UserError where it is anything else or does not fit."""
        fill(self.bare, read_tensors(filename), str(filename))

    def payload(self, done: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(tensors and plain values, JSON) of a checkpoint after `done` iterations."""
        schedulers = [scheduler.state_dict() for scheduler in self.param_schedulers]
        state = {"iteration": done, "iterations": self.max_iters}
        content = {"model": self.bare.state_dict(), "optimizer": self.optim_wrapper.state_dict()}
        return content | {"schedulers": schedulers}, state

    def dump_config(self) -> None:
        """The resolved config, once: a continued run has the same."""
        path = Path(self.work_dir) / "config.py"
        if is_main_process() and not path.exists():
            path.write_text(self.cfg.pretty_text)


def fill(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Copy the tensors in; UserError that names what is missing, unknown or of another shape."""
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = sorted(name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape)
    if missing or unknown or shapes:
        raise UserError(
            f"{where}: does not fit this segmentor: missing {missing[:5]}, unknown {unknown[:5]}, "
            f"of another shape {shapes[:5]}"
        )
    model.load_state_dict(state)


@HOOKS.register_module()
class RunFolder(Hook):
    """What the suite's trainings do besides training: figures, checkpoints every `interval` iterations, signals, and
    random numbers that depend on the seed and the step alone.

    SIGTERM and SIGUSR1 finish the step, write a checkpoint and leave by SystemExit(0), SIGINT by SystemExit(1).
    `accumulate` iterations make up one step; `batch` images a step, of `images` in the set.
    """

    priority = "LOWEST"  # a checkpoint holds schedulers that have made their step

    def __init__(
        self,
        interval: int,
        keep: int,
        log_every: int,
        seed: int,
        accumulate: int = 1,
        out: str = "",
        batch: int = 32,
    ):
        self.interval, self.keep, self.log_every, self.seed = interval, keep, log_every, seed
        self.accumulate, self.out, self.batch = accumulate, out, batch
        self.signals, self.report = Signals(), None
        self.window: dict[str, torch.Tensor] = {}
        self.iterations, self.since = 0, 0.0
        self.figures: dict[str, float] | None = None  # of the last evaluation
        self.evaluated = -1  # the iteration of it

    def before_run(self, runner: AddpRunner) -> None:
        out = Path(self.out or runner.work_dir)
        self.checkpoints = Checkpoints(out, self.keep)
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)

    def before_train(self, runner: AddpRunner) -> None:
        self.signals.__enter__()
        self.rank, self.world = get_dist_info()
        if is_main_process():
            total, step = runner.max_iters // self.accumulate, runner.iter // self.accumulate
            self.report = Report(self.checkpoints.folder.parent, "seg", step, total)
        self.since = time.perf_counter()

    def before_train_iter(self, runner: AddpRunner, batch_idx: int, data_batch: Any = None) -> None:
        torch.manual_seed(seed_for(self.seed, "step", runner.iter, self.rank))
        self.rate = max(group["lr"] for group in runner.optim_wrapper.param_groups)

    def after_train_iter(
        self, runner: AddpRunner, batch_idx: int, data_batch: Any = None, outputs: dict[str, torch.Tensor] | None = None
    ) -> None:
        for name, value in (outputs or {}).items():
            value = value.detach().float().cpu() if self.world == 1 else value.detach().float()
            self.window[name] = self.window[name] + value if name in self.window else value
        self.iterations += 1
        done = runner.iter + 1
        if done % self.accumulate:
            return
        step, last = done // self.accumulate, done == runner.max_iters
        if self.report:
            self.report.advance()
        stop, interrupt = self._agreed(self.signals.stop), self._agreed(self.signals.interrupt)
        if step % self.log_every == 0 or last or stop or interrupt:
            self._log(runner, step)
        if last or stop or interrupt or (self.interval and step % self.interval == 0):
            self.save(runner, done)
        if (stop or interrupt) and not last:
            self._leave(step, interrupt)

    def after_val_iter(self, runner: AddpRunner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        stop, interrupt = self._agreed(self.signals.stop), self._agreed(self.signals.interrupt)
        if stop or interrupt:
            self.save(runner, runner.iter)
            self._leave(runner.iter // self.accumulate, interrupt)

    def after_val_epoch(self, runner: AddpRunner, metrics: dict[str, float] | None = None) -> None:
        self.figures, self.evaluated = dict(metrics or {}), runner.iter
        if self.report:
            self.report.evaluation(runner.iter // self.accumulate, self.figures)
        self.since, self.iterations = time.perf_counter(), 0

    def close(self) -> None:
        """Gives signals and files back."""
        self.signals.__exit__()
        if self.report:
            self.report.close()
            self.report = None

    def save(self, runner: AddpRunner, done: int) -> None:
        """Write a checkpoint after `done` iterations. UserError where weights are not finite or the disk refuses."""
        step = done // self.accumulate
        payload, state = runner.payload(done)
        if not all(bool(value.isfinite().all()) for value in payload["model"].values()):
            raise UserError(f"step {step}: weights are not finite; older checkpoints are intact: lower train.lr")
        if is_main_process():
            try:
                self.checkpoints.write(step, payload, state)
            except OSError as error:
                raise UserError(
                    f"{self.checkpoints.path(step)}: not written ({error.strerror or error}); "
                    "older checkpoints are intact: make room and start the same command again"
                ) from error

    def _log(self, runner: AddpRunner, step: int) -> None:
        figures = {name: value / self.iterations for name, value in self.window.items()}
        if self.world > 1:
            all_reduce_dict(figures, "mean")
        figures = {name: float(value) for name, value in figures.items()}
        if not math.isfinite(figures.get("loss", 0.0)):
            raise UserError(
                f"step {step}: the loss is {figures['loss']}; the last checkpoint is intact: lower train.lr or clip"
            )
        seconds = max(time.perf_counter() - self.since, 1e-9)
        steps = self.iterations / self.accumulate
        if self.report:
            total, images = runner.max_iters // self.accumulate, len(runner.train_dataloader.dataset)
            order = {"step": step, "epoch": step * self.batch / images, "loss": figures.pop("loss", None)}
            figures = order | figures | {"lr": self.rate, "img_s": steps * self.batch / seconds}
            self.report.train(figures, eta=(total - step) * seconds / steps)
        self.window, self.iterations, self.since = {}, 0, time.perf_counter()

    def _agreed(self, flag: bool) -> bool:
        """Whether it is set on any process."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device="cuda" if torch.cuda.is_available() else "cpu")
        all_reduce(value)
        return bool(value > 0)

    def _leave(self, step: int, interrupt: bool) -> None:
        log.info("stopped by a signal after step %d; the same command continues", step)
        raise SystemExit(1 if interrupt else 0)
