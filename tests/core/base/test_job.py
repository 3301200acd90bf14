"""The processes of one job begin together and end together, with one line that says why."""

import socket

import pytest
from checks import assert_user_error
from ranks import TIMEOUT, Fault, assert_ends, group_environment, run_ranks
from toy_stage import checkpoint_names, metrics

from addp_core.base import job
from addp_core.base.launch import Place, assign_devices, this_place

LONG = "train.steps=100000"  # more than a test waits for


@pytest.mark.slow
def test_a_job_of_plain_processes_equals_one_of_torchrun(tmp_path):
    for launcher in ("plain", "torchrun"):
        ended = run_ranks(["toy", f"out={tmp_path / launcher}"], tmp_path / f"{launcher}-job", launcher=launcher)
        assert not any(ended.codes), ended.text
        assert not ended.lines
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "torchrun")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_at_the_start_of_one_rank_ends_all_with_one_line(tmp_path, rank):
    """In joining torch's group, the other rank would wait for half an hour."""
    ended = run_ranks(["toy", f"out={tmp_path / 'run'}"], tmp_path / "job", fault=Fault("user error", "start", rank))
    assert_ends(ended, [2, 2], "injected=1: found a fault, expected none")


def test_a_folder_that_cannot_be_used_ends_all_ranks(tmp_path):
    """Rank 0 alone looks at the folder."""
    (tmp_path / "file").touch()
    ended = run_ranks(["toy", f"out={tmp_path / 'file' / 'run'}"], tmp_path / "job")
    assert_ends(ended, [2, 2], "addp: out=", "cannot be written (Not a directory)")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("at", ["step", "validation"])
def test_an_error_ends_all_ranks(tmp_path, at, rank):
    settings = [f"out={tmp_path / 'run'}", "train.evaluate_every=2", LONG]
    ended = run_ranks(["toy", *settings], tmp_path / "job", fault=Fault("error", at, rank, 2))
    assert_ends(ended, [1, 1], "RuntimeError: injected; all processes end")
    assert "Traceback" in ended.outputs[rank]
    assert "Traceback" not in ended.outputs[1 - rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(tmp_path, rank):
    settings = ["toy", f"out={tmp_path / 'run'}", LONG]
    ended = run_ranks(settings, tmp_path / "job", n=4, fault=Fault("SIGKILL", "step", rank, 6))
    assert_ends(ended, [-9 if each == rank else 1 for each in range(4)], f"rank {rank}", "was killed or has crashed")
    assert checkpoint_names(tmp_path / "run") == ["step-4"]


@pytest.mark.slow
def test_a_killed_torchrun_ends_its_ranks_after_a_checkpoint(tmp_path):
    fault = Fault("SIGKILL", "step", 1, 6, to_launcher=True)
    ended = run_ranks(["toy", f"out={tmp_path / 'run'}", LONG], tmp_path / "job", launcher="torchrun", fault=fault)
    assert_ends(ended, [-9], "torchrun", "was killed; stopping as after SIGTERM")
    assert "the same command continues the run" in ended.outputs[0]
    newest = max(int(name.removeprefix("step-")) for name in checkpoint_names(tmp_path / "run"))
    assert newest >= 6


def test_sigterm_ends_a_rank_that_waits_for_another(tmp_path):
    """The wait is in C++, where the handler of the signal is not called."""
    faults = [Fault("delay", "step", 0, 3, seconds=60), Fault("SIGTERM", "step", 1, 3, seconds=0.5)]
    settings = ["toy", f"out={tmp_path / 'run'}", LONG]
    ended = run_ranks(settings, tmp_path / "job", fault=faults, before=limit_waits_after_signals)
    assert_ends(ended, [1, 1], "addp (rank 1): stopped by a signal, after waiting 2 s for other processes")


def limit_waits_after_signals() -> None:
    job.SIGNAL_LIMIT = 2.0


def test_sigterm_while_another_rank_works_stops_all_after_the_step(tmp_path):
    faults = [Fault("delay", "step", 0, 6, seconds=3), Fault("SIGTERM", "step", 1, 6, seconds=0.5)]
    ended = run_ranks(["toy", f"out={tmp_path / 'run'}", LONG], tmp_path / "job", fault=faults)
    assert ended.codes == [0, 0], ended.text
    assert checkpoint_names(tmp_path / "run") == ["step-4", "step-6"]


def test_a_rank_that_waits_longer_than_the_timeout_ends_all(tmp_path):
    settings, fault = ["toy", f"out={tmp_path / 'run'}", LONG], Fault("delay", "step", 0, 3, seconds=60)
    ended = run_ranks(settings, tmp_path / "job", fault=fault, environment={TIMEOUT: "2"})
    assert_ends(ended, [1, 1], "addp (rank 1): RuntimeError: ")


def test_sigterm_ends_a_rank_that_waits_for_others_to_begin(tmp_path):
    faults = [Fault("SIGTERM", "addp_core.base.job:Member.register", 1, seconds=0.5)]
    faults.append(Fault("delay", "addp_core.base.job:open_store", 2, seconds=3))
    ended = run_ranks(["toy", f"out={tmp_path / 'run'}"], tmp_path / "job", n=3, fault=faults)
    assert_ends(ended, [2, -15, 2], "ended before all processes had begun")


def test_an_absent_rank_ends_the_others(tmp_path):
    ended = run_ranks(["toy", f"out={tmp_path / 'run'}"], tmp_path / "job", environment=of_three, before=limit_start)
    assert ended.codes == [2, 2]
    assert "WORLD_SIZE=3: rank 2 did not begin within 0.05 minutes" in ended.lines[0]


def of_three(rank: int) -> dict[str, str]:
    return {"WORLD_SIZE": "3"}


def limit_start() -> None:
    job.JOIN_LIMIT = 3.0


# -------------------- what the environment says


@pytest.mark.parametrize("names", [["RANK"], ["RANK", "WORLD_SIZE"], ["RANK", "LOCAL_RANK"], ["WORLD_SIZE"]])
def test_half_a_group_in_the_environment_is_refused_by_every_process(tmp_path, names):
    """Each process would take itself for the first one, and write the same checkpoints."""
    group = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))

    def half(rank: int) -> dict[str, str | None]:
        full = group_environment(rank, 2, 1)
        return group | {name: full[name] for name in names}

    ended = run_ranks(["toy", f"out={tmp_path / 'run'}"], tmp_path / "job", environment=half)
    assert ended.codes == [2, 2]
    assert all(f"{names[0]}=" in line and "found in the environment without" in line for line in ended.lines)
    assert not (tmp_path / "run").exists()


def test_ranks_and_sizes_that_contradict_each_other_are_refused(tmp_path):
    run = ["toy", f"out={tmp_path / 'run'}"]
    ended = run_ranks(run, tmp_path / "sizes", environment=lambda rank: {"WORLD_SIZE": str(2 + rank)})
    assert_ends(ended, [2, 2], "WORLD_SIZE=3: found for rank 1", "expected 2 as for rank 0")
    ended = run_ranks(run, tmp_path / "twice", n=3, environment=lambda rank: {"RANK": str(min(rank, 1))})
    assert_ends(ended, [2, 2, 2], "RANK=1: found in two processes")
    ended = run_ranks(run, tmp_path / "beyond", n=1, environment={"RANK": "2", "WORLD_SIZE": "2"})
    assert_ends(ended, [2], "RANK=2: found in the environment with WORLD_SIZE=2, expected 0 to 1")


def test_a_port_that_another_program_uses_is_named(tmp_path):
    with socket.create_server(("", 0)) as taken:
        environment = {"MASTER_PORT": str(taken.getsockname()[1])}
        environment["WORLD_SIZE"] = "2"
        ended = run_ranks(["toy", f"out={tmp_path / 'run'}"], tmp_path / "job", n=1, environment=environment)
    assert_ends(ended, [2], f"MASTER_PORT={environment['MASTER_PORT']}: rank 0 cannot listen there")


def test_a_single_process_may_be_called_rank_0_of_1(tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": None, "MASTER_PORT": None}
    ended = run_ranks(["toy", f"out={tmp_path / 'run'}"], tmp_path / "job", n=1, environment=environment)
    assert ended.codes == [0], ended.text


def place(rank: int, *devices: str, machine: str = "a", local_rank: int | None = None) -> Place:
    return Place(rank, 4, machine, machine, 100 + rank, local_rank, list(devices))


def test_each_process_gets_a_gpu_of_its_own():
    """accelerate takes LOCAL_RANK as the index of the GPU, in its barriers too."""
    four = ("w", "x", "y", "z")
    assert assign_devices([place(rank, *four, local_rank=3 - rank) for rank in range(4)]) == [3, 2, 1, 0]
    two_machines = [place(rank, *four[:2], machine="ab"[rank // 2]) for rank in range(4)]
    assert assign_devices(two_machines) == [0, 1, 0, 1]
    # srun --gpus-per-task=1: each process sees its own GPU alone, as number 0
    assert assign_devices([place(rank, four[rank], local_rank=rank) for rank in range(4)]) == [0, 0, 0, 0]
    assert assign_devices([place(rank) for rank in range(4)]) == [0, 1, 2, 3]  # CPUs


def test_processes_that_would_share_a_gpu_are_refused():
    same = [place(rank, "x", local_rank=rank) for rank in range(2)]
    assert_user_error(lambda: assign_devices(same), "CUDA_VISIBLE_DEVICES: rank 0", "rank 1", "would share the GPU x")
    same = [place(rank, "x", "y", local_rank=0) for rank in range(2)]
    assert_user_error(lambda: assign_devices(same), "would share the GPU x, expected one for each process")
    three = [place(rank, "x", "y") for rank in range(3)]
    assert_user_error(lambda: assign_devices(three), "LOCAL_RANK=2: rank 2", "sees 2 GPUs, expected one for each")


def test_slurm_tells_the_local_rank_of_the_same_process_only(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert this_place().local_rank == 1
    monkeypatch.setenv("SLURM_PROCID", "0")  # of the batch script
    assert this_place().local_rank is None


def test_local_rank_is_derived(tmp_path):
    """Without it, accelerate takes each process for a job of its own."""
    ended = run_ranks(["toy", f"out={tmp_path / 'run'}"], tmp_path / "job", environment={"LOCAL_RANK": None})
    assert ended.codes == [0, 0], ended.text
    assert ended.outputs[1] == ""
