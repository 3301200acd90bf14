"""mmengine's Runner in a run folder: stopping, continuing, and refusing checkpoints that contain code."""

import json
import logging
import os
import pickle
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_segmentation import STEPS, train_command, user_error

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from addp_core.recipes.cli import main
from seg.runner import RunFolder
from seg.scenes import find_pairs


@contextmanager
def when_logged(message: str, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` in this block when a message with this beginning is logged."""

    def look(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith(message):
            act()
        return True

    log = logging.getLogger("addp")
    log.addFilter(look)
    try:
        yield
    finally:
        log.removeFilter(look)


def exit_code_after_signal(arguments: list[str], number: int, message: str) -> Any:
    """Return the exit code of a run that receives the signal when it logs a message with this beginning."""
    with when_logged(message, lambda: os.kill(os.getpid(), number)), pytest.raises(SystemExit) as raised:
        main(arguments)
    return raised.value.code


def test_a_stopped_run_continues_to_the_same_weights(trained_run, scenes, encoder_file, tmp_path):
    arguments = train_command(scenes, encoder_file, tmp_path / "run")
    assert exit_code_after_signal(arguments, signal.SIGINT, f"step 1/{STEPS}") == 1
    assert exit_code_after_signal(arguments, signal.SIGTERM, f"step 3/{STEPS}") == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert main(arguments) == 0
    continued, uninterrupted = (load_file(run / "model.safetensors") for run in (tmp_path / "run", trained_run))
    assert continued.keys() == uninterrupted.keys()
    assert all(torch.equal(continued[name], uninterrupted[name]) for name in uninterrupted)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"loss"') == STEPS


def test_an_evaluation_that_a_signal_stopped_is_repeated(scenes, encoder_file, tmp_path, monkeypatch):
    arguments = train_command(scenes, encoder_file, tmp_path / "run", "train.evaluate_every=2")
    uninterrupted = train_command(scenes, encoder_file, tmp_path / "uninterrupted", "train.evaluate_every=2")
    evaluate = RunFolder.after_val_iter

    def stop(hook, *given, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate(hook, *given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "after_val_iter", stop)
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
    assert stopped.value.code == 0
    assert evaluations(tmp_path / "run") == {}
    assert main(arguments) == 0
    assert main(uninterrupted) == 0
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "uninterrupted")
    assert evaluations(tmp_path / "run").keys() == {2, STEPS}


@pytest.mark.parametrize(("split", "step"), [("train", 2), ("val", 1)])
def test_a_scene_that_becomes_unreadable_costs_no_step(scenes_copy, encoder_file, tmp_path, capsys, split, step):
    """With two parts of a step, of which the second may be the one that cannot be read."""
    settings = ["train.steps=3", "train.accumulate=2", "train.evaluate_every=1", "train.checkpoint_every=0"]
    out, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    assert main(train_command(scenes_copy, encoder_file, uninterrupted, *settings)) == 0
    paths = [pair.image for pair in find_pairs(scenes_copy, split)]
    intact = [path.read_bytes() for path in paths]

    def truncate() -> None:
        for path, content in zip(paths, intact, strict=True):
            path.write_bytes(content[: len(content) // 2])

    arguments = train_command(scenes_copy, encoder_file, out, *settings)
    capsys.readouterr()
    with when_logged("step 1/3", truncate):
        assert str(scenes_copy / "images") in user_error(capsys, *arguments)
    assert max(path.name for path in (out / "checkpoints").iterdir()) == f"step-{step}"
    for path, content in zip(paths, intact, strict=True):
        path.write_bytes(content)
    assert main(arguments) == 0
    continued, expected = (load_file(run / "model.safetensors") for run in (out, uninterrupted))
    assert all(torch.equal(continued[name], expected[name]) for name in expected)
    assert evaluations(out) == evaluations(uninterrupted)


def test_an_evaluation_between_two_lines_of_metrics_does_not_change_them(trained_run, scenes, encoder_file, tmp_path):
    out = tmp_path / "run"
    assert main(train_command(scenes, encoder_file, out, "train.evaluate_every=1", f"train.log_every={STEPS}")) == 0
    (line,) = training_metrics(out)
    losses = [each["loss"] for each in training_metrics(trained_run)]  # each step's
    assert line["loss"] == pytest.approx(sum(losses) / STEPS, rel=1e-6)


def training_metrics(run: Path) -> list[dict[str, float]]:
    """Return the lines of metrics of a run's training."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    """Return the metrics of each evaluation of a run, by its step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "mIoU" in line}


class TouchOnUnpickling:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_are_read_without_executing_code(scenes, encoder_file, tmp_path, capsys):
    mark, malicious = tmp_path / "executed", tmp_path / "malicious.pth"
    torch.save({"model": {"weight": torch.zeros(1)}, "extra": TouchOnUnpickling(mark)}, malicious)
    assert "refused" in user_error(capsys, *train_command(scenes, malicious, tmp_path / "start"))
    arguments = ["seg", "predict", f"model={malicious}", f"images={scenes}", f"out={tmp_path}/predicted"]
    assert "refused" in user_error(capsys, *arguments)

    out = tmp_path / "run"
    step = out / "checkpoints" / "step-2"
    step.mkdir(parents=True)
    content = pickle.dumps(TouchOnUnpickling(mark))
    for write in (lambda path: path.write_bytes(content), lambda path: shutil.copy(malicious, path)):
        write(step / "training.pt")
        data = (step / "training.pt").read_bytes()
        state = {"step": 2, "size": len(data), "crc32": zlib.crc32(data), "iteration": 2, "iterations": STEPS}
        (step / "state.json").write_text(json.dumps(state))
        assert "training.pt" in user_error(capsys, *train_command(scenes, encoder_file, out))
    assert not mark.exists()
