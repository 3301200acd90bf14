"""Several processes of one run: DDP and FSDP give the results of one process, and agree on errors and signals."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import toy_stage
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from toy_stage import ROUNDING_ONLY, Faults, assert_same, checkpoint_names, metrics, run, start_process, wait_for

from addp_core.training.state import TrainingState


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_two_processes(settings: list[str], log: Path, faults: Faults | None = None, **options) -> list[int]:
    """Run two processes of one run and return their exit codes."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common["ACCELERATE_USE_CPU"] = "1"
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    processes = [start_process(settings, faults, log, environment=ranks[rank], **options) for rank in (0, 1)]
    return [wait_for(process) for process in processes]


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    """Two gloo processes under torchrun with half the batch each give the metrics and weights of one process."""
    run([f"out={tmp_path / 'one'}", *ROUNDING_ONLY])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    script = [toy_stage.__file__, str(tmp_path / "log"), f"out={tmp_path / 'two'}", *ROUNDING_ONLY]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([*torchrun, *script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [*range(1, 21), 20]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = load_file(tmp_path / "two/model.safetensors"), load_file(tmp_path / "one/model.safetensors")
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-6), name


def test_two_processes_stop_at_the_same_step_and_continue_exactly(tmp_path):
    settings = ["train.accumulate=2"]
    assert run_two_processes([f"out={tmp_path / 'uninterrupted'}", *settings], tmp_path / "log") == [0, 0]
    faults = Faults(signals={6: signal.SIGTERM}, only_rank=1)
    assert run_two_processes([f"out={tmp_path / 'run'}", *settings], tmp_path / "log", faults) == [0, 0]
    assert checkpoint_names(tmp_path / "run") == ["step-4", "step-7"]
    assert run_two_processes([f"out={tmp_path / 'run'}", *settings], tmp_path / "log") == [0, 0]
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")


def test_two_processes_agree_on_errors(tmp_path):
    """Both processes stop if the loss is not finite on one of them, or if the batch cannot be split."""
    log, faults = tmp_path / "log", Faults(nan_loss=(5, 6), only_rank=1)
    assert run_two_processes([f"out={tmp_path / 'nan'}", "train.max_nonfinite=2"], log, faults) == [2, 2]
    assert run_two_processes([f"out={tmp_path / 'odd'}", "train.batch=6", "train.accumulate=2"], log) == [2, 2]
    assert "take a multiple of 4" in log.read_text()


def use_fsdp() -> None:
    """Set up FSDP on CPUs, which accelerate does for GPUs only."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    build = TrainingState.__init__

    def build_and_check(self, *args):
        build(self, *args)
        assert self.sharded
        assert all(hasattr(weight, "to_local") for weight in self.model.parameters())

    patch.object(TrainingState, "__init__", build_and_check).start()


def test_fsdp_equals_one_process_and_continues_exactly(tmp_path):
    settings, log = [*ROUNDING_ONLY, "train.accumulate=2", "train.ema=null"], tmp_path / "log"
    run([f"out={tmp_path / 'one'}", *settings])
    assert run_two_processes(
        [f"out={tmp_path / 'two'}", *settings], log, Faults(signals={6: signal.SIGTERM}), before=use_fsdp
    ) == [0, 0]
    assert checkpoint_names(tmp_path / "two") == ["step-7"]
    assert run_two_processes([f"out={tmp_path / 'two'}", *settings], log, before=use_fsdp) == [0, 0]
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)
    assert run_two_processes([f"out={tmp_path / 'ema'}", "train.ema=0.9"], log, before=use_fsdp) == [2, 2]
    assert "train.ema: is not available with FSDP" in log.read_text()
