"""A run of the engine: what it leaves in its folder, the moving average, accumulation, and its random numbers."""

import logging
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from toy_stage import (
    ROUNDING_ONLY,
    Faults,
    Net,
    Recipe,
    ToyStage,
    ToyStream,
    assert_same,
    checkpoint_names,
    metrics,
    run,
)

from addp_core.base.rng import seed_for
from addp_core.training import engine
from addp_core.training.stage import MicroStep, Stage, TrainConfig


def test_a_run_leaves_model_metrics_and_images(uninterrupted):
    assert {path.name for path in uninterrupted.iterdir()} == {
        *("recipe.yaml", "metrics.jsonl", "tb", "images", "checkpoints", "last_checkpoint.json"),
        *("finished.json", "model.safetensors", "model-raw.safetensors", ".lock"),
    }
    assert checkpoint_names(uninterrupted) == ["step-12", "step-8"]
    assert {path.name for path in (uninterrupted / "images").iterdir()} == {"noise-6.png", "noise-12.png", "curves.png"}
    with safe_open(uninterrupted / "model.safetensors", "pt") as file:
        assert file.metadata() == {"kind": "toy"}
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == [4, 8, 12, 12]
    assert lines[0]["epoch"] == 0.8
    assert lines[0]["images"] == 32
    assert lines[0]["lr"] == 0.05
    assert lines[-1].keys() == {"step", "accuracy"}
    assert lines[2]["loss"] < lines[0]["loss"]
    assert {"ce", "size", "grad_norm", "seen", "skipped"} <= lines[0].keys()
    assert list((uninterrupted / "tb").iterdir())


def test_checkpoints_hold_only_the_stages_model(uninterrupted):
    saved = torch.load(uninterrupted / "checkpoints/step-12/training.pt", weights_only=True)
    assert saved.keys() == {"model", "optimizer", "ema"}
    assert set(saved["model"]) == set(saved["ema"]) == set(Net(0, True).state_dict())


def test_a_finished_run_returns_at_once(uninterrupted, caplog):
    caplog.set_level(logging.INFO)
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert run([f"out={uninterrupted}"], Faults(nan_loss=tuple(range(12)))) == uninterrupted / "model.safetensors"
    assert "finished" in caplog.text
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_the_moving_average_follows_its_formula(tmp_path):
    """ema <- d ema + (1 - d) weight, where d = min(`ema`, 1 - (1 + n)^(-2/3)) for update n = 0, 1, ..."""
    weights = []

    class RecordingStage(ToyStage):
        def after_step(self, model, micro_step, accelerator):
            weights.append(model.head.weight.detach().clone())
            return {}

    config = TrainConfig(steps=6, batch=8, lr=0.05, ema=0.6, checkpoint_every=0)
    engine.train(RecordingStage(), ToyStream(0, 8), config, tmp_path / "run", "{}")
    average = weights[0]
    for n, weight in enumerate(weights):
        decay = min(0.6, 1 - (1 + n) ** (-2 / 3))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(load_file(tmp_path / "run/model.safetensors")["head.weight"], average, atol=1e-6)
    assert torch.equal(load_file(tmp_path / "run/model-raw.safetensors")["head.weight"], weights[-1])


def test_the_exported_model_is_the_one_that_was_evaluated(tmp_path, uninterrupted):
    """With an evaluation, metrics and model.safetensors are those of the averaged weights; otherwise the model has the
    last weights and model-ema.safetensors the average.
    """

    class StageWithoutEvaluation(ToyStage):
        evaluate = Stage.evaluate

    final = ToyStage()
    final.model.load_state_dict(load_file(uninterrupted / "model.safetensors"))
    final.model.eval()
    assert final.evaluate(final.model, 12) == {"accuracy": metrics(uninterrupted)[-1]["accuracy"]}

    engine.train(StageWithoutEvaluation(), ToyStream(0, 8), Recipe("run").train, tmp_path / "run", "{}")
    for name, evaluated in (("model-ema", "model"), ("model", "model-raw")):
        ours = load_file(tmp_path / f"run/{name}.safetensors")
        theirs = load_file(uninterrupted / f"{evaluated}.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_intermediate_checkpoints(tmp_path, uninterrupted):
    """They hold the weights of the checkpoint at that step, and writing them does not change the run."""
    run([f"out={tmp_path}", "train.export_every=4", "train.checkpoint_every=4", "train.keep=9", "train.ema=0.9"])
    models = tmp_path / "models"
    assert sorted(folder.name for folder in models.iterdir()) == ["step-4", "step-8"]
    for folder in models.iterdir():
        weights = load_file(folder / "model.safetensors")
        saved = torch.load(tmp_path / "checkpoints" / folder.name / "training.pt", weights_only=True)
        assert all(torch.equal(weights[name], saved["ema"][name]) for name in weights)
        raw = load_file(folder / "model-raw.safetensors")
        assert all(torch.equal(raw[name], saved["model"][name]) for name in raw)
    run([f"out={tmp_path / 'plain'}", "train.export_every=4"])
    assert_same(tmp_path / "plain", uninterrupted)


def test_gradient_accumulation_equals_a_large_batch(tmp_path):
    class CrossEntropyStage(ToyStage):
        def loss(self, model, batch, micro_step):
            return {"loss": super().loss(model, batch, micro_step)["ce"]}

    losses = []
    for accumulate in (1, 4):
        config = TrainConfig(steps=12, batch=8, accumulate=accumulate, lr=0.05, log_every=1)
        out = tmp_path / str(accumulate)
        engine.train(CrossEntropyStage(0.0, False), ToyStream(0, config.micro_batch), config, out, "{}")
        losses.append([line["loss"] for line in metrics(out) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_compute_only_switches_change_no_more_than_rounding(tmp_path):
    run([f"out={tmp_path / 'plain'}", *ROUNDING_ONLY])
    run([f"out={tmp_path / 'last'}", *ROUNDING_ONLY, "train.channels_last=true"])
    for ours, theirs in zip(metrics(tmp_path / "last"), metrics(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_generators_are_shared_by_all_processes_or_their_own():
    steps = [MicroStep(3, 1, 2, rank, 2, 8, slice(4 * rank, 4 * rank + 4)) for rank in (0, 1)]
    shared = [torch.rand(4, generator=step.generator("mask")) for step in steps]
    own = [torch.rand(4, generator=step.generator("mask", shared=False)) for step in steps]
    assert torch.equal(*shared)
    assert not torch.equal(*own)
    assert not torch.equal(shared[0], torch.rand(4, generator=steps[0].generator("step")))


def test_randomness_is_a_function_of_the_step(tmp_path):
    """Random numbers that a stage draws in between do not change later ones."""

    class DrawingStage(ToyStage):
        def after_step(self, model, micro_step, accelerator):
            torch.rand(micro_step.step)
            return super().after_step(model, micro_step, accelerator)

    config = TrainConfig(steps=5, batch=8, lr=0.05, log_every=1)
    for name, stage in (("plain", ToyStage), ("drawing", DrawingStage)):
        engine.train(stage(), ToyStream(0, 8), config, tmp_path / name, "{}")
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "drawing")
    assert seed_for(0, "step", 1, 0) != seed_for(0, "step", 1, 1)
    assert math.isfinite(metrics(tmp_path / "plain")[0]["loss"])


@pytest.mark.parametrize("method", ["preview", "evaluate", "export"])
def test_a_failure_after_the_last_step_costs_no_training(method, tmp_path, uninterrupted, monkeypatch, caplog):
    def fail(self, *_):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(ToyStage, method, fail)
        with pytest.raises(RuntimeError, match="broken"):
            run([f"out={tmp_path}", "train.preview_every=0"])
    caplog.clear()
    with caplog.at_level(logging.INFO, "addp"):
        run([f"out={tmp_path}", "train.preview_every=0"])
    assert "continues from step 12" in caplog.text
    for name in ("model.safetensors", "model-raw.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(uninterrupted / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
