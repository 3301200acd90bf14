"""The training loop of every task, on accelerate: one process, torchrun or several machines; fp32, bf16 or fp16; DDP
or fully sharded (`train.parallel`).

A task brings a `Stage` (what is trained, and its loss) and a stream of batches; `train` does the rest: schedule,
gradient accumulation and clipping, the guard against non-finite steps, the moving average, checkpoints, signals and
metrics.

Resuming is exact because only tensors depend on the history of a run: the order of the data, augmentation and all
random numbers of micro-step m are functions of (seed, m). Weights, optimizer, moving average, loss scale and the step
are therefore the full state of a run.
"""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace
from addp_core.training.best import check_keep_best, keep_best
from addp_core.training.checkpoints import Checkpoints, check_length
from addp_core.training.compute import accelerate_model, tf32_for
from addp_core.training.evaluation import EvaluationCost, EvaluationStopped
from addp_core.training.kernel_choices import kernel_choices
from addp_core.training.metrics import RunLogger
from addp_core.training.optimization import learning_rate, warn_if_warmup_is_too_long
from addp_core.training.parallel import full_tensor
from addp_core.training.precision import matrix_width
from addp_core.training.processes import check_batch, make_accelerator, move_to_device, seed_everything
from addp_core.training.run_folder import INTERMEDIATE_MODELS, mark_finished, prepare_out, release_out, settle_precision
from addp_core.training.signals import StopSignals
from addp_core.training.stage import MicroStep, Stage, TrainConfig
from addp_core.training.state import Counters, TrainingState
from addp_core.training.step_values import LATE_DEVICES, StepValues, count_skipped
from addp_core.weights.files import MODEL_FILE
from addp_core.weights.fingerprint import fingerprint

log = logging.getLogger("addp")

MAX_FAILED_CHECKPOINTS = 3  # in a row, until the run stops
KERNELS = "kernels"  # in state.json: the choices of `kernel_choices`
SEE_RANK_0 = "see rank 0's log"
STOP, INTERRUPT, BAD_IMAGES = "stop", "interrupt", "bad_images"  # values of a step beside the metrics


def train(stage: Stage, stream: Any, config: TrainConfig, out: str | Path, recipe: Any) -> Path:
    """Start or continue a training run in the folder `out` and return the path of its model.safetensors.

    With `train.ema`, the averaged weights are written beside the model as model-ema.safetensors. If the stage says that
    the averaged weights are the model, the last weights are written as model-raw.safetensors. Evaluations are always of
    the averaged weights, and so is model-best.safetensors, which `train.keep_best` keeps.

    SIGTERM and SIGUSR1 finish the step, write a checkpoint and raise SystemExit(0); SIGINT does the same with
    SystemExit(1). A second SIGINT interrupts at once. An evaluation that is stopped is repeated when the run continues.

    Args:
        stage: what is trained.
        stream: `stream.batches(start, rank, world)` yields this process's rows of the micro-batches `start`,
            `start` + 1, ... without end, each with the `errors` of images that could not be read; `len(stream)` is the
            number of images. See `Stream`.
        config: the section `train` of the recipe; `precision=auto` becomes, in place, what it stands for here.
        out: the run folder.
        recipe: an instance of the task's dataclass of keys, or its YAML.

    Raises:
        UserError: if the folder cannot be used, its checkpoint does not fit, the stage has no metric `keep_best`,
            `max_nonfinite` steps in a row are not finite, or the disk refuses the last checkpoint or three in a row.
    """
    out = Path(out)
    finished = prepare_out(out, recipe)
    if finished:
        return finished
    try:
        check_keep_best(config.keep_best, stage.metrics)
        settle_precision(out, recipe, config, matrix_width(stage.model, *stage.frozen))
        with StopSignals() as signals, tf32_for(config.precision):
            return _Run(stage, stream, config, out, recipe, signals).run()
    finally:
        release_out(out)


class _Run:
    """One call of `train`."""

    def __init__(self, stage: Stage, stream: Any, config: TrainConfig, out: Path, recipe: Any, signals: StopSignals):
        self.stage, self.stream, self.config, self.out, self.signals = stage, stream, config, out, signals
        self.recipe = recipe
        self.accelerator = make_accelerator(config.precision, stage.find_unused)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        check_batch(config, self.world)
        self.steps_per_epoch = len(stream) / config.batch  # a fraction
        self.total = config.total_steps(len(stream))
        self.warmup = (
            config.warmup_steps if config.warmup_steps is not None else config.warmup_epochs * self.steps_per_epoch
        )
        if self.is_main:
            warn_if_warmup_is_too_long(self.warmup, self.total)
        self.window_seconds = 0.0  # since the last log line
        self.failed_checkpoints, self.saved_step = 0, 0  # in a row; of the newest checkpoint
        self.checkpoints = Checkpoints(out, config.keep)
        self.logger: RunLogger | None = None  # on rank 0
        self.evaluation_cost = EvaluationCost()

        self.frozen = fingerprint(*stage.frozen)  # a run must continue with the same frozen parts
        for module in stage.frozen:
            module.to(self.device).eval().requires_grad_(False)
            accelerate_model(module, config.compile, config.channels_last)
        self.state, self.counters = self._build_state()
        self.untimed_steps = self.counters.window_steps  # of the window, but of an earlier process
        self.unread: deque[StepValues] = deque()  # of steps whose values the host has not read yet
        self.reads_late = self.device.type in LATE_DEVICES and self.state.skips_on_device
        self.stops = self.interrupts = False  # a signal has asked for it, on any process

    def _build_state(self) -> tuple[TrainingState, Counters]:
        """Build the model and the optimizer, and load the newest complete checkpoint if there is one."""
        newest = [self.checkpoints.newest() if self.is_main else None]
        if self.world > 1:
            broadcast_object_list(newest)
        (step,) = newest
        if step is None:
            kernel_choices().begin({})
            return TrainingState(self.stage.model, self.config, self.accelerator, None, None), Counters()
        payload, stored = self.checkpoints.read(step)
        kernel_choices().begin(stored.get(KERNELS))
        if stored["frozen"] != self.frozen:
            raise UserError(
                f"out={self.out}: was started with other weights in its frozen parts than this command gives; "
                "give the same files again or choose another out"
            )
        path = self.checkpoints.path(step)
        state = TrainingState(self.stage.model, self.config, self.accelerator, payload, path)
        check_length(self.out, step, self.total)
        self.saved_step = step
        return state, Counters.from_state(stored)

    # --- the loop ---

    def run(self) -> Path:
        """Train to the last step, then preview, evaluate and export; return the path of the model."""
        config, counters = self.config, self.counters
        if self.is_main:
            self.logger = RunLogger(self.out, self.stage.name, counters.step, self.total, *config.tracking)
            begin = f"continues from step {counters.step}" if counters.step else "starts"
            log.info("%s: %s, %d steps of %d images, %s", self.stage.name, begin, self.total, config.batch, self.device)
        batches = iter(self.stream.batches(counters.step * config.accumulate, self.rank, self.world))
        try:
            self.state.model.train()
            if 0 < counters.step < self.total:
                self._make_up_for_outputs()
            while counters.step < self.total:
                self._step(batches)
                self._after_step()
            self._preview()
            self._evaluate()
            if self.logger:
                self.logger.finish()
            self._export(self.out)
            if self.is_main:
                log.info("%s: finished after %d steps: %s", self.stage.name, counters.step, self.out / MODEL_FILE)
        finally:
            if hasattr(batches, "close"):
                batches.close()
            if self.logger:
                self.logger.close()
        return self.out / MODEL_FILE

    def _after_step(self) -> None:
        """Log, write a checkpoint, export, preview and evaluate where they are due; leave if a signal asked for it.

        The checkpoint comes first, so that a failure or a signal in the rest costs no step of training.
        """
        config, leaves = self.config, self.stops or self.interrupts
        last = self.counters.step == self.total
        if self._is_due(config.log_every) or last:
            self._log_metrics()
        if last or leaves or self._is_due(config.checkpoint_every):
            self._checkpoint(required=last or leaves)
        if last:
            return
        if leaves:
            self._leave(self.interrupts)
        if self._is_due(config.export_every):
            self._export(self._intermediate_model)
        if self._is_due(config.preview_every):
            self._preview()
        if self._is_due(config.evaluate_every):
            self._evaluate()

    def _is_due(self, interval: int) -> bool:
        """Check whether something that happens every `interval` steps (0: never) happens after this step."""
        return interval > 0 and self.counters.step % interval == 0

    @property
    def _intermediate_model(self) -> Path:
        """The folder of this step's intermediate checkpoint."""
        return self.out / INTERMEDIATE_MODELS / f"step-{self.counters.step}"

    def _make_up_for_outputs(self) -> None:
        """Export, preview and evaluate after the step of a continued run's checkpoint, where that is due and missing:
        the run may have been stopped in between.
        """
        config, missing = self.config, [False] * 3
        if self.logger:
            step = self.counters.step
            model_exists = (self._intermediate_model / MODEL_FILE).exists()
            missing = [not model_exists, not self.logger.has_images(step), not self.logger.has_evaluation(step)]
        if self.world > 1:
            broadcast_object_list(missing)
        export, preview, evaluation = missing
        if export and self._is_due(config.export_every):
            self._export(self._intermediate_model)
        if preview and self._is_due(config.preview_every):
            self._preview()
        if evaluation and self._is_due(config.evaluate_every):
            self._evaluate()

    def _leave(self, interrupt: bool) -> NoReturn:
        """Leave after the checkpoint that a signal asked for."""
        if self.is_main:
            log.info("stopped by a signal after step %d; the same command continues the run", self.counters.step)
        raise SystemExit(1 if interrupt else 0)

    def _step(self, batches: Iterator[Any]) -> None:
        """Do one optimizer step. A step whose loss or gradient is not finite changes nothing.

        Where the host need not wait for the device, it reads the values of a step when the next one is under way.
        """
        state, counters, begin = self.state, self.counters, time.perf_counter()
        rate = learning_rate(counters.step, self.total, self.warmup, self.config)
        state.set_learning_rate(rate)
        state.save_buffers()
        terms, micro_step, unreadable = self._accumulate_gradient(batches)

        # One transfer and one small all-reduce for everything that the processes have to agree on.
        flags = {STOP: self.signals.stop, INTERRUPT: self.signals.interrupt, BAD_IMAGES: unreadable > 0}
        values = [full_tensor(value).to(self.device) for value in terms.values()]
        values += torch.tensor([*flags.values()], dtype=torch.float32).to(self.device, non_blocking=True).unbind()
        agreed = dict(zip([*terms, *flags], self.accelerator.reduce(torch.stack(values), "mean"), strict=True))

        skipped = ~(agreed["loss"].isfinite() & agreed["grad_norm"].isfinite())
        state.step(skipped)
        more = self.stage.after_step(state.unwrapped, micro_step, self.accelerator)
        state.restore_buffers(skipped)
        if state.ema:
            state.ema.update_unless(skipped, state.unwrapped, counters.step + 1)
        state.optimizer.zero_grad()
        counters.step += 1
        self.unread.append(StepValues(counters.step, rate, skipped, agreed, more))
        self._read_values(leave=1 if self.reads_late and not self._is_any_due() else 0)
        self.window_seconds += time.perf_counter() - begin
        if self.logger:
            self.logger.advance()

    def _is_any_due(self) -> bool:
        """Check whether anything after this step needs the values of all steps up to here."""
        config = self.config
        every = (config.log_every, config.checkpoint_every, config.export_every, config.preview_every)
        return self.counters.step == self.total or any(map(self._is_due, (*every, config.evaluate_every)))

    def _read_values(self, leave: int) -> None:
        """Count what the steps gave, except for the last `leave`; if a signal asks to stop, there are no exceptions."""
        while len(self.unread) > (0 if self.stops or self.interrupts else leave):
            step = self.unread.popleft()
            metrics, skipped = step.read()
            stop, interrupt, bad_images = (metrics.pop(flag) for flag in (STOP, INTERRUPT, BAD_IMAGES))
            self.stops, self.interrupts = self.stops or stop > 0, self.interrupts or interrupt > 0
            if bad_images and self.world > 1:
                self.stream.add_errors(gather_object(list(self.stream.errors.items())))
            if skipped:
                limit, scaler = self.config.max_nonfinite, self.accelerator.scaler
                warning = count_skipped(self.counters, step, metrics, limit, scaler, self.checkpoints)
                if warning and self.is_main:
                    log.warning(warning)
            else:
                self.counters.bad_in_a_row = 0
            self.counters.add(metrics)

    def _accumulate_gradient(self, batches: Iterator[Any]) -> tuple[dict[str, Tensor], MicroStep, int]:
        """Compute the gradient of one step. Return the means of the loss terms over its micro-steps with the gradient's
        norm, the last micro-step, and how many images this process could not read.
        """
        config, model, unreadable = self.config, self.state.model, 0
        terms: dict[str, Tensor] = {}
        for part in range(config.accumulate):
            micro_step = self._micro_step(part)
            batch = move_to_device(self._next_batch(batches), self.device)
            unreadable += len(batch.errors)
            seed_everything(config.seed, "step", micro_step.index, self.rank)
            last = part == config.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.accelerator.autocast():
                    losses = self.stage.loss(model, batch, micro_step)
                self.accelerator.backward(losses["loss"] / config.accumulate)
            for name, value in losses.items():
                share = value.detach().float() / config.accumulate
                terms[name] = terms[name] + share if name in terms else share
        terms["grad_norm"] = self.accelerator.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
        return terms, micro_step, unreadable

    def _next_batch(self, batches: Iterator[Any]) -> Any:
        """Return the next batch. If images cannot be read, the steps before this one are kept, and UserError raised.

        Of several processes, one may have the error alone, and the others wait for it: they keep the last checkpoint.
        """
        try:
            return next(batches)
        except UserError:
            if self.world == 1:
                self.state.optimizer.zero_grad()
                self.state.restore_buffers(torch.ones((), dtype=torch.bool, device=self.device))
                self._read_values(leave=0)
                self._keep_steps()
            raise

    def _keep_steps(self) -> None:
        """Write a checkpoint, unless there is one of this step, before an error in the data ends the run."""
        if self.counters.step > self.saved_step:
            self._checkpoint(required=False)
        log.info("stopped after step %d; when this is mended, the same command continues", self.counters.step)

    def _micro_step(self, part: int) -> MicroStep:
        config, share = self.config, self.config.micro_batch // self.world
        rows = slice(self.rank * share, (self.rank + 1) * share)
        step = self.counters.step
        index = step * config.accumulate + part
        return MicroStep(config.seed, step, index, self.rank, self.world, config.micro_batch, rows)

    # --- checkpoints ---

    def _checkpoint(self, required: bool) -> None:
        """Write a checkpoint.

        A failure is logged. It raises UserError if the checkpoint is `required` (the last one, or the one before
        leaving on a signal) or the third failure in a row.
        """
        step = self.counters.step
        if self._on_any_process(not self.state.local_weights_finite()):
            message = f"step {step}: weights are not finite, no checkpoint is written, older ones are intact"
            if required:
                raise UserError(f"{message}; lower the learning rate or clip harder")
            if self.is_main:
                log.warning(message)
            return
        payload, error = self.state.payload(), None
        counters = {**asdict(self.counters), "frozen": self.frozen, KERNELS: kernel_choices().table}
        if self.state.sharded:
            error = _os_error(partial(self.checkpoints.write_sharded, step, payload, counters))
        elif self.is_main:
            error = _os_error(partial(self.checkpoints.write, step, payload, counters))
        if not self._on_any_process(error is not None):
            self.failed_checkpoints, self.saved_step = 0, step
            return
        self.failed_checkpoints += 1
        reason = (error.strerror or error) if error else SEE_RANK_0
        message = f"{self.checkpoints.path(step)}: not written ({reason}); older checkpoints are intact"
        if required or self.failed_checkpoints >= MAX_FAILED_CHECKPOINTS:
            raise UserError(f"{message}: free some space and start the same command again")
        if self.is_main:
            log.warning("%s; the run continues until the next one", message)

    def _on_any_process(self, flag: bool) -> bool:
        """Check whether `flag` is set on any process; all processes get the same answer."""
        if self.world == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum").item())

    # --- metrics, previews and the trained model ---

    def _log_metrics(self) -> None:
        """Log the mean metrics of the steps since the last call."""
        config, step, seconds = self.config, self.counters.step, max(self.window_seconds, 1e-9)
        means, window_steps = self.counters.take_window()
        timed_steps = max(window_steps - self.untimed_steps, 1)
        self.window_seconds, self.untimed_steps = 0.0, 0
        if not self.logger:
            return
        metrics: dict[str, float | None] = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "images": step * config.batch,
            "loss": means.pop("loss", None),
            **means,
            "lr": learning_rate(step - 1, self.total, self.warmup, config),
            "skipped": self.counters.skipped,
            "img_s": timed_steps * config.batch / seconds,
        }
        self.logger.log_training(metrics, eta=(self.total - step) * seconds / timed_steps)

    @contextlib.contextmanager
    def _model_for_inference(self, purpose: str) -> Iterator[nn.Module]:
        """Yield the averaged model, or the trained one if there is no average, in eval mode without gradients."""
        seed_everything(self.config.seed, purpose, self.counters.step, self.rank)
        with self.state.full_model(averaged=True) as model, torch.no_grad(), self.accelerator.autocast():
            yield model.eval()
        self.state.model.train()

    def _preview(self) -> None:
        with self._model_for_inference("preview") as model:
            images = self.stage.preview(model, self.counters.step)
        if self.logger:
            self.logger.save_images(self.counters.step, images)

    def _evaluate(self) -> None:
        step, best = self.counters.step, None
        try:
            with self.evaluation_cost, self._model_for_inference("evaluate") as model:
                metrics = self.stage.evaluate(model, step)
                if self.logger and metrics:
                    metric = self.config.keep_best or self.stage.best_metric
                    write = partial(self._write_model, model)
                    best = keep_best(self.out, step, metrics, metric, self.stage.metrics, write)
        except EvaluationStopped:
            if self.saved_step != step:
                self._checkpoint(required=True)
            self._leave(self._on_any_process(self.signals.interrupt))
        except UserError:
            if self.world == 1:
                self._keep_steps()
            raise
        if self.logger and metrics:
            self.stage.after_evaluation(step, metrics, best)
            self.logger.log_evaluation(step, {**metrics, **self.evaluation_cost.metrics()})

    def _export(self, folder: Path) -> None:
        """Write the model into `folder`, which other commands then read like a run folder; with `train.ema`, also the
        other of the averaged and the last weights.
        """
        models, error = {MODEL_FILE: False}, None  # file -> whether its weights are averaged
        if self.state.ema and self.stage.averaged_is_model:
            models = {MODEL_FILE: True, "model-raw.safetensors": False}
        elif self.state.ema:
            models["model-ema.safetensors"] = True
        for name, averaged in models.items():
            with self.state.full_model(averaged) as model:
                if self.is_main and not error:
                    error = _os_error(partial(self._write_model, model, folder / name))
        if self.is_main and not error and folder == self.out:
            summary = {"step": self.counters.step, "skipped": self.counters.skipped}
            error = _os_error(partial(mark_finished, self.out, self.recipe, summary))
        if self._on_any_process(error is not None):  # and no process continues before the files are there
            reason = (error.strerror or error) if error else SEE_RANK_0
            raise UserError(
                f"{folder}: the trained model could not be written ({reason}); "
                "the last checkpoint is intact: free some space and start the same command again"
            ) from error
        self.state.model.train()

    def _write_model(self, model: nn.Module, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(path) as temporary:
            self.stage.export(model.eval(), temporary)


def _os_error(work: Callable[[], Any]) -> OSError | None:
    """Do some work and return the OSError that it raises, if any."""
    try:
        work()
    except OSError as error:
        return error
    return None
