"""Signals and failures in what follows a step: evaluation, preview and intermediate checkpoints."""

import signal

import pytest
from accelerate.state import PartialState
from ranks import Fault, run_ranks
from toy_stage import Faults, ToyStage, assert_same, checkpoint_names, metrics, run

from addp_core.base.errors import UserError
from addp_core.training.evaluation import check_evaluation

EVALUATING = ["train.evaluate_every=4", "train.checkpoint_every=0"]


@pytest.fixture(scope="module")
def uninterrupted_evaluations(tmp_path_factory):
    """A run of 12 steps that evaluates after each four of them."""
    out = tmp_path_factory.mktemp("evaluating")
    run([f"out={out}", *EVALUATING])
    return out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_in_an_evaluation_loses_no_step_and_the_evaluation_is_repeated(
    tmp_path, uninterrupted_evaluations, number, code
):
    settings = [f"out={tmp_path}", *EVALUATING]
    with pytest.raises(SystemExit) as stopped:
        run(settings, Faults(evaluation_signals={8: number}))
    assert stopped.value.code == code
    assert checkpoint_names(tmp_path) == ["step-8"]
    assert [line["step"] for line in metrics(tmp_path) if "accuracy" in line] == [4]
    run(settings)
    assert_same(tmp_path, uninterrupted_evaluations)


def test_a_signal_in_the_last_evaluation_leaves_the_run_unfinished(tmp_path, uninterrupted_evaluations):
    settings = [f"out={tmp_path}", *EVALUATING]
    with pytest.raises(SystemExit):
        run(settings, Faults(evaluation_signals={12: signal.SIGTERM}))
    assert not (tmp_path / "model.safetensors").exists()
    run(settings)
    assert_same(tmp_path, uninterrupted_evaluations)


def test_a_signal_to_one_process_ends_the_evaluation_of_all(tmp_path):
    fault = Fault("SIGTERM", "validation", rank=1)
    ended = run_ranks(["toy", f"out={tmp_path / 'run'}", *EVALUATING], tmp_path / "job", fault=fault)
    assert ended.codes == [0, 0], ended.text
    assert checkpoint_names(tmp_path / "run") == ["step-4"]


def test_a_failing_evaluation_comes_after_the_checkpoint(tmp_path, monkeypatch, uninterrupted_evaluations):
    settings = [f"out={tmp_path}", "train.evaluate_every=4", "train.checkpoint_every=4"]

    def fail(self, model, step):
        raise UserError("val: cannot be read")

    with monkeypatch.context() as patched:
        patched.setattr(ToyStage, "evaluate", fail)
        with pytest.raises(UserError):
            run(settings)
    assert checkpoint_names(tmp_path) == ["step-4"]
    run(settings)
    assert metrics(tmp_path) == metrics(uninterrupted_evaluations)


def test_a_continued_run_makes_up_for_previews_and_intermediate_checkpoints(tmp_path, monkeypatch):
    settings = [f"out={tmp_path}", "train.export_every=4", "train.preview_every=4", "train.steps=8"]

    def die(self, model, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ToyStage, "export", die)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    assert checkpoint_names(tmp_path) == ["step-4"]
    run(settings)
    assert (tmp_path / "models/step-4/model.safetensors").exists()
    assert (tmp_path / "images/noise-4.png").exists()


def test_errors_are_returned_only_beyond_the_limit():
    assert PartialState().num_processes == 1
    errors = [("a.png", "truncated"), ("b.png", "truncated")]
    assert check_evaluation(errors, 2) == []
    assert check_evaluation(errors, 1) == errors
