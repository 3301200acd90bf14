"""Stand-ins of Slurm's commands: they record what they are asked for, and srun starts its processes on this machine."""

import os
from pathlib import Path

import pytest

COMMANDS = {
    "sbatch": """
echo "$@" >> $SLURM_STUB/sbatch.txt
[ -e $SLURM_STUB/refused ] && { echo "sbatch: error: invalid partition specified: mars" >&2; exit 1; }
echo $((100 + $(wc -l < $SLURM_STUB/sbatch.txt)))
""",
    "squeue": "cat $SLURM_STUB/queue.txt 2> /dev/null; true\n",
    "scontrol": 'echo "$@" >> $SLURM_STUB/scontrol.txt\n',
    # as Slurm 22.05: USR1 is passed on; two processes, of which each sees its rank
    "srun": """
echo "$@" >> $SLURM_STUB/srun.txt
while [ "${1:0:1}" = - ]; do shift; done
trap 'kill -USR1 "${pids[@]}"' USR1
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_ID=0
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!); done
for pid in "${pids[@]}"; do
    wait $pid; code=$?
    while kill -0 $pid 2> /dev/null; do wait $pid; code=$?; done
    [ $code -eq 0 ] || exit $code
done
""",
}


def stand_in_for_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-ins first on the PATH. Returns the folder of their records."""
    for name, text in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash{text if text[0] == chr(10) else chr(10) + text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("SLURM_STUB", str(folder))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "101")  # of the job whose script a test runs
    return folder
