"""`addp det cost`."""

import json
import os
import signal

from addp_core.recipes.cli import main


def test_cost_measures_with_and_without_checkpointing(capsys):
    settings = ["size=64", "steps=1", "objects=2", "attention.window=3", "json=true"]
    settings += ["model=tiny", "detector={channels: 16, convs: 8, fc: 16, proposals: 20, samples: 8}"]
    assert main(["det", "cost", *settings]) == 0
    measurements = json.loads(capsys.readouterr().out)
    assert list(measurements) == ["on", "off"]
    assert all(m["seconds_per_image"] > 0 and m["peak_memory_bytes"] > 0 for m in measurements.values())


def _measure_or_die(recipe, checkpointing):
    """Stand in for a measurement on a machine whose memory runs out without checkpointing."""
    if not checkpointing:
        os.kill(os.getpid(), signal.SIGKILL)
    measurement = dict.fromkeys(("seconds_per_image", "low", "high", "processor_seconds_per_image"), 1.0)
    return measurement | {"peak_memory_bytes": 2**30, "device": "CPU"}


def test_cost_keeps_what_it_measured_before_memory_ran_out(monkeypatch, capsys):
    monkeypatch.setattr("det.cost.measure", _measure_or_die)
    assert main(["det", "cost"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("checkpointing on   1 s an image")
    assert "checkpointing=off: the measuring process was killed" in captured.err
    assert captured.err.count("\n") == 1
