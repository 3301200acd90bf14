"""A run that is stopped, killed or extended and then continued equals one that was never stopped."""

import itertools
import json
import logging
import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from toy_stage import (
    Faults,
    ToyStage,
    ToyStream,
    assert_same,
    checkpoint_names,
    metrics,
    run,
    start_process,
    stopped_run,
    wait_for,
)

from addp_core.base.errors import UserError
from addp_core.training import engine
from addp_core.training.checkpoints import ChecksumWriter
from addp_core.training.stage import TrainConfig


@pytest.mark.parametrize(
    ("number", "code", "continues_from"),
    [(signal.SIGTERM, 0, 7), (signal.SIGUSR1, 0, 7), (signal.SIGINT, 1, 7), (signal.SIGKILL, -signal.SIGKILL, 4)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_stopped_and_continued_equals_never_stopped(number, code, continues_from, tmp_path, uninterrupted):
    out, log = tmp_path / "run", tmp_path / "log"
    assert wait_for(start_process([f"out={out}"], Faults(signals={6: number}), log)) == code
    assert not (out / "model.safetensors").exists()
    if number != signal.SIGKILL:
        assert checkpoint_names(out) == ["step-4", "step-7"]
        assert "stopped by a signal after step 7" in log.read_text()
    assert wait_for(start_process([f"out={out}"], None, log)) == 0
    assert f"continues from step {continues_from}" in log.read_text()
    assert_same(out, uninterrupted)


def test_the_rate_after_a_stop_counts_the_steps_since(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=itertools.count().__next__))  # a step takes 1 s
    stopped_run(tmp_path, step=6)
    run([f"out={tmp_path}"])
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert {line["step"]: line["img_s"] for line in lines if "img_s" in line} == {4: 8.0, 8: 8.0, 12: 8.0}


def test_a_second_interrupt_stops_at_once(tmp_path):
    class InterruptingStage(ToyStage):
        def loss(self, model, batch, micro_step):
            os.kill(os.getpid(), signal.SIGINT)
            return super().loss(model, batch, micro_step)

    config = TrainConfig(steps=4, batch=8, accumulate=2)
    handler = signal.getsignal(signal.SIGINT)  # SIG_IGN if a shell started the tests in the background
    with pytest.raises(KeyboardInterrupt):
        engine.train(InterruptingStage(), ToyStream(0, 4), config, tmp_path, "{}")
    assert checkpoint_names(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("settings", [["train.precision=bf16"], ["train.accumulate=2"], ["train.optimizer=sgd"]])
def test_resuming_is_exact_in_other_settings_too(settings, tmp_path):
    settings = [*settings, "train.checkpoint_every=0"]
    run([f"out={tmp_path / 'uninterrupted'}", *settings])
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            run([f"out={tmp_path / 'run'}", *settings], Faults(signals={2: signal.SIGTERM, 5: signal.SIGTERM}))
        assert stopped.value.code == 0
    run([f"out={tmp_path / 'run'}", *settings])
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")


def test_a_run_killed_at_any_moment_continues_exactly(tmp_path, uninterrupted):
    out = tmp_path / "run"
    for pause in (0.0, 0.02, 0.05):
        process = start_process([f"out={out}", "train.log_every=4"])
        while process.exitcode is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.005)
        time.sleep(pause)
        process.kill()
        process.join()
    run([f"out={out}"])
    assert_same(out, uninterrupted)


def kill_at_write(count: int) -> None:
    write, calls = ChecksumWriter.write, []

    def killing(self, data):
        calls.append(data)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    patch.object(ChecksumWriter, "write", killing).start()


def kill_at_rename(name: str, after: bool) -> None:
    rename = os.rename

    def killing(source, target):
        if after:
            rename(source, target)
        if Path(source).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        if not after:
            rename(source, target)

    patch("os.rename", killing).start()


@pytest.mark.parametrize(
    ("kill", "expected_names", "continues_from"),
    [
        (partial(kill_at_write, 10), [".tmp-step-4"], 0),
        (partial(kill_at_rename, ".tmp-step-8", False), [".tmp-step-8", "step-4"], 4),
        (partial(kill_at_rename, ".tmp-step-8", True), ["step-4", "step-8"], 8),
        (partial(kill_at_rename, "step-4", False), ["step-12", "step-4", "step-8"], 12),
        (partial(kill_at_rename, "step-4", True), [".tmp-old-step-4", "step-12", "step-8"], 12),
    ],
    ids=["while-writing", "before-the-rename", "after-the-rename", "before-removing-the-old", "while-removing-the-old"],
)
def test_a_kill_while_writing_a_checkpoint_keeps_older_ones(
    kill, expected_names, continues_from, tmp_path, uninterrupted
):
    out, log = tmp_path / "run", tmp_path / "log"
    assert wait_for(start_process([f"out={out}"], None, log, before=kill)) == -signal.SIGKILL
    assert checkpoint_names(out) == expected_names
    assert wait_for(start_process([f"out={out}"], None, log)) == 0
    assert (f"continues from step {continues_from}" in log.read_text()) == (continues_from > 0)
    assert checkpoint_names(out) == ["step-12", "step-8"]
    assert_same(out, uninterrupted)


def test_keys_that_do_not_change_the_result_may_change(tmp_path, uninterrupted):
    out = tmp_path / "run"
    stopped_run(out)
    settings = ["train.keep=5", "train.checkpoint_every=100", "train.preview_every=1", "train.max_nonfinite=2"]
    run([f"out={out}", *settings])
    assert checkpoint_names(out) == ["step-10", "step-12", "step-8"]
    assert_same(out, uninterrupted)


def test_a_finished_run_may_be_extended(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run([f"out={tmp_path}"])
    run([f"out={tmp_path}", "train.steps=16"])
    assert "train.steps: 16 instead of 12" in caplog.text
    assert "continues from step 12" in caplog.text
    assert [line["step"] for line in metrics(tmp_path)] == [4, 8, 12, 12, 16, 16]
    with pytest.raises(UserError, match="has already reached step 16, but this recipe ends at 14"):
        run([f"out={tmp_path}", "train.steps=14"])


def test_metrics_after_the_checkpoint_and_broken_lines_are_dropped(tmp_path, uninterrupted):
    stopped_run(tmp_path, step=7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    run([f"out={tmp_path}"])
    assert_same(tmp_path, uninterrupted)
