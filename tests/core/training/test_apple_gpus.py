"""What is different on Apple's GPUs (mps), as far as a machine without one can tell."""

import os
import sys
from types import SimpleNamespace

import torch
from checks import assert_user_error
from torch import nn

from addp_core.recipes.cli import main
from addp_core.training import processes
from addp_core.training.config import TrainConfig
from addp_core.training.optimization import make_optimizer
from addp_core.training.precision import resolve_precision
from addp_core.training.probes import precise_type
from addp_core.training.state import can_skip

MPS, CPU = torch.device("mps"), torch.device("cpu")


def test_the_host_decides_whether_a_step_is_skipped():
    """The fused optimizers of torch ignore there that a step is not finite, and would spoil all weights."""
    optimizer = make_optimizer(nn.Linear(2, 2), TrainConfig())
    assert (can_skip(optimizer, CPU), can_skip(optimizer, MPS)) == (True, False)


def test_sums_are_of_a_type_that_they_have():
    assert (precise_type(CPU), precise_type(MPS)) == (torch.float64, torch.float32)


def test_auto_is_fp32():
    assert resolve_precision("auto", MPS, width=768) == "fp32"


def test_several_processes_are_refused(monkeypatch):
    class State:
        _shared_state = SimpleNamespace(device=MPS)

        def __new__(cls, **_: object) -> SimpleNamespace:
            return SimpleNamespace(num_processes=2, device=MPS)

    monkeypatch.setattr(processes, "PartialState", State)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_user_error(processes.join_group, "WORLD_SIZE=2: found on a machine with Apple's GPU, expected 1")


def test_operations_that_they_lack_run_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "")  # restored after the test
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    assert main(["--version"]) == 0
    assert "PYTORCH_ENABLE_MPS_FALLBACK" not in os.environ
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["--version"]) == 0
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
