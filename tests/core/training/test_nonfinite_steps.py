"""Losses, gradients and weights that are not finite, and the loss scale of fp16."""

import signal

import pytest
import torch
from toy_stage import Faults, assert_same, checkpoint_names, metrics, run

from addp_core.base.errors import UserError
from addp_core.training import engine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_step_is_skipped_and_changes_nothing(precision, tmp_path, caplog):
    """Skipped steps leave the weights, the buffers and the moving average as they were."""
    faults = Faults(nan_loss=(5,), nan_gradient=(6, 7))
    options = [f"train.precision={precision}", "train.checkpoint_every=1", "train.keep=20"]
    run([f"out={tmp_path}", *options], faults)
    saved = [torch.load(tmp_path / f"checkpoints/step-{step}/training.pt", weights_only=True) for step in range(1, 13)]
    for step in (6, 7, 8):
        for part in ("model", "ema"):
            for name, value in saved[step - 1][part].items():
                assert torch.equal(value, saved[4][part][name]), (step, part, name)
    assert not torch.equal(saved[8]["model"]["conv.weight"], saved[4]["model"]["conv.weight"])
    assert all(value.isfinite().all() for value in saved[-1]["model"].values())
    assert "step 6: not finite: loss, ce" in caplog.text
    assert "step 7: not finite: grad_norm" in caplog.text
    assert "step skipped, 3 in a row" in caplog.text
    assert metrics(tmp_path)[-2]["skipped"] == 3
    assert all(line["loss"] is not None for line in metrics(tmp_path)[:-1])


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path):
    faults = Faults(nan_loss=tuple(range(5, 12)))
    message = (
        r"step 9: not finite: loss, ce, grad_norm \(all: loss nan, ce nan, size .*; lr 0.0\d+\); "
        r"4 such steps in a row \(train.max_nonfinite\), the last checkpoint, .*step-8, is intact"
    )
    with pytest.raises(UserError, match=message) as error:
        run([f"out={tmp_path}", "train.max_nonfinite=4"], faults)
    assert "\n" not in str(error.value)
    run([f"out={tmp_path}", "train.max_nonfinite=5"])
    assert metrics(tmp_path)[-2]["skipped"] == 3  # steps 5, 6 and 7, before the checkpoint


def test_the_number_of_bad_steps_in_a_row_survives_a_restart(tmp_path):
    faults = Faults(nan_loss=tuple(range(5, 12)), signals={7: signal.SIGTERM})
    with pytest.raises(SystemExit):
        run([f"out={tmp_path}", "train.max_nonfinite=4"], faults)
    with pytest.raises(UserError, match=r"step 9: .* 4 such steps in a row"):
        run([f"out={tmp_path}", "train.max_nonfinite=4"], faults)


def test_weights_that_overflow_never_reach_a_checkpoint(tmp_path, caplog):
    options = ["train.optimizer=sgd", "train.clip_grad=null", "train.lr=1e30", "norm=false"]
    options += ["train.warmup_steps=0", "train.schedule=constant", "train.max_nonfinite=3", "train.checkpoint_every=1"]
    with pytest.raises(UserError, match="3 such steps in a row"):
        run([f"out={tmp_path}", *options], Faults(huge_gradient=0))
    assert "weights are not finite, no checkpoint is written" in caplog.text
    assert checkpoint_names(tmp_path) == []


def test_fp16_overflow_lowers_the_scale_and_resumes_exactly(tmp_path, monkeypatch):
    """Use fp16 with a loss scale on a CPU, which accelerate supports on GPUs only."""
    make = engine.make_accelerator

    def make_fp16(precision, find_unused):
        accelerator = make(precision, find_unused)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        return accelerator

    monkeypatch.setattr(engine, "make_accelerator", make_fp16)
    faults = Faults(nan_loss=(4,))
    run([f"out={tmp_path / 'uninterrupted'}"], faults)
    with pytest.raises(SystemExit):
        run([f"out={tmp_path / 'run'}"], Faults(nan_loss=(4,), signals={6: signal.SIGTERM}))
    run([f"out={tmp_path / 'run'}"], faults)
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")
    scaler = [torch.load(tmp_path / f"{o}/checkpoints/step-12/training.pt")["scaler"] for o in ("run", "uninterrupted")]
    assert scaler[0] == scaler[1]
    assert scaler[0]["scale"] < 2.0**30
    assert metrics(tmp_path / "run")[-2]["skipped"] == 1


def test_fp16_needs_a_gpu(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(UserError, match=r"train.precision=fp16: needs a GPU"):
        run([f"out={tmp_path}", "train.precision=fp16"])


def test_values_read_one_step_late_give_the_same_run(tmp_path, monkeypatch):
    """As on a GPU, the host reads the values of a step when the next one is under way, and no later than needed."""
    faults = Faults(nan_loss=(2, 5), nan_gradient=(6, 7))
    run([f"out={tmp_path / 'at_once'}"], faults)
    monkeypatch.setattr(engine, "LATE_DEVICES", ("cpu",))
    with pytest.raises(SystemExit):
        run([f"out={tmp_path / 'late'}"], Faults({4: signal.SIGTERM}, nan_loss=(2, 5), nan_gradient=(6, 7)))
    assert checkpoint_names(tmp_path / "late") == ["step-4", "step-6"]  # the signal came in the fifth step
    run([f"out={tmp_path / 'late'}"], faults)
    assert_same(tmp_path / "late", tmp_path / "at_once")
    with pytest.raises(UserError, match=r"step 8: .* 3 such steps in a row"):
        run([f"out={tmp_path / 'bad'}", "train.max_nonfinite=3"], faults)


def test_optimizers_that_cannot_skip_a_step_wait_for_its_values(tmp_path):
    options = ["train.optimizer=lamb", "train.checkpoint_every=1", "train.keep=20"]
    run([f"out={tmp_path}", *options], Faults(nan_gradient=(6,)))
    saved = [torch.load(tmp_path / f"checkpoints/step-{step}/training.pt", weights_only=True) for step in (6, 7, 8)]
    weights = [part["model"]["conv.weight"] for part in saved]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
