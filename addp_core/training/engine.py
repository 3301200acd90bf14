"""The training loop of every task, on accelerate: one process, torchrun, several machines; fp32, bf16, fp16; DDP, FSDP.

A task brings a `Stage` (what is trained, its loss) and a stream of batches; `train` owns the rest: parameter groups,
schedule, clipping, accumulation, the guard against non-finite steps, the moving average, checkpoints, signals, figures.

Resuming is exact because nothing that matters depends on history but tensors: data order, augmentation and all random
numbers of micro-step m are functions of (seed, m), so that weights, optimizer, moving average, loss scale and the step
are the whole state of a run.
"""

import atexit
import contextlib
import dataclasses
import logging
import math
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import timm.optim
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list, send_to_device
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from addp_core.base import rng
from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace
from addp_core.training.compute import accelerate_model
from addp_core.training.run_folder import MODELS, Checkpoints, Report, mark_finished, prepare_out, release_out
from addp_core.training.stage import Draw, Stage, TrainConfig
from addp_core.weights.checkpoint import MODEL_FILE, fingerprint

__all__ = ["Draw", "Stage", "TrainConfig", "learning_rate", "make_optimizer", "prepare_out", "train"]

log = logging.getLogger("addp")

FAILED_CHECKPOINTS = 3  # in a row, until the run stops
ELSEWHERE = "the first process knows why"


def train(stage: Stage, stream: Any, config: TrainConfig, out: str | Path, recipe_text: str) -> Path:
    """Runs or continues a training in the folder `out`; returns the path of its model.safetensors.

    `stream`: `batches(start, rank, world)` yields for ever this process's rows of micro-batch `start`, `start` + 1, ...
    (tensors, dataclasses, lists or dicts of them); its length is the number of images. With `train.ema`, the averaged
    weights lie beside the model in model-ema.safetensors; of a stage that evaluates they are the model, since the
    figures are theirs, and the last ones lie in model-raw.safetensors.

    SIGTERM and SIGUSR1 finish the step, write a checkpoint and leave by SystemExit(0), SIGINT by SystemExit(1); a
    second SIGINT interrupts at once. UserError, one line: a folder that cannot be used, a checkpoint that does not fit,
    `max_nonfinite` bad steps in a row, a disk that refuses the last checkpoint or three in a row.
    """
    out = Path(out)
    finished = prepare_out(out, recipe_text)
    if finished:
        return finished
    try:
        with Signals() as signals:
            return _Run(stage, stream, config, out, recipe_text, signals).run()
    finally:
        release_out(out)


def learning_rate(step: int, total: int, warmup: float, config: TrainConfig) -> float:
    """The rate of optimizer step `step` (from 0) of `total`: linear from 0 over `warmup` steps, then half a cosine."""
    if step < warmup:
        return config.peak_lr * step / warmup
    if config.schedule == "constant":
        return config.peak_lr
    progress = (step - warmup) / max(total - warmup, 1)
    return config.min_lr + (config.peak_lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimizer over its parameter groups.

    Weight decay spares one-dimensional tensors and what the model's `no_weight_decay()` names; with `layer_decay` the
    rate falls from layer to layer as the model's `group_matcher` orders them.
    """
    info = timm.optim.get_optimizer_info(config.optimizer)
    options: dict[str, Any] = {"betas": config.betas} if info.has_betas else {}
    if info.has_momentum:
        options["momentum"] = config.momentum
    if config.optimizer in ("adam", "adamw"):
        options["fused"] = True  # one pass over the weights; half the time on a CPU
    options |= {"weight_decay": config.weight_decay, "layer_decay": config.layer_decay}
    if config.optimizer == "lars" and not config.weight_decay:
        options["param_group_fn"] = _adapted_matrices
    try:
        return timm.optim.create_optimizer_v2(model, opt=config.optimizer, lr=config.peak_lr, **options)
    except ValueError as error:
        raise UserError(f"train.optimizer={config.optimizer}: {error}") from error


def _adapted_matrices(model: nn.Module) -> list[dict[str, Any]]:
    """LARS scales the rate of matrices without weight decay too, which timm's does on request only; never of vectors
    (MAE's linear probing)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return [{"params": matrices, "always_adapt": True}, {"params": vectors}]


class Signals:
    """Turns signals into a wish to stop, read once a step."""

    def __init__(self):
        self.stop = False  # requeue: leave with 0
        self.interrupt = False  # leave with 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if number == signal.SIGINT:
            self.interrupt = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
        else:
            self.stop = True


class _Run:
    """One call of `train`."""

    def __init__(self, stage, stream, config: TrainConfig, out: Path, recipe_text: str, signals: Signals):
        self.stage, self.stream, self.config, self.out, self.signals = stage, stream, config, out, signals
        self.recipe_text = recipe_text
        self.accelerator = _accelerator(stage, config)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if config.micro_batch % self.world:
            raise UserError(
                f"train.batch={config.batch}: found {config.accumulate} micro-steps x {self.world} processes, "
                f"expected their product to divide it; take a multiple of {config.accumulate * self.world}"
            )
        if self.sharded and config.ema:
            raise UserError("train.ema: is not available with FSDP; leave it out or use DDP")
        self.per_epoch = len(stream) / config.batch  # steps, a fraction
        self.total = config.steps if config.steps is not None else math.ceil(config.epochs * self.per_epoch)
        self.warmup = config.warmup_steps if config.warmup_steps is not None else config.warmup_epochs * self.per_epoch

        self.step = 0
        self.bad_in_a_row = 0
        self.skipped = 0
        self.window: dict[str, list[float]] = {}  # name -> [sum, count] since the last line of figures
        self.window_steps, self.window_seconds = 0, 0.0
        self.failed_checkpoints = 0
        self.checkpoints = Checkpoints(out, config.keep)
        self.report: Report | None = None  # of the first process

        if self.warmup >= self.total and self.main:
            log.warning(
                "the warm-up (%g steps) is no shorter than the run (%d): the rate never peaks", self.warmup, self.total
            )
        self.frozen = fingerprint(*stage.frozen)  # a continued run must stand on the same parts
        for module in stage.frozen:
            module.to(self.device).eval().requires_grad_(False)
            accelerate_model(module, config.compile, config.channels_last)
        self._build()

    # --- state ---

    def _build(self) -> None:
        """Model, optimizer and moving average, as at the start or as in the newest whole checkpoint."""
        config, bare = self.config, self.stage.model.to(self.device)
        found = [self.checkpoints.newest() if self.main else None]
        if self.world > 1:
            broadcast_object_list(found)
        payload, state = self.checkpoints.read(found[0]) if found[0] is not None else (None, {})

        if payload and state["frozen"] != self.frozen:
            raise UserError(
                f"out={self.out}: was started with other weights in its frozen parts than those that are given now; "
                "give the same files again or choose another out"
            )
        self.saved = list(bare.state_dict())
        self.ema = ModelEmaV3(bare, decay=config.ema, use_warmup=True) if config.ema else None
        if payload:
            _load(bare, payload["model"], self.saved, self.checkpoints.path(found[0]))
            if self.ema:
                _load(self.ema.module, payload["ema"], self.saved, self.checkpoints.path(found[0]))
        # FSDP takes the model apart; pictures, evaluation and export then work on a whole copy, filled when needed.
        self.replica = deepcopy(bare) if self.sharded else None
        accelerate_model(bare, config.compile, config.channels_last)
        self.model, self.optimizer = self.accelerator.prepare(bare, make_optimizer(bare, config))
        self.bare = self.accelerator.unwrap_model(self.model)
        self.buffers = list(self.bare.buffers())
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        if payload:
            self._load_optimizer(payload["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(payload["scaler"])
            self.step, self.window, self.window_steps = state["step"], state["window"], state["window_steps"]
            self.bad_in_a_row, self.skipped = state["bad_in_a_row"], state["skipped"]
            if self.step > self.total:
                raise UserError(f"out={self.out}: is at step {self.step} already, past the {self.total} asked for")

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        optimizer = self.optimizer.optimizer
        if self.sharded:
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        else:
            optimizer.load_state_dict(state)

    def _payload(self) -> dict[str, Any]:
        """What a checkpoint holds; all processes take part under FSDP."""
        if self.sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(self.model, options=options)
            optimizer = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
        else:
            weights, optimizer = self.bare.state_dict(), self.optimizer.optimizer.state_dict()
        payload = {"model": {name: weights[name] for name in self.saved if name in weights}, "optimizer": optimizer}
        if self.ema:
            average = self.ema.module.state_dict()
            payload["ema"] = {name: average[name] for name in self.saved}
        if self.accelerator.scaler is not None:
            payload["scaler"] = self.accelerator.scaler.state_dict()
        return payload

    def _whole(self) -> nn.Module:
        """The trained model with all its weights in place."""
        if self.replica is None:
            return self.bare
        self.replica.load_state_dict(get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True)))
        return self.replica

    def _checkpoint(self, must: bool) -> None:
        """Writes a checkpoint. A disk that refuses it is reported; it ends the run where the checkpoint is a `must`
        (the last one, one before leaving on a signal) or the third failure in a row."""
        if self._anywhere(not all(bool(_local(weight).isfinite().all()) for weight in self.bare.parameters())):
            what = f"step {self.step}: weights are not finite, no checkpoint is written, older ones are intact"
            if must:
                raise UserError(f"{what}; lower the learning rate or clip harder")
            if self.main:
                log.warning(what)
            return
        payload, error = self._payload(), None
        if self.main:
            state = {"window": self.window, "window_steps": self.window_steps, "frozen": self.frozen}
            state |= {"bad_in_a_row": self.bad_in_a_row, "skipped": self.skipped}
            try:
                self.checkpoints.write(self.step, payload, state)
            except OSError as caught:
                error = caught
        if not self._anywhere(error is not None):
            self.failed_checkpoints = 0
            return
        self.failed_checkpoints += 1
        reason = (error.strerror or error) if error else ELSEWHERE
        what = f"{self.checkpoints.path(self.step)}: not written ({reason})"
        if must or self.failed_checkpoints >= FAILED_CHECKPOINTS:
            raise UserError(f"{what}; older checkpoints are intact: make room and start the same command again")
        if self.main:
            log.warning("%s; older checkpoints are intact, the run continues to the next attempt", what)

    def _anywhere(self, flag: bool) -> bool:
        """Whether `flag` is set on any process; the same answer on all."""
        if self.world == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum").item())

    # --- the loop ---

    def run(self) -> Path:
        config = self.config
        if self.main:
            self.report = Report(self.out, self.stage.name, self.step, self.total)
            start = f"continues from step {self.step}" if self.step else "starts"
            log.info("%s: %s, %d steps of %d images, %s", self.stage.name, start, self.total, config.batch, self.device)
        batches = iter(self.stream.batches(self.step * config.accumulate, self.rank, self.world))
        try:
            self.model.train()
            while self.step < self.total:
                stop, interrupt = self._step(batches)
                last = self.step == self.total
                if self.step % config.log_every == 0 or last:
                    self._log()
                if not last and config.preview_every and self.step % config.preview_every == 0:
                    self._preview()
                if not last and config.evaluate_every and self.step % config.evaluate_every == 0:
                    self._evaluate()
                if not last and config.export_every and self.step % config.export_every == 0:
                    self._export(self.out / MODELS / f"step-{self.step}")
                if last or stop or interrupt or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self._checkpoint(must=last or stop or interrupt)
                if (stop or interrupt) and not last:
                    if self.main:
                        log.info("stopped by a signal after step %d; the same command continues", self.step)
                    raise SystemExit(1 if interrupt else 0)
            # After the last checkpoint, so that nothing that fails in them costs a step of training.
            self._preview()
            self._evaluate()
            if self.report:
                self.report.curves()
            self._export(self.out)
            if self.main:
                log.info("%s: finished after %d steps: %s", self.stage.name, self.step, self.out / MODEL_FILE)
        finally:
            if hasattr(batches, "close"):
                batches.close()
            if self.report:
                self.report.close()
        return self.out / MODEL_FILE

    def _step(self, batches: Iterator) -> tuple[bool, bool]:
        """One optimizer step. Returns whether to stop after it, and whether by an interrupt; all processes agree."""
        config, begin = self.config, time.perf_counter()
        rate = learning_rate(self.step, self.total, self.warmup, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        for held, buffer in zip(self.buffers_before, self.buffers, strict=True):
            held.copy_(buffer)

        terms: dict[str, Tensor] = {}
        for part in range(config.accumulate):
            draw = self._draw(part)
            batch = _to_device(next(batches), self.device)
            _seed(config.seed, "step", draw.micro, self.rank)
            last = part == config.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    losses = self.stage.loss(self.model, batch, draw)
                self.accelerator.backward(losses["loss"] / config.accumulate)
            for name, value in losses.items():
                share = value.detach().float() / config.accumulate
                terms[name] = terms[name] + share if name in terms else share
        terms["grad_norm"] = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad or math.inf)

        # One transfer and one small all-reduce for everything the processes have to agree on.
        flags = torch.tensor([self.signals.stop, self.signals.interrupt], dtype=torch.float32, device=self.device)
        values = torch.stack([_whole_tensor(value).to(self.device) for value in terms.values()])
        *means, stop, interrupt = self.accelerator.reduce(torch.cat([values, flags]), "mean").tolist()
        figures = dict(zip(terms, means, strict=True))

        if math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]):
            self.bad_in_a_row = 0
            self.optimizer.step()
            figures |= self.stage.after_step(self.bare, draw, self.accelerator)
            if self.ema:
                self.ema.update(self.bare, step=self.step + 1)
        else:
            self._skip(figures, rate)
        self.optimizer.zero_grad()
        for name, value in figures.items():
            if math.isfinite(value):
                total = self.window.setdefault(name, [0.0, 0])
                total[0] += value
                total[1] += 1
        self.step += 1
        self.window_steps += 1
        self.window_seconds += time.perf_counter() - begin
        if self.report:
            self.report.advance()
        return stop > 0, interrupt > 0

    def _draw(self, part: int) -> Draw:
        config, share = self.config, self.config.micro_batch // self.world
        rows = slice(self.rank * share, (self.rank + 1) * share)
        micro = self.step * config.accumulate + part
        return Draw(config.seed, self.step, micro, self.rank, self.world, config.micro_batch, rows)

    def _skip(self, figures: dict[str, float], rate: float) -> None:
        """A step without a finite loss and gradient leaves no trace in weights, optimizer, average and buffers."""
        scaler, overflow = self.accelerator.scaler, False
        if scaler is not None:
            # fp16 finds its loss scale by overflowing now and then; that is no fault while there is room below.
            overflow = math.isfinite(figures["loss"]) and scaler.get_scale() > 1
            scaler.update()
        for held, buffer in zip(self.buffers_before, self.buffers, strict=True):
            buffer.copy_(held)
        if overflow:
            log.debug("step %d: fp16 overflow, loss scale now %g", self.step + 1, scaler.get_scale())
            return
        self.skipped += 1
        self.bad_in_a_row += 1
        values = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        terms = ", ".join(name for name, value in figures.items() if not math.isfinite(value))
        where = f"step {self.step + 1}: not finite: {terms} (all: {values}; lr {rate:.3g})"
        if self.bad_in_a_row >= self.config.max_nonfinite:
            steps = self.checkpoints.steps()
            kept = f"the last checkpoint, {self.checkpoints.path(steps[0])}, is intact" if steps else "no checkpoint"
            raise UserError(
                f"{where}; {self.bad_in_a_row} such steps in a row (train.max_nonfinite), {kept}; "
                "lower the learning rate, clip harder or look at the data"
            )
        if self.main:
            log.warning("%s; step skipped, %d in a row", where, self.bad_in_a_row)

    # --- figures, pictures, the end ---

    def _log(self) -> None:
        config, steps = self.config, max(self.window_steps, 1)
        figures = {name: total / count for name, (total, count) in self.window.items()}
        if self.report:
            seconds = max(self.window_seconds, 1e-9)
            figures = {
                "step": self.step,
                "epoch": self.step / self.per_epoch,
                "images": self.step * config.batch,
                "loss": figures.pop("loss", None),
                **figures,
                "lr": learning_rate(self.step - 1, self.total, self.warmup, config),
                "skipped": self.skipped,
                "img_s": steps * config.batch / seconds,
            }
            self.report.train(figures, eta=(self.total - self.step) * seconds / steps)
        self.window, self.window_steps, self.window_seconds = {}, 0, 0.0

    @contextlib.contextmanager
    def _at_rest(self, what: str) -> Iterator[nn.Module]:
        """The model to look at: the average where there is one, in eval mode, without gradients."""
        _seed(self.config.seed, what, self.step, self.rank)
        model = self.ema.module if self.ema else self._whole()
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            yield model
        self.model.train()

    def _preview(self) -> None:
        with self._at_rest("preview") as model:
            images = self.stage.preview(model, self.step)
        if self.report:
            self.report.images(self.step, images)

    def _evaluate(self) -> None:
        with self._at_rest("evaluate") as model:
            figures = self.stage.evaluate(model, self.step)
        if self.report and figures:
            self.report.evaluation(self.step, figures)

    def _export(self, folder: Path) -> None:
        """Writes the model into `folder`, which then reads like a run folder; with `train.ema`, two of them."""
        models, error = {MODEL_FILE: self._whole()}, None
        if self.ema and type(self.stage).evaluate is not Stage.evaluate:
            models = {MODEL_FILE: self.ema.module, "model-raw.safetensors": self._whole()}
        elif self.ema:
            models["model-ema.safetensors"] = self.ema.module
        if self.main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for name, model in models.items():
                    with atomic_replace(folder / name) as path:
                        self.stage.export(model.eval(), path)
                if folder == self.out:
                    mark_finished(self.out, self.recipe_text, {"step": self.step, "skipped": self.skipped})
            except OSError as caught:
                error = caught
        if self._anywhere(error is not None):  # and no process goes on before the files are there
            reason = (error.strerror or error) if error else ELSEWHERE
            raise UserError(
                f"{folder}: the trained model could not be written ({reason}); "
                "the last checkpoint is intact: make room and start the same command again"
            ) from error
        self.model.train()


def _accelerator(stage: Stage, config: TrainConfig) -> Accelerator:
    gpu = torch.accelerator.is_available()
    if config.precision == "fp16" and not gpu:  # accelerate would compute in float32 without a word
        raise UserError("train.precision=fp16: needs a GPU, there is none; use bf16 or fp32")
    precision = "no" if config.precision == "fp32" else config.precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # accelerate holds one precision per process; a bench may train with two
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=not gpu,  # without it, processes on CPUs would not find each other
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=stage.find_unused)],
        )
    except ValueError as error:
        if config.precision == "fp32":
            raise
        raise UserError(f"train.precision={config.precision}: not on this device ({error}); try fp32") from error
    if accelerator.num_processes > 1:
        atexit.register(leave_group)
    return accelerator


def process_state() -> PartialState:
    """This process among those of a torchrun, and its device."""
    # without `cpu`, processes on CPUs would not find each other
    return PartialState(cpu=not torch.accelerator.is_available())


def leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _load(module: nn.Module, weights: dict[str, Tensor], expected: Iterable[str], path: Path) -> None:
    missing, unknown = sorted(set(expected) - weights.keys()), sorted(weights.keys() - set(expected))
    now = module.state_dict()
    shapes = [name for name in weights.keys() & now.keys() if weights[name].shape != now[name].shape]
    if missing or unknown or shapes:
        raise UserError(
            f"{path}: does not fit this model: missing {missing}, unknown {unknown}, other shape {sorted(shapes)}; "
            "choose another out"
        )
    module.load_state_dict(weights, strict=False)


def _to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of a dataclass, list, dict or tensor moved to the device; the rest as it is."""
    if not dataclasses.is_dataclass(batch):
        return send_to_device(batch, device, non_blocking=True)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **send_to_device(fields, device, non_blocking=True))


def _seed(*parts: int | str) -> None:
    seed = rng.seed_for(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _local(value: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP may have spread."""
    return value.to_local() if hasattr(value, "to_local") else value


def _whole_tensor(value: Tensor) -> Tensor:
    """All of a tensor that FSDP may have spread."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
