"""Fixtures of the training tests."""

from pathlib import Path

import pytest
import torch
from toy_stage import run

from addp_core.training.metrics import RunLogger


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Use one thread, and plot no curves, which takes a second; only the run `uninterrupted` has them."""
    monkeypatch.setattr(RunLogger, "plot_curves", lambda self: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    """A finished run that nothing has interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    run([f"out={out}"])
    return out
