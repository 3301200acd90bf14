"""The steps of a bench elsewhere: printed as commands, or submitted to Slurm as a job each."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from addp_core.base.launch import ADDP
from addp_core.base.paths import RECIPE_FILE
from addp_core.base.slurm import submit_script, write_script
from tools.bench.recipe import BenchRecipe
from tools.bench.step import Step

REPORT = "report"  # the job of the report, among those of the steps
KEY = "bench.sbatch"
# options that a job without GPUs needs too: who pays, and where and how long it may run
ACCOUNTING_OPTION = re.compile(r"--(account|partition|qos|reservation|clusters|wckey|time)\b|-[ApqMt]")


def printed_commands(steps: Sequence[Step]) -> str:
    """Return the commands of the steps as one would type them, with comments between; `addp bench` collects later."""
    lines = []
    for step in steps:
        lines.append(f"# {step.name}" + (f" (after {', '.join(step.needs)})" if step.needs else ""))
        lines += step.lines
    return "".join(f"{line}\n" for line in lines)


def submit(recipe: BenchRecipe, steps: Sequence[Step], queued: Mapping[str, str]) -> None:
    """Submit a job for each step, after those that it needs, and one for the report; write their numbers to stdout.

    queued: the jobs of other steps that wait or run, by the names of these.
    """
    out, jobs = Path(recipe.out), dict(queued)
    for step in steps:
        arguments = ["bench", str(out / RECIPE_FILE), f"bench.only=[{step.name}]", "bench.launch=local"]
        arguments.append("bench.share=true")
        before = [jobs[name] for name in step.needs if name in jobs]
        dependency = [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"] if before else []
        script = _write_job_script(step.folder, f"addp-{step.name}", recipe.bench.sbatch, arguments)
        jobs[step.name] = _submit(out, step.name, script, dependency)
    if steps or (jobs and REPORT not in jobs):
        options = [option for option in recipe.bench.sbatch if ACCOUNTING_OPTION.match(option)]
        script = _write_job_script(out, f"addp-{REPORT}", options, [REPORT, f"out={out}"])
        before = [number for name, number in jobs.items() if name != REPORT]
        _submit(out, REPORT, script, [f"--dependency=afterany:{':'.join(before)}"])


def _write_job_script(folder: Path, name: str, options: Sequence[str], arguments: Sequence[str]) -> Path:
    # a bench that a signal stops exits with 1
    return write_script(folder, name, options, shlex.join([*ADDP, *arguments]), unfinished='[ "$code" -ne 0 ]')


def _submit(out: Path, name: str, script: Path, options: Sequence[str]) -> str:
    number = submit_script(out, name, script, options, KEY)
    sys.stdout.write(f"{number} {name}\n")
    return number
