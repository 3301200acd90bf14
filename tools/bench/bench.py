"""`addp bench`: every benchmark from one or several checkpoints, to one table and one report.

An arm is one checkpoint or baseline under comparison; a step is one benchmark of one arm, with a folder of its own:
`out/<benchmark>/<arm>/`, whose log.txt holds the output of its commands. Transfers run as `addp sweep`, next to the
same architecture with random weights (the arm `random`). The bench remembers what each step depends on: the same
command again does what is missing or has changed, and nothing else. A step that fails does not stop the others; void
results are moved to `out/before`, never removed.

bench.only=det,seg or bench.only=[det/addp] does a part. bench.launch=print shows the commands; bench.launch=slurm
submits a job for each step, and one for the report at the end. A benchmark whose dataset has no path is left out.
"""

import contextlib
import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.paths import RECIPE_FILE
from addp_core.base.slurm import check_options, check_slurm, jobs_in_queue
from addp_core.base.tables import duration
from addp_core.recipes.config import dump
from addp_core.training.run_folder import lock_out, release_out
from tools.bench import pretraining
from tools.bench.arguments import errors_name
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.comparison import compare_with_paper
from tools.bench.devices import DeviceShares
from tools.bench.estimate import check_given_speeds, print_estimate
from tools.bench.plan import Plan
from tools.bench.plan import Recipe as Recipe
from tools.bench.preflight import check_networks
from tools.bench.recipe import PRETRAIN, BenchRecipe
from tools.bench.report import write_report
from tools.bench.results import BENCH, BenchResults, bench_content, mean_and_sd, summary_table, write_record
from tools.bench.slurm import KEY as SBATCH
from tools.bench.slurm import printed_commands, submit
from tools.bench.step import LOG, STEP, Step, prepare_folder
from tools.bench.sweep import pending_commands
from tools.children import Children, Stopped, last_lines

log = logging.getLogger("addp")

SUBMITTED = "bench.launch=slurm"
ERROR_LENGTH = 1000  # characters of a failed step's last line


def run(recipe: BenchRecipe) -> None:
    """Check everything, then do what is missing. Exits with 1 if a step failed or a signal stopped the bench."""
    here, in_slurm = (recipe.bench.launch == launch for launch in ("local", "slurm"))
    if in_slurm:
        check_slurm(SUBMITTED)
    check_options(recipe.bench.sbatch, SBATCH)
    check_given_speeds(recipe.estimate.img_s)
    shares = DeviceShares(recipe.jobs, recipe.bench.processes, "bench.processes") if here else None
    if recipe.replaced_models:
        log.info(
            "model: %s replaces the models of the recipe: %s",
            *map(recipe.model_of, recipe.models),
            ", ".join(recipe.replaced_models),
        )
    plan = Plan(recipe)
    out = plan.out
    pending = _pending_steps(plan)
    _check_networks(pending)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if recipe.estimate.enabled:
            print_estimate(recipe, pending)
            return
        lock_out(out, shared=recipe.bench.share or in_slurm)  # jobs that were submitted before may be at work
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); choose another folder") from error
    try:
        if not recipe.bench.share:
            complete = replace(recipe, bench=replace(recipe.bench, only=[]))
            write_atomically(out / RECIPE_FILE, dump(complete).encode())
        plan.inputs.write()
        if shares:
            Runner(plan, shares).run(pending)
            return
        queued = jobs_in_queue(out, SUBMITTED) if in_slurm else {}
        pending = _without_queued(pending, queued)
        for step in pending:
            _claim(step)
            release_out(step.folder)
    finally:
        release_out(out)
    if recipe.bench.launch == "print":
        sys.stdout.write(printed_commands(pending))
    else:
        submit(recipe, pending, queued)


def _pending_steps(plan: Plan) -> list[Step]:
    """Return the chosen steps that are not done; name those that are left out."""
    for reason, names in plan.left_out_steps().items():
        log.info("left out: %s (%s)", ", ".join(names), reason)
    chosen = plan.chosen_steps()
    pending = [step for step in chosen if not step.done]
    log.info("%d steps, %d of them finished before", len(chosen), len(chosen) - len(pending))
    return pending


def _check_networks(pending: Sequence[Step]) -> None:
    """Raise UserError if a step would refuse the encoder of its arm, or networks that it measures with; of those that
    exist before the first step.
    """
    for step in pending:
        with errors_name(step.name):
            if not step.trials:
                for command in step.commands[:1]:  # the other seeds and the samples take the same networks
                    check_networks(command.arguments, step.out)
            elif not step.arm.pretrained_by:
                for _, arguments in itertools.islice(pending_commands(step.trials), 1):
                    check_networks(arguments, step.out)


def _without_queued(pending: Sequence[Step], queued: Mapping[str, str]) -> list[Step]:
    """Return the steps that no job in the queue is for; name the others."""
    for step in pending:
        if step.name not in queued:
            continue
        changed = not step.describes(step.record())
        advice = "; if it runs, it has begun with other settings than these: submit again when it has ended"
        log.info("%s: job %s is in the queue%s", step.name, queued[step.name], advice if changed else "")
    return [step for step in pending if step.name not in queued]


class Runner:
    """Runs the steps of a plan on this machine."""

    def __init__(self, plan: Plan, shares: DeviceShares):
        self.shares = shares
        self.plan, self.recipe, self.out, self.steps = plan, plan.recipe, plan.out, plan.steps

    def run(self, pending: Sequence[Step]) -> None:
        """Run the steps whose needs are done; update the report after each, print the table at the end."""
        failed: list[str] = []
        try:
            with Children() as children:
                for number, step in enumerate(pending, 1):
                    log.info("%s, step %d of %d%s", step.name, number, len(pending), self._eta(pending[number - 1 :]))
                    if not self._run_or_block(step, children):
                        failed.append(step.name)
                    self._write_report()
        except Stopped:
            self._write_report()
            sys.stdout.write(summary_table(self._content()))
            log.warning("stopped; the same command continues")
            raise SystemExit(1) from None
        path = self._write_report()
        sys.stdout.write(f"{summary_table(self._content())}\n{path}\n")
        if failed:
            logs = [str(self.out / name / LOG) for name in failed if self.steps[name].record()["state"] == "failed"]
            counts = f"{len(failed)} of {len(pending)} steps failed"
            log.error("%s: %s; see %s", counts, ", ".join(failed), ", ".join(logs))
            raise SystemExit(1)

    def _run_or_block(self, step: Step, children: Children) -> bool:
        """Run a step if everything it needs is done. Returns whether it is done now."""
        missing = next((name for name in step.needs if not self.steps[name].done), None)
        if missing:
            write_record(step, state="blocked", error=f"blocked by {missing}")
        else:
            self._run_step(step, children)
        record = step.record()
        if record["state"] != "done":
            log.warning("%s: %s: %s", step.name, record["state"], record["error"])
            return False
        scores = ", ".join(f"{name} {mean_and_sd(values)}" for name, values in record["scores"].items())
        log.info("%s: done in %.0f s%s", step.name, record["seconds"], f": {scores}" if scores else "")
        for line in record.get("notes", []):
            log.warning("%s: %s", step.name, line)
        return True

    def _run_step(self, step: Step, children: Children) -> None:
        if self.recipe.bench.share:
            _claim(step)
        else:
            _prepare(step)
        seconds_before = step.record().get("seconds", 0.0)
        started = time.monotonic()

        def seconds() -> float:
            return round(seconds_before + time.monotonic() - started, 1)

        state, outcome = "failed", {}
        try:
            error = self._run_commands(step, children)
            if not error:
                read_outcome = (
                    pretraining.read_outcome if step.benchmark == PRETRAIN else BENCHMARKS[step.benchmark].read_outcome
                )
                state, outcome = "done", read_outcome(step).entry(step)
        except Stopped:
            write_record(step, state="stopped", error="stopped by a signal", seconds=seconds())
            raise
        except (OSError, KeyError, ValueError, TypeError) as problem:
            error = f"the commands left no metrics: {type(problem).__name__}: {problem}"
        finally:
            if self.recipe.bench.share:
                release_out(step.folder)
        write_record(step, state=state, error=error, seconds=seconds(), **outcome)

    def _run_commands(self, step: Step, children: Children) -> str:
        """Run a step's commands, `jobs` at a time if they do not depend on each other.

        Returns the last line of the first one that failed, "" if none did.
        """
        jobs = 1 if step.trials or step.in_sequence else self.shares.jobs

        def run(number: int) -> str:
            command, log_file = step.commands[number], step.folder / (LOG if jobs == 1 else f"{number}-{LOG}")
            for out in [argument.removeprefix("out=") for argument in command.arguments if argument.startswith("out=")]:
                children.wait_until_free(Path(out))
            try:
                # a sweep divides the GPUs itself
                with contextlib.nullcontext(dict[str, str]()) if step.trials else self.shares.take() as environment:
                    code = children.run_addp(command.arguments, log_file, command.processes, environment)
                signal = f"signal {-code}: " if code < 0 else ""
                return (signal + last_lines(log_file))[-ERROR_LENGTH:] if code else ""
            finally:
                if jobs > 1 and log_file.exists():  # one log for the step, in which each command's lines are together
                    with (step.folder / LOG).open("ab") as step_log:
                        step_log.write(log_file.read_bytes())
                    log_file.unlink()

        numbers = range(len(step.commands))
        if jobs == 1:
            return next(filter(None, map(run, numbers)), "")
        with ThreadPoolExecutor(jobs) as pool:
            return next(filter(None, list(pool.map(run, numbers))), "")

    def _eta(self, pending: Sequence[Step]) -> str:
        """Return how long the steps may take, judging by other arms on the same benchmarks."""
        seconds: dict[str, list[float]] = {}
        for step in self.steps.values():
            if step.done:
                seconds.setdefault(step.benchmark, []).append(step.record()["seconds"])
        estimates = [statistics.mean(seconds[step.benchmark]) for step in pending if step.benchmark in seconds]
        if not estimates:
            return ""
        sign = "" if len(estimates) == len(pending) else "more than "
        return f", eta {sign}{duration(sum(estimates))}"

    def _content(self) -> dict[str, Any]:
        content = bench_content(self.recipe, self.plan.arms, list(self.steps.values()))
        comparisons = compare_with_paper(BenchResults(self.out, content, None))
        return content | {"against_paper": [each.entry() for each in comparisons]}

    def _write_report(self) -> Path:
        """Write bench.json, report.html and report.md; return the path of report.html."""
        with _exclusive(self.out):
            write_atomically(self.out / BENCH, json.dumps(self._content(), indent=1).encode())
            return write_report(self.out)


def _claim(step: Step) -> None:
    """`_prepare` a folder that other processes may want. Raises UserError if one works in it."""
    step.folder.mkdir(parents=True, exist_ok=True)
    lock_out(step.folder)
    _prepare(step)
    release_out(step.folder)  # if void results were moved, the lock has moved with them
    lock_out(step.folder)


def _prepare(step: Step) -> None:
    """Prepare the step's folder and record in its step.json what the folder is for."""
    record = step.record()
    if moved_to := prepare_folder(step):
        log.info("%s: its inputs or settings have changed; the previous results are in %s", step.name, moved_to)
    if moved_to or not record:
        record = {"state": "missing", "error": "", "seconds": 0.0, "scores": {}}
        record |= step.about()
        write_atomically(step.folder / STEP, json.dumps(record, indent=1).encode())


@contextlib.contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Let one process at a time write the report, among those that share the bench folder; the others wait."""
    folder = out / "inputs"
    folder.mkdir(exist_ok=True)
    for _ in range(600):
        try:
            lock_out(folder)
            break
        except UserError:
            time.sleep(0.1)
    try:
        yield
    finally:
        release_out(folder)
