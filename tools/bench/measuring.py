"""How fast a command of a bench works here: it runs for a few seconds in a scratch folder and is then stopped."""

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from addp_core.base.errors import UserError
from addp_core.base.paths import METRICS_FILE
from addp_core.training.curves import read_metrics
from addp_core.training.pace import FEATURES, PACE_FILE, SAMPLING, VALIDATION, Mark, read_pace
from addp_core.training.run_folder import INTERMEDIATE_MODELS
from addp_core.weights.files import MODEL_FILE
from tools import children
from tools.bench.arguments import as_arguments
from tools.bench.workload import TRAINING, Workload
from tools.children import TORCHRUN, last_lines, launch

NEVER = 10**9  # steps, images
FEWEST_STEPS = 3  # of training that are timed, with the first one, which warms up
PATIENCE = 900.0  # seconds to wait until a command has shown its speed
POLL = 0.1  # seconds
CPU_STEP_FLOP = 4e11  # of a training step that a CPU does in a few seconds
PATCH = 16  # pixels
LONGEST = 60.0  # seconds to wait for the next phase
STOPPING = 120.0  # seconds for several processes to stop
RUN, LOG, PACE = "run", "log.txt", "pace.jsonl"  # in the folder of a measurement


@dataclass
class Speed:
    """How fast a command works.

    Attributes:
        rates: Phase -> images per second.
        start_up: Seconds from the start of its process to the first image.
        notes: What a reader has to know of the measurement.
        model: What it has trained, a stand-in for the model of the whole run; None if it trains none.
    """

    rates: dict[str, float]
    start_up: float = 0.0
    notes: list[str] = field(default_factory=list)
    model: Path | None = None


class Meter:
    """Measures commands, each in a folder of its own below `scratch`.

    Args:
        scratch: an existing folder.
        seconds: how long each phase is timed.
        processes: of each command.
        on_gpu: whether the commands have GPUs; without one, a training step takes fewer images.
    """

    def __init__(self, scratch: Path, seconds: float, processes: int, on_gpu: bool):
        self.scratch, self.seconds, self.processes, self.on_gpu = scratch, seconds, processes, on_gpu
        self._number = 0

    def measure(self, work: Workload, stand_ins: Mapping[str, Path], parameters: int | None) -> Speed:
        """Return how fast a command works.

        stand_ins: path of a model that does not exist yet -> one of the same architecture.
        parameters: of its encoder.
        Raises UserError, with the last line of its log, if the command fails.
        """
        arguments = [_with_stand_in(argument, stand_ins) for argument in work.arguments]
        if TRAINING in work.amounts:
            return self._measure_training(work, arguments, parameters)
        if SAMPLING in work.amounts:
            return self._measure_generation(work, arguments)
        child = self._run(arguments, {}, list(work.amounts))
        return Speed(child.rates, child.start_up, child.notes)

    def _measure_training(self, work: Workload, arguments: Sequence[str], parameters: int | None) -> Speed:
        """Time its steps in one run, and its validation in another one that begins with it."""
        train, smallest, notes = work.recipe.train, 2 * self.processes, []  # mixing and batch norms need two images
        batch = train.batch // train.accumulate
        if not self.on_gpu and parameters:
            batch = min(batch, max(smallest, _affordable_batch(parameters, work.recipe)))
        if batch != train.batch:
            notes.append(f"measured with {batch} images a step instead of {train.batch}")
        settings: dict[str, Any] = {"train.accumulate": 1, "train.checkpoint_every": 0, "train.log_every": 1}
        settings["train.trackers"] = []  # nobody follows what is measured
        endless = {**settings, "train.batch": batch, "train.steps": NEVER, "train.evaluate_every": NEVER}
        steps = self._run(arguments, endless, [TRAINING], batch)
        short = {**settings, "train.batch": smallest, "train.steps": 2, "train.evaluate_every": 1}
        exports = {"train.export_every": 1} if hasattr(train, "export_every") else {}
        validation = self._run(arguments, short | exports, [VALIDATION] if VALIDATION in work.amounts else [])
        rates, notes = steps.rates | validation.rates, notes + steps.notes + validation.notes
        return Speed(rates, steps.start_up, notes, validation.model)

    def _measure_generation(self, work: Workload, arguments: Sequence[str]) -> Speed:
        """Time `addp generate` with the setting of the fewest steps, and the features of the reference."""
        from gen.evaluate import sampling_settings

        settings = [each for each in sampling_settings(work.recipe).values() if each is not None]
        sampling = min(settings, key=lambda each: each.steps)
        keys = ("batch", "precision", "tokenizer", "encoder_heads", "decoder_heads")
        fixed = {key: value for key in keys if (value := getattr(work.recipe, key)) not in ("", None)}
        fixed |= {f"sampling.{key}": value for key, value in vars(sampling).items()} | {"n": NEVER // 10**4}
        if not self.on_gpu:  # a CPU generates the images of a batch one by one
            fixed["batch"] = 1
        model = next(each for each in arguments if each.startswith("model="))
        samples = self._run(["generate", model, *as_arguments(fixed)], {}, [SAMPLING])
        features = self._run(arguments, {"cache": self.scratch / f"cache{self._number}"}, [FEATURES])
        notes = samples.notes + features.notes
        if len(settings) > 1:
            notes.append(f"sampling measured with {sampling.steps} steps, other numbers of steps in proportion")
        return Speed(samples.rates | features.rates, features.start_up, notes)

    def _run(
        self, arguments: Sequence[str], settings: Mapping[str, Any], phases: Sequence[str], batch: int = 0
    ) -> "_Child":
        """Run a command with other settings until every phase has shown its speed (without any: to its end).

        batch: images of a training step.
        Raises UserError if it fails.
        """
        self._number += 1
        out = self.scratch / str(self._number)
        out.mkdir()
        changed = as_arguments({**settings, "out": out / RUN})
        keys = {argument.partition("=")[0] for argument in changed}
        kept = [argument for argument in arguments if argument.partition("=")[0] not in keys]
        prefix = children.ADDP if self.processes == 1 else [*TORCHRUN, str(self.processes), "-m", "addp_core"]
        child = _Child(out, phases, self.seconds, batch)
        with (out / LOG).open("w") as file:
            process = launch([*prefix, *kept, *changed], file, {**os.environ, PACE_FILE: str(out / PACE)})
            try:
                child.watch(process)
            finally:
                _stop(process, self.processes)
        if child.ended and process.returncode and not child.complete:
            raise UserError(_reason(process.returncode, out / LOG))
        return child


class _Child:
    """A command that is being measured; `rates` and `start_up` as in `Speed`."""

    def __init__(self, out: Path, phases: Sequence[str], seconds: float, batch: int):
        self.out, self.phases, self.seconds, self.batch = out, phases, seconds, batch
        self.rates: dict[str, float] = {}
        self.timed: dict[str, float] = {}  # phase -> seconds
        self.start_up = 0.0
        self.complete = False  # whether every phase has been timed for long enough
        self.ended = False  # whether the command has ended by itself

    def watch(self, process: "subprocess.Popen[bytes]") -> None:
        """Wait until all phases have been timed, the command has ended, or patience has."""
        began = time.time()
        while not self.complete and time.time() < began + PATIENCE:
            self.ended = process.poll() is not None
            if TRAINING in self.phases:
                self._look_at_steps(began)
            else:
                self._look_at_marks(began)
            if self.ended:
                break
            time.sleep(POLL)

    @property
    def notes(self) -> list[str]:
        """What has not been measured."""
        return [f"no speed of its {phase} has shown" for phase in self.phases if phase not in self.rates]

    @property
    def model(self) -> Path | None:
        """The first model that the command has written."""
        folders = [*sorted((self.out / RUN / INTERMEDIATE_MODELS).glob("step-*")), self.out / RUN]
        return next((folder for folder in folders if (folder / MODEL_FILE).exists()), None)

    def _look_at_steps(self, began: float) -> None:
        lines = read_metrics(self.out / RUN / METRICS_FILE)
        steps = [self.batch / line["img_s"] for line in lines if line.get("img_s")]  # seconds
        if steps and not self.start_up:
            self.start_up = max(0.0, time.time() - began - sum(steps))
        if len(steps) >= FEWEST_STEPS:
            # the second half: the first step warms up, and the next ones find batches that were loaded meanwhile
            steady = steps[-(len(steps) // 2) :]
            self.rates[TRAINING], self.timed[TRAINING] = self.batch * len(steady) / sum(steady), sum(steps[1:])
            self.complete = self.timed[TRAINING] >= self.seconds

    def _look_at_marks(self, began: float) -> None:
        marks = read_pace(self.out / PACE)
        begun = [phase for phase in self.phases if any(mark.phase == phase for mark in marks)]
        if not begun:
            return
        self.start_up = max(0.0, marks[0].time - began)
        for phase in begun:
            amount, seconds = _timed([mark for mark in marks if mark.phase == phase])
            if amount:
                self.rates[phase], self.timed[phase] = amount / max(seconds, 1e-3), seconds
        over = {phase for phase in begun if marks[-1].phase != phase}  # another one has begun
        enough = all(phase in over or self.timed.get(phase, 0.0) >= self.seconds for phase in self.phases)
        late = time.time() > marks[0].time + max(LONGEST, 3 * self.seconds)  # those to come may be hours away
        self.complete = enough or (late and all(phase in self.rates for phase in begun))


def _timed(marks: Sequence[Mark]) -> tuple[float, float]:
    """Return (amount, seconds) of all passes over images, without the first batch of longer ones, which warms up."""
    passes: list[list[Mark]] = []
    for mark in marks:
        passes += [[]] if mark.amount == 0 else []
        passes[-1].append(mark)
    amount, seconds = 0.0, 0.0
    for each in passes:
        steady = each[1:] if len(each) > FEWEST_STEPS else each
        amount += sum(mark.amount for mark in steady[1:])
        seconds += steady[-1].time - steady[0].time
    return amount, seconds


def _reason(code: int, output: Path) -> str:
    """Return why a command has failed, by its exit code and its log."""
    if code == -signal.SIGKILL:
        return "the system has killed it, probably because the memory was full"
    signaled = f"signal {-code}: " if code < 0 else ""
    return signaled + last_lines(output).removeprefix("addp: ")


def _with_stand_in(argument: str, stand_ins: Mapping[str, Path]) -> str:
    """Return an argument that names a run which does not exist yet, or a model in it, with the stand-in instead."""
    key, _, value = argument.partition("=")
    run = value.partition(f"/{INTERMEDIATE_MODELS}/")[0]
    return f"{key}={stand_ins[run]}" if key != "out" and run in stand_ins and not Path(value).exists() else argument


def _affordable_batch(parameters: int, recipe: Any) -> int:
    """Return the largest power of two whose training step a CPU does in a few seconds."""
    size = recipe.data.hw if hasattr(recipe.data, "hw") else (getattr(recipe.data, "crop", 0) or recipe.data.size,) * 2
    flop = 6 * parameters * size[0] * size[1] / PATCH**2  # two for each product, once forward and twice backward
    return 2 ** max(0, int(math.log2(CPU_STEP_FLOP / flop)))


def _stop(process: "subprocess.Popen[bytes]", processes: int) -> None:
    """End a command and its data loading processes: at once, since nothing in its folder is needed."""
    if process.poll() is None and processes > 1:  # only torchrun knows its processes
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOPPING)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
