"""Trackers get what metrics.jsonl and images/ hold, every step once, and never stop a run."""

import importlib.util
import json
import logging
import signal
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from toy_stage import Faults, run, start_process, stopped_run, wait_for
from tracker_files import Steps, read_mlflow, read_tensorboard, read_trackio, read_wandb, recorded

from addp_core.base.errors import UserError
from addp_core.recipes import cli
from addp_core.training import tracker_backends

KEYS = ["train.tracker_project=a project", "train.log_every=1", "train.preview_every=3", "train.evaluate_every=5"]


def installed(name: str):
    missing = importlib.util.find_spec(name) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{name} is not installed (addp[trackers])"))


@pytest.fixture
def environment(tmp_path, monkeypatch) -> dict[str, str]:
    """Let trackers write into tmp_path, offline."""
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # where MLflow puts the artifacts of a database
    return environment


@pytest.fixture
def settings(tmp_path, environment) -> list[str]:
    return [f"out={tmp_path / 'run'}", *KEYS]


def check_every_step_once(found: Steps, out: Path) -> None:
    expected = recorded(out)
    assert expected["images/noise"] == [3, 6, 9, 12]
    assert expected["train/loss"] == [*range(1, 13)]
    assert expected["evaluate/accuracy"] == [5, 10, 12]
    assert {name: found.get(name) for name in expected} == expected


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.mark.parametrize("name", [installed(name) for name in ("tensorboard", "wandb", "mlflow", "trackio")])
def test_a_killed_and_a_stopped_run_is_one_run_with_every_step_once(
    name, settings, environment, tmp_path, uninterrupted
):
    settings = [*settings, f"train.trackers=[{name}]"]

    def exit_code(faults: Faults | None = None) -> int:
        return wait_for(start_process(settings, faults, environment=environment), limit=300)

    assert exit_code(Faults(signals={7: signal.SIGKILL})) == -signal.SIGKILL  # after step 7; the checkpoint is of 4
    assert exit_code(Faults(evaluation_signals={10: signal.SIGTERM})) == 0  # step 10 has no evaluation yet
    assert exit_code() == 0
    if name == "mlflow":
        found = read_mlflow(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    else:
        found = READERS[name](tmp_path)
    check_every_step_once(found, tmp_path / "run")
    assert_same_weights(tmp_path / "run", uninterrupted)


def assert_same_weights(out: Path, expected: Path) -> None:
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", [installed("mlflow")])
def test_mlflow_with_a_file_store_goes_on_where_the_run_is(name, settings, environment, tmp_path, uninterrupted):
    uri = (tmp_path / "mlruns").as_uri()
    settings = [*settings, f"train.trackers=[{name}]"]
    for exit_code, faults, where in (
        (-signal.SIGKILL, Faults(signals={7: signal.SIGKILL}), uri),
        (0, None, ""),
    ):
        environment |= {"MLFLOW_TRACKING_URI": where}
        assert wait_for(start_process(settings, faults, environment=environment), limit=300) == exit_code
    check_every_step_once(read_mlflow(tmp_path, uri), tmp_path / "run")


def test_event_files_have_every_step_once_after_tensorboard_was_away(settings, tmp_path):
    """A tracker that is added later gets what the record has."""
    out = tmp_path / "run"
    stopped_run_with = [*settings, "train.trackers=[]"]
    with pytest.raises(SystemExit):
        run(stopped_run_with, Faults(signals={6: signal.SIGTERM}))
    assert not (out / "tb").exists()
    run(settings)
    check_every_step_once(read_tensorboard(tmp_path), out)


def test_the_default_is_tensorboard_alone(tmp_path):
    stopped_run(tmp_path / "run")
    assert (tmp_path / "run/tb").exists()
    assert not (tmp_path / "run/trackers.json").exists()
    run([f"out={tmp_path / 'run'}"])
    assert read_tensorboard(tmp_path)["train/loss"] == [4, 8, 12]


class Failing(tracker_backends.Backend):
    """A tracker that fails in the method of this name, from a step on."""

    name = "mlflow"
    method, since = "", 0
    logged: ClassVar[list[int]] = []

    def start(self):
        self.id = self.stored.get("id") or "1234"
        self._fail("start")

    def log(self, step, metrics, images):
        if step >= self.since:
            self._fail("log")
        self.logged.append(step)

    def finish(self, complete):
        self._fail("finish")

    def _fail(self, method):
        if method == self.method:
            raise ConnectionError("no route to host\nand a long explanation")


@pytest.fixture
def failing(monkeypatch):
    monkeypatch.setitem(tracker_backends.BACKENDS, "mlflow", Failing)
    monkeypatch.setattr("addp_core.training.run_folder.check_installed", lambda names: None)
    monkeypatch.setattr(Failing, "logged", [])
    return monkeypatch


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(
    method, failing, settings, tmp_path, caplog, uninterrupted
):
    failing.setattr(Failing, "method", method)
    with caplog.at_level(logging.WARNING):
        run([*settings, "train.trackers=[mlflow,tensorboard]"])
    [warning] = [record.message for record in caplog.records if "train.trackers" in record.message]
    assert "mlflow failed (ConnectionError: no route to host)" in warning
    check_every_step_once(read_tensorboard(tmp_path), tmp_path / "run")
    assert_same_weights(tmp_path / "run", uninterrupted)


def test_a_tracker_that_failed_gets_what_it_missed_when_the_run_continues(failing, settings):
    settings = [*settings, "train.trackers=[mlflow]"]
    failing.setattr(Failing, "method", "log")
    failing.setattr(Failing, "since", 3)
    with pytest.raises(SystemExit):
        run(settings, Faults(signals={8: signal.SIGTERM}))
    assert Failing.logged == [1, 2]
    failing.setattr(Failing, "method", "")
    run(settings)
    assert Failing.logged == [*range(1, 13)]


def test_another_project_is_another_run_with_all_steps(failing, settings, tmp_path):
    settings = [*settings, "train.trackers=[mlflow]"]
    with pytest.raises(SystemExit):
        run(settings, Faults(signals={8: signal.SIGTERM}))
    run([*settings, "train.tracker_project=another"])
    assert Failing.logged == [*range(1, 9), *range(1, 13)]
    assert json.loads((tmp_path / "run/trackers.json").read_text())["runs"]["mlflow"]["project"] == "another"


def test_a_run_that_starts_again_with_another_recipe_is_another_run(failing, settings, tmp_path):
    """Before its first checkpoint a run may be corrected."""
    settings = [*settings, "train.trackers=[mlflow]", "train.checkpoint_every=0"]

    def interrupted(*more: str) -> str:
        failing.setattr(Failing, "log", lambda self, step, *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            run([*settings, *more])
        return (tmp_path / "run/trackers.json").read_text()

    first = json.loads(interrupted())
    assert json.loads(interrupted()) == first
    assert json.loads(interrupted("train.lr=0.01"))["recipe"] != first["recipe"]


def test_errors_come_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tracker_backends, "find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(UserError, match=r"train.trackers: mlflow is not installed; expected pip install"):
        run([f"out={tmp_path}", "train.trackers=[mlflow]"])
    assert not (tmp_path / "recipe.yaml").exists()


def test_an_unknown_tracker_is_one_line(tmp_path, capsys):
    settings = ["pretrain", "tiny", f"out={tmp_path}", "data=.", "train.trackers=[wandv]"]
    assert cli.main(settings) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "train.trackers" in line
    assert "wandb" in line
