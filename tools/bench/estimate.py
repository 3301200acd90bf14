"""`addp bench estimate=true`: the time, GPU-hours and price of every step and of the whole, before anything starts.

The speed of each command is measured here for a few seconds (tools/bench/measuring.py), or given in `estimate.img_s`;
commands that differ in what they compute but not in how fast are measured once. How much there is to do follows from
the recipes and the datasets (tools/bench/workload.py).
"""

import heapq
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.files import write_atomically
from addp_core.base.tables import markdown_table, text_table
from tools.bench import sweep
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.devices import DeviceShares, visible_devices
from tools.bench.measuring import Meter, Speed
from tools.bench.recipe import PRETRAIN, BenchRecipe
from tools.bench.results import hardware
from tools.bench.step import Step
from tools.bench.workload import PHASES, Workload, Workloads

log = logging.getLogger("addp")

JSON_FILE, MARKDOWN_FILE = "estimate.json", "estimate.md"
NONE = "-"


@dataclass
class StepEstimate:
    """What a step will take.

    Attributes:
        name: The step's.
        runs: Number of trainings or evaluations.
        amounts: Phase -> images of all runs.
        rates: Phase -> images per second of a run.
        waves: Seconds of each run, in groups: all runs of one are done before the next one begins.
        start_up: Seconds that a command takes to start.
        notes: What a reader has to know.
        problem: Why nothing is known of it, "" if it is.
    """

    name: str
    runs: int = 0
    amounts: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    waves: list[list[float]] = field(default_factory=list)
    start_up: float = 0.0
    notes: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def run_seconds(self) -> float:
        """The seconds of all runs, one after the other."""
        return sum(map(sum, self.waves))

    def seconds(self, jobs: int) -> float:
        """Return the seconds from its start to its end, with so many runs at a time."""
        return sum(_makespan(wave, jobs) for wave in self.waves)


class SpeedSource(Protocol):
    """Where the speeds come from."""

    def speed(self, work: Workload, step: Step) -> Speed:
        """Return the speed of a step's command. Raises UserError if it is not known."""
        ...


def check_given_speeds(img_s: Mapping[str, float]) -> None:
    """Raise UserError if a key of `estimate.img_s` is no benchmark, or no phase of one."""
    names = [PRETRAIN, *BENCHMARKS]
    known = [*names, *(f"{name}.{phase}" for name in names for phase in PHASES)]
    for key in img_s:
        if key not in known:
            expected = f"a benchmark ({', '.join(names)}), alone or with a phase ({', '.join(PHASES)})"
            raise UserError(f"estimate.img_s: found {key!r}, expected {expected}{did_you_mean(key, known)}")


class GivenSpeeds:
    """The speeds of `estimate.img_s`."""

    def __init__(self, img_s: Mapping[str, float]):
        self.img_s = img_s

    def speed(self, work: Workload, step: Step) -> Speed:
        name = step.benchmark
        rates: dict[str, float] = {}
        notes: list[str] = []
        for phase in work.amounts:
            if rate := self.img_s.get(f"{name}.{phase}"):
                rates[phase] = rate
            elif phase not in PHASES:
                notes.append(f"without its {phase}, whose speed only a measurement shows")
            elif rate := self.img_s.get(name):
                rates[phase] = rate
                if phase != work.main_phase:
                    notes.append(f"{phase} at the given speed of {name}; {name}.{phase} gives its own")
        if work.main_phase not in rates:
            raise UserError(f"estimate.img_s has no {name}: add its images per second")
        return Speed(rates, notes=notes)


class MeasuredSpeeds:
    """Speeds measured here, once for all commands that work equally fast.

    Args:
        meter: that measures.
        scale: the number by which a run on `estimate.gpus` is faster than what is measured.
    """

    def __init__(self, meter: Meter, scale: float):
        self.meter, self.scale = meter, scale
        self.measured: dict[tuple[object, ...], Speed | UserError] = {}
        self.stand_ins: dict[str, Path] = {}  # path of a model that a step will train -> one that has been measured

    def speed(self, work: Workload, step: Step) -> Speed:
        arm = step.arm
        key = (work.speed, "" if step.benchmark == PRETRAIN else arm.random_digest)  # the architecture
        if key not in self.measured:
            log.info("%s: measuring addp %s", step.name, work.verb)
            try:
                self.measured[key] = self.meter.measure(work, self.stand_ins, arm.parameters)
            except UserError as error:
                self.measured[key] = error
        speed = self.measured[key]
        if isinstance(speed, UserError):
            raise speed
        if speed.model:
            trained = [sweep.best_run(step.folder / arm.name, seed) for seed in step.seeds] if step.trials else []
            trained += [Path(each.removeprefix("out=")) for each in work.arguments if each.startswith("out=")]
            self.stand_ins |= {str(path): speed.model for path in trained}
        return Speed({phase: rate * self.scale for phase, rate in speed.rates.items()}, speed.start_up, speed.notes)


def print_estimate(recipe: BenchRecipe, steps: Sequence[Step]) -> None:
    """Estimate steps that are to be done, print the table and write it to estimate.json and estimate.md."""
    wanted, processes, has_gpu = recipe.estimate, recipe.bench.processes, bool(visible_devices())
    gpus, origin = wanted.gpus or processes, "speeds as given in estimate.img_s"
    if wanted.img_s:
        estimates = estimate_steps(steps, GivenSpeeds(wanted.img_s))
    else:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="addp-estimate-") as scratch:
            meter = Meter(Path(scratch), wanted.seconds, processes, has_gpu)
            estimates = estimate_steps(steps, MeasuredSpeeds(meter, gpus / processes))
        origin = f"measured on {hardware()}, load average {load:.1f} before and {os.getloadavg()[0]:.1f} after"
        if gpus != processes:
            origin += f", with {_count(processes, 'process', 'processes')}: {gpus} are taken to be faster in proportion"
    on_gpu = has_gpu or bool(wanted.gpus or wanted.img_s)
    # without a GPU, runs at the same time share the cores, and each takes longer
    jobs = DeviceShares(recipe.jobs, processes).jobs if has_gpu else (recipe.jobs or 1) if on_gpu else 1
    bench = BenchEstimate(estimates, gpus, jobs, on_gpu, recipe.price_per_hour, origin)
    out = Path(recipe.out)
    write_atomically(out / JSON_FILE, (json.dumps(bench.content(), indent=1) + "\n").encode())
    rows, lines = bench.rows(), bench.lines()
    markdown = f"{markdown_table(rows)}\n" + "".join(f"\n{line}\n" for line in lines)
    write_atomically(out / MARKDOWN_FILE, markdown.encode())
    sys.stdout.write(text_table(rows) + "".join(f"{line}\n" for line in lines) + f"{out / MARKDOWN_FILE}\n")


def estimate_steps(steps: Sequence[Step], speeds: SpeedSource) -> list[StepEstimate]:
    """Return what each step will take; of one whose cost is not known, why not."""
    workloads, estimates = Workloads(), []
    for step in steps:
        estimate = StepEstimate(step.name)
        try:
            for wave in _commands(step):
                estimate.waves.append([])
                for arguments in wave:
                    if work := workloads.of(arguments, step.benchmark):
                        _add(estimate, work, speeds.speed(work, step))
                    else:  # it starts, and has next to nothing to do
                        estimate.waves[-1].append(estimate.start_up)
            if step.trials:  # the sweep itself, and what follows it
                estimate.waves += [[estimate.start_up] for _ in step.commands]
        except UserError as error:
            estimate = StepEstimate(step.name, problem=str(error))
        estimates.append(estimate)
    return estimates


def _commands(step: Step) -> list[list[list[str]]]:
    """Return the arguments of the runs of a step that are to be done, in groups that follow each other."""
    if step.trials is None:
        commands = [command.arguments for command in step.commands]
        return [[each] for each in commands] if step.in_sequence else [commands]
    pending = [arguments for _, arguments in sweep.pending_commands(step.trials)]
    if sweep.has_one_point(step.trials):
        return [pending]
    first = f"{step.trials.seed_key}={step.seeds[0]}"
    return [[each for each in pending if first in each], [each for each in pending if first not in each]]


def _add(estimate: StepEstimate, work: Workload, speed: Speed) -> None:
    """Add a run."""
    seconds = speed.start_up
    for phase, amount in work.amounts.items():
        if rate := speed.rates.get(phase):
            estimate.amounts[phase] = estimate.amounts.get(phase, 0.0) + amount
            estimate.rates[phase] = rate
            seconds += amount / rate
    if work.main_phase not in speed.rates:
        raise UserError("; ".join(speed.notes))
    estimate.runs += 1
    estimate.start_up = speed.start_up
    estimate.waves[-1].append(seconds)
    estimate.notes += [note for note in speed.notes if note not in estimate.notes]


def _makespan(durations: Sequence[float], jobs: int) -> float:
    """Return when the last of some runs ends, if each begins as soon as one of `jobs` places is free."""
    ends = [0.0] * jobs
    for duration in durations:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


@dataclass
class BenchEstimate:
    """The estimates of all steps, as a table and as JSON.

    Attributes:
        steps: In the order in which they run.
        gpus: GPUs, or processes, of each run.
        jobs: Runs at a time within a step.
        on_gpu: Whether `gpus` counts GPUs.
        price: Of an hour of the machine, None if it is not known.
        origin: Where the speeds come from.
    """

    steps: Sequence[StepEstimate]
    gpus: int
    jobs: int
    on_gpu: bool
    price: float | None
    origin: str

    def rows(self) -> list[list[str]]:
        """Return the table: a line for each phase of each step, and the sum."""
        head = ["step", "runs", "phase", "images", "img/s", "time", "GPU-hours" if self.on_gpu else "process hours"]
        rows = [head + (["price"] if self.price else [])]
        for step in self.steps:
            if step.problem:
                rows.append([step.name] + [NONE] * (len(rows[0]) - 1))
                continue
            costs = self._costs(step.seconds(self.jobs), step.run_seconds)
            for number, phase in enumerate(step.amounts):
                amount, rate = step.amounts[phase], step.rates[phase]
                about = ["", "", phase] if number else [step.name, str(step.runs), phase]
                count = [f"{amount:,.0f}", f"{rate:.3g}"] if phase in PHASES else ["", ""]
                rows.append([*about, *count, *(costs if number == 0 else [""] * len(costs))])
        rows.append(["all", str(sum(step.runs for step in self.steps)), "", "", "", *self._costs(*self._totals())])
        return rows

    def lines(self) -> list[str]:
        """Return what the table does not say."""
        said: dict[str, list[str]] = {}
        for step in self.steps:
            for text in [f"cannot be estimated: {step.problem}"] if step.problem else step.notes:
                said.setdefault(text, []).append(step.name)
        lines = [f"{', '.join(names)}: {text}" for text, names in said.items()]
        if unknown := sum(bool(step.problem) for step in self.steps):
            lines.append(f"all: without {unknown} of {len(self.steps)} steps")
        each = _count(self.gpus, "GPU", "GPUs") if self.on_gpu else _count(self.gpus, "process", "processes")
        lines.append(f"time: {each} for each run, {_count(self.jobs, 'run', 'runs')} at a time")
        return [*lines, self.origin]

    def content(self) -> dict[str, Any]:
        """Return the content of estimate.json."""
        seconds, run_seconds = self._totals()
        return {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "origin": self.origin,
            "gpus": self.gpus if self.on_gpu else None,
            "jobs": self.jobs,
            "price_per_hour": self.price,
            "seconds": round(seconds, 1),
            "hours_of_gpus_or_processes": run_seconds * self.gpus / 3600,
            "steps": [self._entry(step) for step in self.steps],
        }

    def _entry(self, step: StepEstimate) -> dict[str, Any]:
        if step.problem:
            return {"name": step.name, "problem": step.problem}
        phases = {name: {"images": step.amounts[name], "img_s": step.rates[name]} for name in step.amounts}
        seconds, hours = step.seconds(self.jobs), step.run_seconds * self.gpus / 3600
        entry = {"name": step.name, "runs": step.runs, "phases": phases, "seconds": round(seconds, 1)}
        return entry | {"hours_of_gpus_or_processes": hours, "notes": step.notes}

    def _totals(self) -> tuple[float, float]:
        return sum(step.seconds(self.jobs) for step in self.steps), sum(step.run_seconds for step in self.steps)

    def _costs(self, seconds: float, run_seconds: float) -> list[str]:
        """Return the cells of time, GPU-hours and, if it is known, price."""
        minutes, rest = divmod(round(seconds), 60)
        cells = [f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}", f"{run_seconds * self.gpus / 3600:.3g}"]
        return cells + ([f"{seconds / 3600 * self.price:.2f}"] if self.price else [])
