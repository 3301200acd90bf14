"""`addp bench`: every benchmark from one or several checkpoints, to one table and one report.

A step is one benchmark of one start (an arm): `out/<benchmark>/<arm>/`, whose log.txt holds what its commands wrote.
Transfers run as `addp sweep`, beside the same start with random weights (`random`). What a step depends on is
remembered: a second start of the same command does what is missing or changed, and nothing else. A step that fails does
not stop the others; results that no longer hold are moved to `out/before`, never removed.

bench.only=det,seg or bench.only=[det/addp] does a part. bench.launch=print shows the commands; bench.launch=slurm
submits a job a step, and one for the report at the end. Data sets whose path is empty are left out.
"""

import contextlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen

import addp_core
from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.files import write_atomically
from addp_core.recipes.config import dump
from addp_core.training.run_folder import lock, release_out
from tools import doctor
from tools.bench.children import ADDP, Children, Stopped, ending
from tools.bench.inputs import Arm, check_packages, open_arms, open_sets
from tools.bench.report import write_report
from tools.bench.steps import BENCHMARKS, LOG, STEP, Evaluation, Step, Transfer, make_ready, plan, scores

log = logging.getLogger("addp")

REPORT = "bench.json"
ERROR = 1000  # characters of a failed step's last line
NAME = re.compile(r"[\w.+-]+")
WHOSE = re.compile(r"--(account|partition|qos|reservation|clusters|wckey|time)\b|-[ApqMt]")
VERSIONS = ("torch", "torchvision", "timm", "accelerate", "torch_fidelity", "pycocotools", "detectron2", "mmseg")


@dataclass
class Data:
    """Where the data sets lie; the benchmarks of those left empty are left out."""

    imagenet: Annotated[str, "train/<class>/ and val/<class>/: generation, finetune, linprobe, robustness"] = ""
    imagenet_a: Annotated[str, "ImageNet-A"] = ""
    imagenet_r: Annotated[str, "ImageNet-R"] = ""
    sketch: Annotated[str, "ImageNet-Sketch"] = ""
    imagenet_c: Annotated[str, "ImageNet-C"] = ""
    coco: Annotated[str, "COCO's folder: det"] = ""
    ade20k: Annotated[str, "ADE20K's folder (ADEChallengeData2016): seg"] = ""


@dataclass
class Launch:
    """Which steps, where and how."""

    only: Annotated[list[str] | str, "benchmarks or steps, as in det,seg or [det/addp]; none: all"] = field(
        default_factory=list
    )
    launch: Annotated[
        Literal["local", "print", "slurm"], "run them here, print their commands, or submit a job for each"
    ] = "local"
    sbatch: Annotated[
        list[str],
        "options of each job, as in ['--gres=gpu:8','--time=24:00:00']; of these the report takes "
        "account, partition and the like",
    ] = field(default_factory=list)
    processes: Annotated[int, Ge(1), "of each training and evaluation, by torchrun"] = 1
    share: Annotated[bool, "other starts may do other steps of this bench meanwhile, as Slurm's jobs do"] = False

    def __post_init__(self) -> None:
        if isinstance(self.only, str):
            self.only = [name.strip() for name in self.only.split(",") if name.strip()]


@dataclass
class Recipe:
    """Keys of `addp bench`."""

    out: Annotated[str, "folder for the steps, bench.json, report.html and report.md"] = "runs/bench"
    model: Annotated[str, "short for models={addp: ...}"] = ""
    models: Annotated[dict[str, str], "name -> a run, a file or hf://owner/repository/file: rows beside each other"] = (
        field(default_factory=dict)
    )
    random: Annotated[bool, "also train from random weights: the first model's architecture, the same settings"] = True
    data: Data = field(default_factory=Data)
    seeds: Annotated[list[int], MinLen(1), "of every transfer; the first one tries the grid"] = field(
        default_factory=lambda: [0]
    )
    jobs: Annotated[int, Ge(1), "runs at a time within a step"] = 1
    price_per_hour: Annotated[float | None, Ge(0), "of this machine, for the report"] = None
    bench: Launch = field(default_factory=Launch)
    generation: Evaluation = field(default_factory=Evaluation)
    finetune: Transfer = field(default_factory=Transfer)
    linprobe: Transfer = field(default_factory=Transfer)
    robustness: Evaluation = field(default_factory=Evaluation)
    det: Transfer = field(default_factory=Transfer)
    seg: Transfer = field(default_factory=Transfer)

    def __post_init__(self) -> None:
        if self.model and self.models:
            raise ValueError(f"model: found {self.model!r} and models too, expected one of them")
        if self.model:
            self.models, self.model = {"addp": self.model}, ""
        for name in self.models:
            if not NAME.fullmatch(name) or name == "random":
                raise ValueError(f"models: {name!r}, expected a name of letters, digits, . + - _, other than random")


def run(recipe: Recipe) -> None:
    """Check everything, then do what is missing. Leaves with 1 where a step failed or a signal stopped it."""
    if recipe.bench.launch == "slurm" and shutil.which("sbatch") is None:
        raise UserError("bench.launch=slurm: no sbatch on the PATH; expected a machine of a Slurm cluster, or local")
    bench = Bench(recipe)
    chosen = bench.chosen()
    out = bench.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock(out, shared=recipe.bench.share)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); choose another folder") from error
    try:
        if not recipe.bench.share:
            whole = replace(recipe, bench=replace(recipe.bench, only=[]))
            write_atomically(out / "recipe.yaml", dump(whole).encode())
        bench.inputs.write()
        for reason, names in bench.left_out().items():
            log.info("left out: %s (%s)", ", ".join(names), reason)
        todo = [step for step in chosen if not step.done]
        log.info("%d steps, %d of them finished before", len(chosen), len(chosen) - len(todo))
        if recipe.bench.launch == "local":
            bench.do(todo)
            return
        for step in todo:
            get_ready(step)
    finally:
        release_out(out)
    if recipe.bench.launch == "print":
        sys.stdout.write(commands(todo))
    else:
        submit(recipe, todo)


class Bench:
    """The steps of a recipe, all of whose inputs were looked at. UserError where something is wrong with them."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.out = recipe, Path(recipe.out)
        if not recipe.models:
            raise UserError("models: none given; expected model=<run or file>, or models={name: <run or file>, ...}")
        arms = [*recipe.models, *(["random"] if recipe.random else [])]
        known = [*BENCHMARKS, *(f"{benchmark}/{arm}" for benchmark in BENCHMARKS for arm in arms)]
        for name in recipe.bench.only:
            if name not in known:
                near = did_you_mean(name, known)
                expected = f"benchmarks ({', '.join(BENCHMARKS)}) or steps (as det/{arms[0]})"
                raise UserError(f"bench.only: found {name!r}, expected {expected}{near}")
        wanted = {name.split("/")[0] for name in recipe.bench.only} or set(BENCHMARKS)
        self.inputs = open_sets(recipe, wanted)
        self.arms: list[Arm] = open_arms(recipe.models, recipe.random)
        self.steps = plan(recipe, self.arms, self.inputs)
        check_packages({step.benchmark for step in self.chosen()})

    def chosen(self) -> list[Step]:
        """What bench.only names, with what it needs, in an order in which it can be done."""
        only = self.recipe.bench.only
        names: dict[str, None] = {}

        def add(step: Step) -> None:
            for needed in step.needs:
                add(self.steps[needed])
            names.setdefault(step.name)

        for step in self.steps.values():
            if not only or step.benchmark in only or step.name in only:
                if not step.left_out:
                    add(step)
                elif step.name in only or (step.benchmark in only and step.left_out.startswith("data.")):
                    raise UserError(f"bench.only: {step.name} cannot be done: {step.left_out}")
        if not names:
            reason = next(iter(self.left_out()))
            raise UserError(f"nothing to do: {reason}; expected at least one set, as in data.imagenet=<folder>")
        return [self.steps[name] for name in names]

    def left_out(self) -> dict[str, list[str]]:
        """Why -> the names of steps."""
        found: dict[str, list[str]] = {}
        for step in self.steps.values():
            if step.left_out:
                found.setdefault(step.left_out, []).append(step.name)
        return found

    def do(self, todo: list[Step]) -> None:
        """Run the steps here, each where what it needs is done; a report after each, the table at the end."""
        failed: list[str] = []
        try:
            with Children() as children:
                for number, step in enumerate(todo, 1):
                    log.info("%s, step %d of %d%s", step.name, number, len(todo), self._eta(todo[number - 1 :]))
                    missing = next((name for name in step.needs if not self.steps[name].done), None)
                    if missing:
                        self._write(step, state="blocked", error=f"blocked by {missing}")
                    else:
                        self._run(step, children)
                    note = step.note()
                    if note["state"] == "done":
                        log.info("%s: done in %.0f s: %s", step.name, note["seconds"], in_short(note["scores"]))
                        for line in note.get("notes", []):
                            log.warning("%s: %s", step.name, line)
                    else:
                        failed.append(step.name)
                        log.warning("%s: %s: %s", step.name, note["state"], note["error"])
                    self.report()
        except Stopped:
            self.report()
            sys.stdout.write(self.table())
            log.warning("stopped; the same command continues")
            raise SystemExit(1) from None
        path = self.report()
        sys.stdout.write(f"{self.table()}\n{path}\n")
        if failed:
            log.error(
                "%d of %d steps failed: %s; see %s", len(failed), len(todo), ", ".join(failed), self._logs(failed)
            )
            raise SystemExit(1)

    def _logs(self, failed: Sequence[str]) -> str:
        ran = [name for name in failed if self.steps[name].note()["state"] == "failed"]
        return ", ".join(str(self.out / name / LOG) for name in ran)

    def _run(self, step: Step, children: Children) -> None:
        if self.recipe.bench.share:
            claim(step)
        else:
            get_ready(step)
        before = step.note().get("seconds", 0.0)
        start = time.monotonic()

        def spent() -> float:
            return round(before + time.monotonic() - start, 1)

        state, found = "failed", {}
        try:
            error = self._commands(step, children)
            if not error:
                state, found = "done", scores(step)
        except Stopped:
            self._write(step, state="stopped", error="stopped by a signal", seconds=spent())
            raise
        except (OSError, KeyError, ValueError, TypeError) as problem:  # a command that left no figures behind
            error = f"no figures: {type(problem).__name__}: {problem}"
        finally:
            if self.recipe.bench.share:
                release_out(step.folder)
        self._write(step, state=state, error=error, seconds=spent(), **found)

    def _commands(self, step: Step, children: Children) -> str:
        """Run them, `jobs` at a time where none needs another one; the last words of the first that failed, or ""."""
        jobs = 1 if step.training else self.recipe.jobs

        def run(number: int) -> str:
            words, log_file = step.commands[number], step.folder / (LOG if jobs == 1 else f"{number}-{LOG}")
            try:
                code = children.addp(words, log_file, step.shared(words))
                signalled = f"signal {-code}: " if code < 0 else ""
                return (signalled + ending(log_file))[-ERROR:] if code else ""
            finally:
                if jobs > 1 and log_file.exists():  # one log a step, in which every command's lines are together
                    with (step.folder / LOG).open("ab") as whole:
                        whole.write(log_file.read_bytes())
                    log_file.unlink()

        numbers = range(len(step.commands))
        if jobs == 1:
            return next(filter(None, map(run, numbers)), "")
        with ThreadPoolExecutor(jobs) as pool:
            return next(filter(None, list(pool.map(run, numbers))), "")

    def _write(self, step: Step, **news: Any) -> None:
        step.folder.mkdir(parents=True, exist_ok=True)
        note = {"state": "missing", "error": "", "seconds": 0.0, "scores": {}, **news}
        note |= {"basis": step.basis_digest, "fingerprint": step.fingerprint, "commands": step.lines}
        note |= {"finished": datetime.now(timezone.utc).isoformat(timespec="seconds"), "hardware": hardware()}
        write_atomically(step.folder / STEP, json.dumps(note, indent=1).encode())

    def _eta(self, todo: Sequence[Step]) -> str:
        """How long the steps may take, by what their benchmark took for other arms."""
        took: dict[str, list[float]] = {}
        for step in self.steps.values():
            if step.done:
                took.setdefault(step.benchmark, []).append(step.note()["seconds"])
        known = [statistics.mean(took[step.benchmark]) for step in todo if step.benchmark in took]
        if not known:
            return ""
        sign = "" if len(known) == len(todo) else "more than "
        return f", eta {sign}{time.strftime('%H:%M:%S', time.gmtime(sum(known)))}"

    # what is there

    def report(self) -> Path:
        """Write bench.json, report.html and report.md from what the steps left; the path of report.html."""
        with alone(self.out):
            write_atomically(self.out / REPORT, json.dumps(self.content(), indent=1).encode())
            return write_report(self.out)

    def content(self) -> dict[str, Any]:
        """bench.json."""
        steps, chance = [], {}
        machines = []
        for step in self.steps.values():
            note = step.note()
            entry = {"name": step.name, "benchmark": step.benchmark, "arm": step.arm.name, "state": "missing"}
            entry |= {"error": "", "seconds": 0.0, "finished": "", "commands": step.lines, "folder": step.name}
            entry |= {"log": f"{step.name}/{LOG}", "setting": {}, "seeds": step.seeds, "scores": {}, "pictures": []}
            if step.left_out:
                entry |= {"state": "left out", "error": step.left_out}
            elif note.get("fingerprint") == step.fingerprint:
                entry |= {key: value for key, value in note.items() if key not in ("basis", "fingerprint", "chance")}
                if note["state"] not in ("done", "failed", "blocked"):
                    entry["state"] = "missing"
                if note["state"] == "done":
                    chance.setdefault(step.benchmark, {}).update(note["chance"])
                    machines.append(note["hardware"])
            steps.append(entry)
        return {
            "recipe": dump(self.recipe),
            "versions": versions(),
            "hardware": "; ".join(dict.fromkeys(machines)) or hardware(),
            "arms": {arm.name: arm.about() for arm in self.arms},
            "steps": steps,
            "chance": chance,
        }

    def table(self) -> str:
        """Rows: the arms and chance; columns: every score that there is."""
        content = self.content()
        done = [step for step in content["steps"] if step["state"] == "done"]
        columns = list(dict.fromkeys((step["benchmark"], name) for step in done for name in step["scores"]))
        lines = [["", *(f"{benchmark} {name}" for benchmark, name in columns)]]
        for arm in content["arms"]:
            of_arm = {step["benchmark"]: step["scores"] for step in done if step["arm"] == arm}
            lines.append([arm, *(spread(of_arm.get(benchmark, {}).get(name)) for benchmark, name in columns)])
        guess = content["chance"]
        cells = [guess.get(benchmark, {}).get(name) for benchmark, name in columns]
        lines.append(["chance", *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "".join("  ".join(f"{x:>{w}}" for x, w in zip(line, widths, strict=True)) + "\n" for line in lines)


def claim(step: Step) -> None:
    """`get_ready` for a folder that others may want. UserError where another process works in it."""
    step.folder.mkdir(parents=True, exist_ok=True)
    lock(step.folder)
    get_ready(step)
    release_out(step.folder)  # what was moved aside took the lock along
    lock(step.folder)


def get_ready(step: Step) -> None:
    """`make_ready`, with a word on what was moved aside; from now on step.json knows what the folder is for."""
    note = step.note()
    if aside := make_ready(step):
        log.info("%s: its inputs or settings changed: what it found before is in %s", step.name, aside)
    if aside or not note:
        empty = {"state": "missing", "error": "", "seconds": 0.0, "scores": {}}
        empty |= {"basis": step.basis_digest, "fingerprint": step.fingerprint, "commands": step.lines}
        write_atomically(step.folder / STEP, json.dumps(empty, indent=1).encode())


def spread(values: Sequence[float] | None) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "-"
    sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{sd}"


def in_short(found: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {spread(values)}" for name, values in found.items())


# -------------------- elsewhere


def commands(todo: Sequence[Step]) -> str:
    """What the steps run, as one would type it, with comments between; afterwards `addp bench` only collects."""
    lines = []
    for step in todo:
        lines.append(f"# {step.name}" + (f" (after {', '.join(step.needs)})" if step.needs else ""))
        lines += step.lines
    return "".join(f"{line}\n" for line in lines)


def submit(recipe: Recipe, todo: Sequence[Step]) -> None:
    """A job for each step, after those it needs, and one that collects them all; their numbers go to stdout."""
    jobs: dict[str, str] = {}
    out = Path(recipe.out)
    for step in todo:
        words = ["bench", str(out / "recipe.yaml"), f"bench.only=[{step.name}]", "bench.launch=local"]
        after = [jobs[name] for name in step.needs if name in jobs]
        depends = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
        script = job_script(step.folder, f"addp-{step.name}", recipe.bench.sbatch, [*words, "bench.share=true"])
        jobs[step.name] = sbatch(script, depends)
        sys.stdout.write(f"{jobs[step.name]} {step.name}\n")
    if jobs:
        script = job_script(out, "addp-report", whose(recipe.bench.sbatch), ["report", f"out={out}"])
        everything = f"--dependency=afterany:{':'.join(jobs.values())}"
        sys.stdout.write(f"{sbatch(script, [everything])} report\n")


def whose(options: Sequence[str]) -> list[str]:
    """Those options of sbatch that a job without GPUs needs too: who pays, and where and how long it may run."""
    return [option for option in options if WHOSE.match(option)]


def job_script(folder: Path, name: str, options: Sequence[str], words: Sequence[str]) -> Path:
    """Write `folder`/job.sbatch, which runs `addp <words>` from where we are now."""
    given = [f"--job-name={name.replace('/', '-')}", f"--output={folder.resolve()}/slurm-%j.txt", *options]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in given), f"cd {shlex.quote(os.getcwd())}"]
    lines.append(f"exec {shlex.join([*ADDP, *words])}")
    path = folder / "job.sbatch"
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def sbatch(script: Path, options: Sequence[str]) -> str:
    """The number of the job. UserError where Slurm refuses it."""
    done = subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench.sbatch: {script}: sbatch says: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().split(";")[0]  # with the cluster's name behind it, where there are several


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """One writer of the report at a time, among those that share the folder; the others wait."""
    folder = out / "inputs"
    folder.mkdir(exist_ok=True)
    for _ in range(600):
        try:
            lock(folder)
            break
        except UserError:
            time.sleep(0.1)
    try:
        yield
    finally:
        release_out(folder)


# -------------------- about this machine


def versions() -> dict[str, str]:
    found = {"addp": addp_core.__version__, "python": platform.python_version()}
    for module in VERSIONS:
        if version := doctor.installed_version(doctor.PACKAGES[module]):
            found[module] = version
    return found


def hardware() -> str:
    """The GPUs, or the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{name} x{names.count(name)}" for name in dict.fromkeys(names))
    cores = doctor.machine()["cores"]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"model name\s*: (.*)", text):
            return f"{found[1].strip()}, {cores} cores"
    return f"{platform.processor() or platform.machine()}, {cores} cores"
