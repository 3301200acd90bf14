"""Fixtures of the tests of classification."""

import pytest

from addp_core.training.metrics import RunLogger


@pytest.fixture
def no_curves(monkeypatch):
    """Plot no curves at the end of a training, which is slow and tested elsewhere."""
    monkeypatch.setattr(RunLogger, "plot_curves", lambda self: None)
