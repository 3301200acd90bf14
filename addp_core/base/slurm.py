"""Jobs of Slurm: a script that runs one command of addp, stops it before the time limit and goes on; its submission."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically

JOBS = "jobs.json"  # in the folder of a run or a bench: the jobs that were submitted for it
SCRIPT_FILE = "job.sbatch"
# What every job has unless its options say otherwise. USR1 reaches the script alone, two minutes before the time limit;
# a requeued job goes on in the same log.
DEFAULT_OPTIONS = ("--requeue", "--signal=B:USR1@120", "--open-mode=append")
# A job that is stopped at its time limit is not done, and those after it must go on waiting: it requeues itself. On
# SIGTERM (scancel, preemption), Slurm decides what becomes of the job. Commands get USR1 either way: srun passes it on
# to its processes, which SIGTERM would make it kill.
SCRIPT = """\
#!/bin/bash
{options}
cd {folder} || exit
limit=
trap 'limit=reached; kill -USR1 "$addp"' USR1
trap 'kill -USR1 "$addp"' TERM
{command} &
addp=$!
wait "$addp"
code=$?
while kill -0 "$addp" 2> /dev/null; do  # a signal ended the waiting, not addp
    wait "$addp"
    code=$?
done
if [ -n "$limit" ] && {unfinished}; then
    echo "stopped at the time limit: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def check_slurm(where: str) -> None:
    """Raise UserError if this machine cannot submit jobs; `where` is the key and its value."""
    if shutil.which("sbatch") is None:
        raise UserError(f"{where}: no sbatch on the PATH; expected a machine of a Slurm cluster, or local")


def check_options(options: Sequence[str], key: str) -> None:
    """Raise UserError if one of the values of `key` cannot be an option of sbatch."""
    for option in options:
        if not re.fullmatch(r"-[^\n\r\0]+", option):
            raise UserError(f"{key}: found {option!r}, expected an option in one line, as in '--gres=gpu:8'")


def write_script(folder: Path, name: str, options: Sequence[str], command: str, unfinished: str) -> Path:
    """Write `folder`/job.sbatch, which runs a command in the current directory, and return its path.

    Args:
        name: of the job.
        options: of sbatch; a later one replaces an earlier one.
        command: in the shell's notation.
        unfinished: a condition of the shell, in which `$code` is the command's exit code: whether a job that was
            stopped at its time limit has to go on.
    """
    log_file = f"{folder.resolve()}/slurm-%j.txt".replace("%", "%%").replace("%%j", "%j")
    options = [f"--job-name={name.replace('/', '-')}", f"--output={log_file}", *DEFAULT_OPTIONS, *options]
    text = SCRIPT.format(
        options="\n".join(f"#SBATCH {_quoted(option)}" for option in options),
        folder=shlex.quote(os.getcwd()),
        command=command,
        unfinished=unfinished,
    )
    path = folder / SCRIPT_FILE
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


def submit_script(folder: Path, name: str, script: Path, options: Sequence[str], key: str) -> str:
    """Submit a script, record its job in the folder under a name, and return the job's number.

    Raises UserError, which names the key, if Slurm refuses it.
    """
    job = _run_slurm(["sbatch", "--parsable", *options, str(script)], f"{key}: {script}").strip()
    write_atomically(folder / JOBS, json.dumps({**_submitted_jobs(folder), name: job}, indent=1).encode())
    return job.partition(";")[0]  # the name of the cluster follows, if there are several


def jobs_in_queue(folder: Path, where: str) -> dict[str, str]:
    """Return the jobs that were submitted for a folder and wait or run: the name that each has in it -> its number.

    Raises UserError if Slurm does not answer; `where` is the key and its value.
    """
    submitted = _submitted_jobs(folder)
    if not submitted:
        return {}
    clusters = sorted({cluster for _, _, cluster in (job.partition(";") for job in submitted.values()) if cluster})
    command = ["squeue", "--noheader", "--format=%A", f"--user={os.getuid()}"]
    queued = set(_run_slurm([*command, *([f"--clusters={','.join(clusters)}"] if clusters else [])], where).split())
    return {name: number for name, job in submitted.items() if (number := job.partition(";")[0]) in queued}


def _submitted_jobs(folder: Path) -> dict[str, str]:
    """Return the last job of each name, as sbatch named it: number, or number;cluster."""
    path = folder / JOBS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _run_slurm(command: Sequence[str], where: str) -> str:
    """Run a command of Slurm and return what it writes. Raises UserError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"{where}: {command[0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        raise UserError(f"{where}: {command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
