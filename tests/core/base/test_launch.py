"""Which of a job's processes this one is, by the variables of srun, sbatch, salloc and of users' scripts."""

import os
import subprocess
import sys

import pytest

from addp_core.base.launch import check_launch, describe_unused_tasks, first_host, rank, run_alone, world_size
from addp_core.base.launch import take_place_from_slurm as take_place
from addp_core.recipes.cli import main

# As Slurm 22.05 sets them for the second of four processes that srun started.
TASK = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}
TASK |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[03-04]"}
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
SALLOC = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
ALONE = {"RANK": None, "WORLD_SIZE": None, "MASTER_ADDR": None, "MASTER_PORT": None}


@pytest.fixture
def given(monkeypatch):
    """A function that replaces what the environment says about processes."""

    def replace(**variables: str) -> None:
        for name in [each for each in os.environ if each.startswith("SLURM_")] + [*ALONE, "LOCAL_RANK"]:
            monkeypatch.setenv(name, "")  # restored after the test
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return replace


def place() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ALONE}


def test_srun_alone_is_enough(given):
    given(**TASK)
    take_place()
    assert place() == {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu03", "MASTER_PORT": str(15000 + 7 + 2 * 997)}
    check_launch()
    given(**TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "4"})  # older job scripts
    take_place()
    assert place() == {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_the_first_machine_of_a_list():
    lists = {"vm": "vm", "gpu[003-007,012],big1": "gpu003", "a1,b[1-2]": "a1", "rack[2-3]n[01,07]": "rack2n01", "": ""}
    assert {nodes: first_host(nodes) for nodes in lists} == lists


@pytest.mark.parametrize(
    "variables",
    [BATCH, SALLOC, TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, TASK | {"SLURM_STEP_NUM_TASKS": "x"}],
    ids=["sbatch without srun", "salloc", "one process", "no number"],
)
def test_a_single_process_in_an_allocation_runs_alone(given, variables):
    given(**variables)
    take_place()
    assert place() == ALONE
    check_launch()
    assert (rank(), world_size()) == (0, 1)


def test_a_command_that_uses_one_of_several_tasks_says_so(given, capsys):
    for variables in (BATCH, SALLOC):
        given(**variables)
        assert describe_unused_tasks() == (
            "SLURM_NTASKS=4, but one process runs, since srun did not start it; write srun before addp for all"
        )
        assert main(["evaluate", "out=x"]) == 2
        assert "write srun before addp for all" in capsys.readouterr().err
    for variables in ({}, BATCH | {"SLURM_NTASKS": "1"}, {**BATCH, "RANK": "0", "WORLD_SIZE": "4"}):
        given(**variables)
        assert describe_unused_tasks() == ""


def test_torchrun_under_srun_has_its_own_ranks(given):
    torchrun = {"RANK": "9", "WORLD_SIZE": "32", "MASTER_ADDR": "gpu03", "MASTER_PORT": "1"}
    given(**TASK, **torchrun)
    take_place()
    assert place() == torchrun
    check_launch()


def test_commands_of_one_process_hide_srun_from_those_that_they_start(given):
    given(**TASK)
    take_place()
    run_alone()
    take_place()  # as a child would
    assert place() == ALONE
    assert describe_unused_tasks() == ""


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "1"}, "RANK=1: found in the environment without WORLD_SIZE; expected all of RANK, WORLD_SIZE, "),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1: found in the environment without MASTER_ADDR, MASTER_PORT; expect"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"},
            "LOCAL_RANK=x: found this in the environment, expected a",
        ),
        (
            TASK | {"WORLD_SIZE": "8"},
            "WORLD_SIZE=8: found in the environment (srun started 4 processes) without RANK, MASTER_ADDR, MASTER_PORT",
        ),
        (
            TASK | {"SLURM_PTY_PORT": "1", "SLURM_PROCID": "0"},
            "SLURM_STEP_NUM_TASKS=4: found in the shell of srun --pty, expected 1; write srun before addp, or unset",
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "WORLD_SIZE=4: found in the environment (srun started 4 processes) without"),
        (TASK | {"SLURM_STEP_NODELIST": ""}, "RANK=1: found in the environment (srun started 4 processes) without MAS"),
    ],
)
def test_half_a_group_is_one_line(given, capsys, variables, line):
    given(**variables)
    assert main(["finetune", "out=x"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert f"addp: {line}" in err[0].replace("addp (rank 1): ", "addp: ")


def test_torch_joins_no_group_for_a_single_process():
    code = "from addp_core.base import job; from addp_core.training.processes import join_group\n"
    code += "job.join(); assert join_group().num_processes == 1"
    without = {name: value for name, value in os.environ.items() if name not in (*ALONE, "LOCAL_RANK")}
    environment = without | BATCH | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
