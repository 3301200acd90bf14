"""The steps of a bench elsewhere: printed as commands, or submitted to Slurm as a job each."""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.paths import RECIPE_FILE
from tools.bench.recipe import BenchRecipe
from tools.bench.step import Step
from tools.children import ADDP

log = logging.getLogger("addp")

JOBS = "jobs.json"  # in the bench folder: the jobs that were submitted for its steps
REPORT = "report"  # the job of the report, among them
# options that a job without GPUs needs too: who pays, and where and how long it may run
ACCOUNTING_OPTION = re.compile(r"--(account|partition|qos|reservation|clusters|wckey|time)\b|-[ApqMt]")
# What every job has unless `bench.sbatch` says otherwise. USR1 reaches the script alone, two minutes before the time
# limit; a requeued job goes on in the same log.
DEFAULT_OPTIONS = ("--requeue", "--signal=B:USR1@120", "--open-mode=append")
# A job that is stopped at its time limit is not done, and those after it must go on waiting: it requeues itself. On
# SIGTERM (scancel, preemption), Slurm decides what becomes of the job.
SCRIPT = """\
#!/bin/bash
{options}
cd {folder} || exit
limit=
trap 'limit=reached; kill -TERM "$addp"' USR1
trap 'kill -TERM "$addp"' TERM
{command} &
addp=$!
wait "$addp"
code=$?
while kill -0 "$addp" 2> /dev/null; do  # a signal ended the waiting, not addp
    wait "$addp"
    code=$?
done
if [ -n "$limit" ] && [ "$code" -ne 0 ]; then
    echo "stopped at the time limit: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def printed_commands(steps: Sequence[Step]) -> str:
    """Return the commands of the steps as one would type them, with comments between; `addp bench` collects later."""
    lines = []
    for step in steps:
        lines.append(f"# {step.name}" + (f" (after {', '.join(step.needs)})" if step.needs else ""))
        lines += step.lines
    return "".join(f"{line}\n" for line in lines)


def check_sbatch_options(options: Sequence[str]) -> None:
    """Raise UserError if one of `bench.sbatch` cannot be an option of sbatch."""
    for option in options:
        if not re.fullmatch(r"-[^\n\r\0]+", option):
            raise UserError(f"bench.sbatch: found {option!r}, expected an option in one line, as in '--gres=gpu:8'")


def jobs_in_queue(out: Path) -> dict[str, str]:
    """Return the jobs that were submitted for steps of this bench and wait or run: name of the step -> number.

    Raises UserError if Slurm does not answer.
    """
    submitted = _submitted_jobs(out)
    if not submitted:
        return {}
    clusters = sorted({cluster for _, _, cluster in (job.partition(";") for job in submitted.values()) if cluster})
    command = ["squeue", "--noheader", "--format=%A", f"--user={os.getuid()}"]
    listed = _run_slurm([*command, *([f"--clusters={','.join(clusters)}"] if clusters else [])], "bench.launch=slurm")
    queued = set(listed.split())
    return {name: number for name, job in submitted.items() if (number := job.partition(";")[0]) in queued}


def submit(recipe: BenchRecipe, steps: Sequence[Step], queued: Mapping[str, str]) -> None:
    """Submit a job for each step, after those that it needs, and one for the report; write their numbers to stdout.

    queued: what `jobs_in_queue` returns, of which no step is among `steps`.
    """
    out, jobs = Path(recipe.out), dict(queued)
    for step in steps:
        arguments = ["bench", str(out / RECIPE_FILE), f"bench.only=[{step.name}]", "bench.launch=local"]
        arguments.append("bench.share=true")
        before = [jobs[name] for name in step.needs if name in jobs]
        dependency = [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"] if before else []
        script = _write_job_script(step.folder, f"addp-{step.name}", recipe.bench.sbatch, arguments)
        jobs[step.name] = _submit_and_record(out, step.name, script, dependency)
    if steps or (jobs and REPORT not in jobs):
        options = [option for option in recipe.bench.sbatch if ACCOUNTING_OPTION.match(option)]
        script = _write_job_script(out, f"addp-{REPORT}", options, [REPORT, f"out={out}"])
        before = [number for name, number in jobs.items() if name != REPORT]
        _submit_and_record(out, REPORT, script, [f"--dependency=afterany:{':'.join(before)}"])


def _write_job_script(folder: Path, name: str, options: Sequence[str], arguments: Sequence[str]) -> Path:
    """Write `folder`/job.sbatch, which runs `addp <arguments>` in the current directory."""
    log_file = f"{folder.resolve()}/slurm-%j.txt".replace("%", "%%").replace("%%j", "%j")
    options = [f"--job-name={name.replace('/', '-')}", f"--output={log_file}", *DEFAULT_OPTIONS, *options]
    text = SCRIPT.format(
        options="\n".join(f"#SBATCH {_quoted(option)}" for option in options),
        folder=shlex.quote(os.getcwd()),
        command=shlex.join([*ADDP, *arguments]),
    )
    path = folder / "job.sbatch"
    write_atomically(path, text.encode())
    return path


def _quoted(option: str) -> str:
    """Return an option of sbatch as its comments take it: the value is one word, whatever it contains.

    The value follows an equals sign (--comment=two words) or a blank (-p short, --partition short).
    """
    match = re.fullmatch(r"([^\s=]+)(=|\s+)(.*)", option)
    if match is None:
        return shlex.quote(option)
    return f"{match[1]}{match[2][0]}{shlex.quote(match[3].strip())}"


def _submitted_jobs(out: Path) -> dict[str, str]:
    """Return the last job of each step, as sbatch named it: number, or number;cluster."""
    path = out / JOBS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _submit_and_record(out: Path, name: str, script: Path, options: Sequence[str]) -> str:
    """Submit a script, record its job under the name of the step, and return the job's number.

    Raises UserError if Slurm refuses it.
    """
    job = _run_slurm(["sbatch", "--parsable", *options, str(script)], f"bench.sbatch: {script}").strip()
    write_atomically(out / JOBS, json.dumps({**_submitted_jobs(out), name: job}, indent=1).encode())
    number = job.partition(";")[0]  # the name of the cluster follows, if there are several
    sys.stdout.write(f"{number} {name}\n")
    return number


def _run_slurm(command: Sequence[str], where: str) -> str:
    """Run a command of Slurm and return what it writes. Raises UserError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"{where}: {command[0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        raise UserError(f"{where}: {command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
