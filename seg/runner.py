"""mmengine's Runner in a run folder like that of every other training.

Registers the runner `AddpRunner` in RUNNERS and the hook `RunFolder` in HOOKS.

mmengine's own checkpoints contain objects that need an unpickler which can run arbitrary code. Ours contain tensors and
plain values alone, are written atomically, and are refused if they contain anything else.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.dist import (
    all_gather_object,
    all_reduce,
    all_reduce_dict,
    all_reduce_params,
    barrier,
    broadcast_object_list,
    get_dist_info,
    is_main_process,
)
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS, RUNNERS
from torch import nn

from addp_core.base.errors import UserError
from addp_core.base.rng import seed_for
from addp_core.data.stream import errors_of_workers
from addp_core.training.batch_norm import local_statistics
from addp_core.training.checkpoints import Checkpoints
from addp_core.training.metrics import RunLogger
from addp_core.training.pace import VALIDATION, mark_pace
from addp_core.training.signals import StopSignals
from addp_core.training.tracker_backends import TrackerName
from addp_core.weights.files import read_tensors
from seg.segmentor import load_tensors

log = logging.getLogger("addp")


@RUNNERS.register_module()
class AddpRunner(Runner):
    """A Runner whose checkpoints are those of the hook `RunFolder`, in `<out>/checkpoints`."""

    _has_loaded: bool  # of mmengine: whether `load_or_resume` has been called

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without a wrapper for distributed training."""
        return self.model.module if is_model_wrapper(self.model) else self.model

    @property
    def run_folder(self) -> "RunFolder":
        """The hook that writes the run folder."""
        return next(hook for hook in self.hooks if isinstance(hook, RunFolder))

    def load_or_resume(self) -> None:
        """With `resume`, continue from the newest intact checkpoint, if there is one; otherwise read `load_from`, if
        set.
        """
        if self._has_loaded:
            return
        self._has_loaded = True
        if self._resume:
            newest = [self.run_folder.checkpoints.newest() if is_main_process() else None]
            broadcast_object_list(newest)
            if newest[0] is not None:
                self.resume(newest[0])
        elif self._load_from is not None:
            self.load_checkpoint(self._load_from)

    def resume(self, step: int) -> None:  # type: ignore[override]
        """Continue from the checkpoint of this step. Raises UserError if it is of another model or another length."""
        payload, state = self.run_folder.checkpoints.read(step)
        path = self.run_folder.checkpoints.path(step)
        if state["iterations"] != self.max_iters:
            raise UserError(
                f"train.steps: {path} belongs to a run of {state['iterations']} iterations, found {self.max_iters}; "
                "the schedule of a run cannot be changed: restore the length or choose another out"
            )
        load_tensors(self.unwrapped_model, payload["model"], str(path))
        self.optim_wrapper.load_state_dict(payload["optimizer"])
        for scheduler, values in zip(self.param_schedulers, payload["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        self.train_loop._iter = state["iteration"]

    def load_checkpoint(self, filename: str, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Load the model from a file of tensors. Raises UserError if it contains anything else or does not fit."""
        load_tensors(self.unwrapped_model, read_tensors(filename), str(filename))

    def checkpoint_content(self, iteration: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tensors and the JSON of a checkpoint after this many iterations."""
        payload = {
            "model": self.unwrapped_model.state_dict(),
            "optimizer": self.optim_wrapper.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.param_schedulers],
        }
        return payload, {"iteration": iteration, "iterations": self.max_iters}

    def dump_config(self) -> None:
        """Write the resolved config, unless it exists: that of a continued run is the same."""
        path = Path(self.work_dir) / "config.py"
        if is_main_process() and not path.exists():
            path.write_text(self.cfg.pretty_text)


class StepBatches:
    """The batches of a training loop, of which those of a whole step are loaded before the first is trained on.

    So a scene that cannot be read ends the run between two steps, where a checkpoint of it can be written.
    """

    def __init__(self, batches: Any, accumulate: int):
        self.batches, self.accumulate = batches, accumulate
        self.loaded: deque[Any] = deque()

    def skip_iter(self, iterations: int) -> None:
        """Leave out batches that have been trained on."""
        self.batches.skip_iter(iterations)

    def load(self) -> None:
        """Load the batches of the next step. Raises UserError if a scene cannot be read."""
        with errors_of_workers():
            self.loaded.extend([next(self.batches) for _ in range(self.accumulate)])

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.loaded:
            self.load()
        return self.loaded.popleft()


@HOOKS.register_module()
class RunFolder(Hook):
    """What all our trainings do around the training itself: metrics, checkpoints, signals and seeding.

    Random numbers depend on the seed and the iteration alone. Where batch norms are not synchronized (on CPUs), the
    processes average their running statistics after each iteration, so that all of them evaluate the model that is
    saved. After SIGTERM or SIGUSR1, the current step is finished, a
    checkpoint is written and SystemExit(0) raised; after SIGINT, the same with SystemExit(1). If a scene of the next
    step cannot be read, a checkpoint is written and UserError raised. There is a checkpoint before each evaluation, so
    that nothing that goes wrong there costs a step.

    Args:
        interval: steps between checkpoints; 0: only where one is written anyway.
        keep: number of checkpoints to keep.
        log_every: steps between two lines of metrics.
        seed: random seed.
        accumulate: iterations of a step.
        out: the run folder; empty for the runner's work_dir.
        batch: images of a step, over all processes.
        trackers: where the run is logged besides metrics.jsonl.
        tracker_project: its name in trackers that have projects.
    """

    priority = "LOWEST"  # after the schedulers' step, which the checkpoint has to include

    def __init__(
        self,
        interval: int,
        keep: int,
        log_every: int,
        seed: int,
        accumulate: int = 1,
        out: str = "",
        batch: int = 32,
        trackers: Sequence[TrackerName] = ("tensorboard",),
        tracker_project: str = "",
    ):
        self.interval, self.keep, self.log_every, self.seed = interval, keep, log_every, seed
        self.accumulate, self.out, self.batch = accumulate, out, batch
        self.trackers, self.tracker_project = trackers, tracker_project
        self.signals = StopSignals()
        self.run_logger: RunLogger | None = None  # on rank 0, while training
        # Sums of the losses, number of iterations and start time since the last line of metrics.
        self.window: dict[str, torch.Tensor] = {}
        self.window_iterations, self.window_start = 0, 0.0
        self.evaluation_start = 0.0
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.evaluated_iteration = -1  # when it took place
        self.saved_iteration = 0  # of the newest checkpoint

    def before_run(self, runner: AddpRunner) -> None:
        out = Path(self.out or runner.work_dir)
        self.checkpoints = Checkpoints(out, self.keep)
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)

    def before_train(self, runner: AddpRunner) -> None:
        self.signals.__enter__()
        self.rank, self.world_size = get_dist_info()
        if is_main_process():
            total, step = runner.max_iters // self.accumulate, runner.iter // self.accumulate
            out = self.checkpoints.folder.parent
            self.run_logger = RunLogger(out, "seg", step, total, self.trackers, self.tracker_project)
        self.batch_statistics = [] if self.world_size == 1 else local_statistics(runner.model)
        self.saved_iteration = runner.iter  # the run begins there, or at a checkpoint
        self.batches = StepBatches(runner.train_loop.dataloader_iterator, self.accumulate)
        runner.train_loop.dataloader_iterator = self.batches
        self._make_up_for_evaluation(runner)
        self.window_start = time.perf_counter()

    def before_train_iter(self, runner: AddpRunner, batch_idx: int, data_batch: Any = None) -> None:
        torch.manual_seed(seed_for(self.seed, "step", runner.iter, self.rank))
        self.learning_rate = max(group["lr"] for group in runner.optim_wrapper.param_groups)

    def after_train_iter(
        self, runner: AddpRunner, batch_idx: int, data_batch: Any = None, outputs: dict[str, torch.Tensor] | None = None
    ) -> None:
        if self.batch_statistics:
            all_reduce_params(self.batch_statistics, op="mean")
        for name, value in (outputs or {}).items():
            value = value.detach().float().cpu() if self.world_size == 1 else value.detach().float()
            self.window[name] = self.window[name] + value if name in self.window else value
        self.window_iterations += 1
        iteration = runner.iter + 1
        if iteration % self.accumulate:
            return
        step, last = iteration // self.accumulate, iteration == runner.max_iters
        if self.run_logger:
            self.run_logger.advance()
        error = None if last else self._load_next()
        stop, interrupt, unreadable = self._on_any_rank(self.signals.stop, self.signals.interrupt, error is not None)
        leaves = stop or interrupt or unreadable
        if step % self.log_every == 0 or last or leaves:
            self._log_metrics(runner, step)
        if last or leaves or (self.interval and step % self.interval == 0):
            self.save(runner, iteration)
        if last:
            return
        if stop or interrupt:
            self._exit(step, interrupt)
        if unreadable:
            self._end(step, error)

    def before_val_epoch(self, runner: AddpRunner) -> None:
        if runner.iter > self.saved_iteration:
            self.save(runner, runner.iter)
            barrier()  # a rank that fails in the evaluation would end rank 0, which writes
        self.evaluation_start = time.perf_counter()
        mark_pace(VALIDATION, 0)

    def after_val_iter(self, runner: AddpRunner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        mark_pace(VALIDATION, len(outputs or ()) * self.world_size)
        stop, interrupt = self._on_any_rank(self.signals.stop, self.signals.interrupt)
        if stop or interrupt:
            self._exit(runner.iter // self.accumulate, interrupt)

    def after_val_epoch(self, runner: AddpRunner, metrics: dict[str, float] | None = None) -> None:
        self.metrics, self.evaluated_iteration = dict(metrics or {}), runner.iter
        if self.run_logger:
            self.run_logger.log_evaluation(runner.iter // self.accumulate, self.metrics)
        self.window_start += time.perf_counter() - self.evaluation_start  # the rate is that of the training alone

    def close(self) -> None:
        """Restore the signal handlers and close the files."""
        self.signals.__exit__()
        if self.run_logger:
            self.run_logger.close()
            self.run_logger = None

    def save(self, runner: AddpRunner, iteration: int) -> None:
        """Write a checkpoint. Raises UserError if a weight is not finite or the checkpoint cannot be written."""
        step = iteration // self.accumulate
        payload, state = runner.checkpoint_content(iteration)
        if not all(bool(value.isfinite().all()) for value in payload["model"].values()):
            raise UserError(f"step {step}: weights are not finite; older checkpoints are intact: lower train.lr")
        if is_main_process():
            try:
                self.checkpoints.write(step, payload, state)
            except OSError as error:
                raise UserError(
                    f"{self.checkpoints.path(step)}: cannot be written ({error.strerror or error}); older checkpoints "
                    "are intact: free disk space and run the same command again"
                ) from error
        self.saved_iteration = iteration

    def _make_up_for_evaluation(self, runner: AddpRunner) -> None:
        """Evaluate after the step of a continued run's checkpoint, if the run was stopped in that evaluation."""
        loop, step = runner.train_loop, runner.iter // self.accumulate
        missing = [self.run_logger is not None and not self.run_logger.has_evaluation(step)]
        broadcast_object_list(missing)
        if missing[0] and 0 < runner.iter < runner.max_iters and runner.iter % loop.val_interval == 0:
            runner.val_loop.run()

    def _log_metrics(self, runner: AddpRunner, step: int) -> None:
        means = {name: value / self.window_iterations for name, value in self.window.items()}
        if self.world_size > 1:
            all_reduce_dict(means, "mean")
        losses = {name: float(value) for name, value in means.items()}
        if not math.isfinite(losses.get("loss", 0.0)):
            raise UserError(
                f"step {step}: the loss is {losses['loss']}; the last checkpoint is intact: lower train.lr, or set "
                "train.clip_grad"
            )
        seconds = max(time.perf_counter() - self.window_start, 1e-9)
        steps = self.window_iterations / self.accumulate
        if self.run_logger:
            total, images = runner.max_iters // self.accumulate, len(runner.train_dataloader.dataset)
            metrics = {"step": step, "epoch": step * self.batch / images, "loss": losses.pop("loss", None)}
            metrics |= losses | {"lr": self.learning_rate, "img_s": steps * self.batch / seconds}
            self.run_logger.log_training(metrics, eta=(total - step) * seconds / steps)
        self.window, self.window_iterations, self.window_start = {}, 0, time.perf_counter()

    def _load_next(self) -> UserError | None:
        """Load the batches of the next step; return the error if a scene cannot be read."""
        try:
            self.batches.load()
        except UserError as error:
            return error
        return None

    def _on_any_rank(self, *flags: bool) -> list[bool]:
        """Return whether each flag is set on any rank; in one all-reduce."""
        if self.world_size == 1:
            return [*flags]
        values = torch.tensor(flags, dtype=torch.float32)
        values = values.to("cuda" if torch.cuda.is_available() else "cpu")
        all_reduce(values)
        return (values > 0).tolist()

    def _end(self, step: int, error: UserError | None) -> NoReturn:
        """Raise the error of the rank that cannot read a scene, on all of them, after the checkpoint."""
        barrier()  # a rank that ends would end rank 0, which writes
        messages = [message for message in all_gather_object(error and str(error)) if message]
        log.info("stopped after step %d; when the data can be read, the same command continues", step)
        raise UserError(messages[0])

    def _exit(self, step: int, interrupt: bool) -> NoReturn:
        log.info("stopped by a signal after step %d; the same command continues", step)
        raise SystemExit(1 if interrupt else 0)
