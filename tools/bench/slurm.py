"""The steps of a bench elsewhere: printed as commands, or submitted to Slurm as a job each."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from tools.bench.children import ADDP
from tools.bench.recipe import BenchRecipe
from tools.bench.step import Step

# options that a job without GPUs needs too: who pays, and where and how long it may run
ACCOUNTING_OPTION = re.compile(r"--(account|partition|qos|reservation|clusters|wckey|time)\b|-[ApqMt]")


def printed_commands(steps: Sequence[Step]) -> str:
    """Return the commands of the steps as one would type them, with comments between; `addp bench` collects later."""
    lines = []
    for step in steps:
        lines.append(f"# {step.name}" + (f" (after {', '.join(step.needs)})" if step.needs else ""))
        lines += step.lines
    return "".join(f"{line}\n" for line in lines)


def submit(recipe: BenchRecipe, steps: Sequence[Step]) -> None:
    """Submit a job for each step, after those that it needs, and one for the report; write their numbers to stdout."""
    jobs: dict[str, str] = {}
    out = Path(recipe.out)
    for step in steps:
        arguments = ["bench", str(out / "recipe.yaml"), f"bench.only=[{step.name}]", "bench.launch=local"]
        arguments.append("bench.share=true")
        before = [jobs[name] for name in step.needs if name in jobs]
        dependency = [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"] if before else []
        script = _write_job_script(step.folder, f"addp-{step.name}", recipe.bench.sbatch, arguments)
        jobs[step.name] = _sbatch(script, dependency)
        sys.stdout.write(f"{jobs[step.name]} {step.name}\n")
    if jobs:
        options = [option for option in recipe.bench.sbatch if ACCOUNTING_OPTION.match(option)]
        script = _write_job_script(out, "addp-report", options, ["report", f"out={out}"])
        number = _sbatch(script, [f"--dependency=afterany:{':'.join(jobs.values())}"])
        sys.stdout.write(f"{number} report\n")


def _write_job_script(folder: Path, name: str, options: Sequence[str], arguments: Sequence[str]) -> Path:
    """Write `folder`/job.sbatch, which runs `addp <arguments>` in the current directory."""
    options = [f"--job-name={name.replace('/', '-')}", f"--output={folder.resolve()}/slurm-%j.txt", *options]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), f"cd {shlex.quote(os.getcwd())}"]
    lines.append(f"exec {shlex.join([*ADDP, *arguments])}")
    path = folder / "job.sbatch"
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def _sbatch(script: Path, options: Sequence[str]) -> str:
    """Submit a script and return the number of its job. Raises UserError if Slurm refuses it."""
    done = subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench.sbatch: {script}: sbatch failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().split(";")[0]  # the name of the cluster follows, if there are several
