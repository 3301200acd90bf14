"""The best model of a run, kept by a metric of its evaluations, and what evaluations cost."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from toy_stage import Faults, ToyStage, metrics, run

from addp_core.base.errors import UserError
from addp_core.training.best import keep_best
from addp_core.training.run_folder import BEST_METRICS, BEST_MODEL

KEEPING = ["train.evaluate_every=2", "train.keep_best=accuracy", "train.checkpoint_every=4"]


def evaluate_as(accuracies):
    """Return an evaluation with these results, by step."""

    def evaluate(self, model, step):
        return {"accuracy": accuracies.get(step, 0.0)}

    return evaluate


def test_the_best_model_is_that_of_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyStage, "evaluate", evaluate_as({4: 0.5, 8: 0.7, 10: 0.6}))
    run([f"out={tmp_path / 'run'}", *KEEPING, "train.export_every=8"])
    assert json.loads((tmp_path / "run" / BEST_METRICS).read_text()) == {"step": 8, "accuracy": 0.7}
    best, expected = (load_file(tmp_path / "run" / name) for name in (BEST_MODEL, "models/step-8/model.safetensors"))
    assert all(torch.equal(best[key], value) for key, value in expected.items())


def test_a_continued_run_keeps_the_same_best_model(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyStage, "evaluate", evaluate_as({4: 0.5, 8: 0.7}))
    for name, faults in (("run", None), ("stopped", Faults(signals={8: signal.SIGTERM}))):
        settings = [f"out={tmp_path / name}", *KEEPING]
        if faults:
            with pytest.raises(SystemExit):
                run(settings, faults)
        run(settings)
    assert (tmp_path / "run" / BEST_MODEL).read_bytes() == (tmp_path / "stopped" / BEST_MODEL).read_bytes()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "stopped")


def test_a_run_that_begins_again_forgets_the_best_model_of_before(tmp_path, monkeypatch):
    """A run that ended before its first checkpoint may be begun again with other settings."""

    def fail_after_two(self, model, step):
        if step > 4:
            raise RuntimeError("a failure")
        return {"accuracy": 0.9}

    settings = [f"out={tmp_path}", *KEEPING, "train.checkpoint_every=0"]
    monkeypatch.setattr(ToyStage, "evaluate", fail_after_two)
    with pytest.raises(RuntimeError, match="a failure"):
        run(settings)
    assert json.loads((tmp_path / BEST_METRICS).read_text()) == {"step": 2, "accuracy": 0.9}
    monkeypatch.setattr(ToyStage, "evaluate", evaluate_as({8: 0.7}))
    run([*settings, "train.lr=0.01", "train.export_every=8"])
    assert json.loads((tmp_path / BEST_METRICS).read_text()) == {"step": 8, "accuracy": 0.7}
    best, expected = (load_file(tmp_path / name) for name in (BEST_MODEL, "models/step-8/model.safetensors"))
    assert all(torch.equal(best[key], value) for key, value in expected.items())


def test_keeping_the_best_and_evaluating_change_no_number_of_training(tmp_path):
    run([f"out={tmp_path / 'plain'}"])
    run([f"out={tmp_path / 'kept'}", *KEEPING])
    plain, kept = (load_file(tmp_path / name / "model-raw.safetensors") for name in ("plain", "kept"))
    assert all(torch.equal(kept[key], value) for key, value in plain.items())
    training = [[line for line in metrics(tmp_path / name) if "loss" in line] for name in ("plain", "kept")]
    assert training[0] == training[1]


def test_a_misspelled_metric_is_an_error_before_training(tmp_path):
    with pytest.raises(UserError, match=r"train\.keep_best: found 'acuracy', expected .*did you mean 'accuracy'"):
        run([f"out={tmp_path}", "train.keep_best=acuracy"])
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("higher", "best"), [(True, 3), (False, 1)])
def test_best_is_the_highest_or_the_lowest_and_always_finite(tmp_path, higher, best, caplog):
    written = []
    for step, value in enumerate((float("nan"), 0.2, 0.3, 0.4, float("nan"), 0.3)):
        result = keep_best(tmp_path, step, {"m": value}, "m", {"m": higher}, written.append)
    assert result == {"step": best, "m": 0.4 if higher else 0.2}
    assert written == [tmp_path / BEST_MODEL] * (3 if higher else 1)
    assert keep_best(tmp_path, 6, {"other": 1.0}, "m", {"m": higher}, written.append) == result
    warnings = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in warnings] == ["step 0", "step 4", "step 6"]
    assert [line.partition("found ")[2] for line in warnings] == ["m=nan", "m=nan", "m=no value"]


def test_evaluations_log_what_they_cost(tmp_path):
    run([f"out={tmp_path}", "train.evaluate_every=4"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    costs = [(line["evaluation_seconds"], line["evaluation_share"]) for line in lines if "accuracy" in line]
    assert len(costs) == 3
    assert all(seconds > 0 and 0 < share < 100 for seconds, share in costs)
