"""The training loop: the same numbers whatever happens to the process, the disk, the batch's split or the loss."""

import errno
import json
import logging
import math
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import toy_stage
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import load_file
from toy_stage import Faults, Net, Recipe, ToyStage, ToyStream, finish, run, start

from addp_core.base.errors import UserError
from addp_core.base.rng import seed_for
from addp_core.training import engine, run_folder
from addp_core.training.engine import TrainConfig, learning_rate, make_optimizer, prepare_out
from addp_core.training.stage import Stage

TIMED = ("img_s",)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread; curves, which take a second to draw, only of the run `whole`."""
    monkeypatch.setattr(run_folder.Report, "curves", lambda self: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run([f"out={out}"])
    return out


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def assert_same(out: Path, whole: Path) -> None:
    """Bit for bit: weights, buffers, average, optimizer, figures."""
    for name in ("model.safetensors", "model-raw.safetensors"):
        ours, theirs = load_file(out / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), (name, key)
    ours, theirs = (torch.load(next((o / "checkpoints").glob("step-12")) / "training.pt") for o in (out, whole))
    for index, state in theirs["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(ours["optimizer"]["state"][index][key], value), (index, key)
    assert metrics(out) == metrics(whole)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


# --- schedule and parameter groups ---


def test_learning_rate_rises_by_the_iteration_and_falls_by_half_a_cosine():
    config = TrainConfig(batch=512, base_lr=1e-3, min_lr=1e-4)
    rates = [learning_rate(step, 100, 10, config) for step in range(101)]
    assert config.peak_lr == 2e-3
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1e-3)
    assert rates[10] == 2e-3
    assert rates[55] == pytest.approx((2e-3 + 1e-4) / 2)
    assert rates[100] == pytest.approx(1e-4)
    assert learning_rate(99, 100, 2.5, TrainConfig(lr=0.3, schedule="constant")) == 0.3
    assert learning_rate(1, 100, 2.5, TrainConfig(lr=0.3)) == pytest.approx(0.3 / 2.5)


def test_weight_decay_spares_vectors_and_layer_decay_scales_rates():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=4)
    optimizer = make_optimizer(vit, TrainConfig(layer_decay=0.5, betas=(0.8, 0.9), weight_decay=0.1))
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    names = {name: found[id(p)] for name, p in vit.named_parameters()}
    assert names["blocks.0.attn.qkv.weight"]["weight_decay"] == 0.1
    for spared in ("blocks.0.attn.qkv.bias", "blocks.2.norm1.weight", "pos_embed", "cls_token", "head.bias"):
        assert names[spared]["weight_decay"] == 0, spared
    assert names["head.weight"]["lr_scale"] == 1
    assert names["blocks.1.mlp.fc1.weight"]["lr_scale"] == 2 * names["blocks.0.mlp.fc1.weight"]["lr_scale"]
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    sgd = make_optimizer(Net(0, True), TrainConfig(optimizer="sgd", momentum=0.7, weight_decay=0.1))
    assert sgd.defaults["momentum"] == 0.7
    assert {group["weight_decay"]: len(group["params"]) for group in sgd.param_groups} == {0.0: 4, 0.1: 2}


def test_draw_gives_the_same_numbers_everywhere_or_one_process_its_own():
    draws = [engine.Draw(3, 1, 2, rank, 2, 8, slice(4 * rank, 4 * rank + 4)) for rank in (0, 1)]
    shared = [torch.rand(4, generator=draw.generator("mask")) for draw in draws]
    own = [torch.rand(4, generator=draw.generator("mask", shared=False)) for draw in draws]
    assert torch.equal(*shared)
    assert not torch.equal(*own)
    assert not torch.equal(shared[0], torch.rand(4, generator=draws[0].generator("step")))


# --- a run and what it leaves ---


def test_a_run_leaves_model_figures_and_pictures(whole):
    assert {path.name for path in whole.iterdir()} == {
        *("recipe.yaml", "metrics.jsonl", "tb", "images", "checkpoints", "finished.json", ".lock"),
        *("model.safetensors", "model-raw.safetensors"),
    }
    assert checkpoints(whole) == ["step-12", "step-8"]
    assert {path.name for path in (whole / "images").iterdir()} == {"noise-6.png", "noise-12.png", "curves.png"}
    with safe_open(whole / "model.safetensors", "pt") as file:
        assert file.metadata() == {"kind": "toy"}
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [4, 8, 12, 12]
    assert lines[0]["epoch"] == 0.8
    assert lines[0]["images"] == 32
    assert lines[0]["lr"] == 0.05
    assert lines[-1].keys() == {"step", "accuracy"}
    assert lines[2]["loss"] < lines[0]["loss"]
    assert {"ce", "size", "grad_norm", "seen", "skipped"} <= lines[0].keys()
    assert list((whole / "tb").iterdir())


def test_checkpoints_hold_the_stages_model_and_nothing_else(whole):
    saved = torch.load(whole / "checkpoints/step-12/training.pt", weights_only=True)
    assert saved.keys() == {"model", "optimizer", "ema"}
    assert set(saved["model"]) == set(saved["ema"]) == set(Net(0, True).state_dict())


def test_a_finished_run_returns_at_once(whole, caplog):
    caplog.set_level(logging.INFO)
    before = (whole / "metrics.jsonl").read_bytes()
    assert run([f"out={whole}"], Faults(nan_loss=tuple(range(12)))) == whole / "model.safetensors"
    assert "finished" in caplog.text
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_the_average_follows_its_formula(tmp_path):
    """ema <- d ema + (1 - d) weight, with d warmed up as 1 - (1 + n)^(-2/3) for update n = 0, 1, ..., at most `ema`."""
    seen = []

    class Watched(ToyStage):
        def after_step(self, model, draw, accelerator):
            seen.append(model.head.weight.detach().clone())
            return {}

    config = TrainConfig(steps=6, batch=8, lr=0.05, ema=0.6, checkpoint_every=0)
    engine.train(Watched(), ToyStream(0, 8), config, tmp_path / "run", "{}")
    average = seen[0]
    for n, weight in enumerate(seen):
        decay = min(0.6, 1 - (1 + n) ** (-2 / 3))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(load_file(tmp_path / "run/model.safetensors")["head.weight"], average, atol=1e-6)
    assert torch.equal(load_file(tmp_path / "run/model-raw.safetensors")["head.weight"], seen[-1])


def test_the_model_is_what_was_measured(tmp_path, whole):
    """The figures are the average's, and so is the file; without figures the average lies beside the last weights."""

    class Unmeasured(ToyStage):
        evaluate = Stage.evaluate

    final = ToyStage()
    final.model.load_state_dict(load_file(whole / "model.safetensors"))
    final.model.eval()
    assert final.evaluate(final.model, 12) == {"accuracy": metrics(whole)[-1]["accuracy"]}

    engine.train(Unmeasured(), ToyStream(0, 8), Recipe("run").train, tmp_path / "run", "{}")
    for name, measured in (("model-ema", "model"), ("model", "model-raw")):
        ours, theirs = load_file(tmp_path / f"run/{name}.safetensors"), load_file(whole / f"{measured}.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- stopped and continued ---


@pytest.mark.parametrize(
    ("number", "code", "continues_from"),
    [(signal.SIGTERM, 0, 7), (signal.SIGUSR1, 0, 7), (signal.SIGINT, 1, 7), (signal.SIGKILL, -signal.SIGKILL, 4)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_stopped_and_continued_equals_never_stopped(number, code, continues_from, tmp_path, whole):
    out, log = tmp_path / "run", tmp_path / "log"
    assert finish(start([f"out={out}"], Faults(signals={6: number}), log)) == code
    assert not (out / "model.safetensors").exists()
    if number != signal.SIGKILL:
        assert checkpoints(out) == ["step-4", "step-7"]
        assert "stopped by a signal after step 7" in log.read_text()
    assert finish(start([f"out={out}"], None, log)) == 0
    assert f"continues from step {continues_from}" in log.read_text()
    assert_same(out, whole)


@pytest.mark.parametrize("settings", [["train.precision=bf16"], ["train.accumulate=2"], ["train.optimizer=sgd"]])
def test_resuming_is_exact_in_other_settings_too(settings, tmp_path):
    settings = [*settings, "train.checkpoint_every=0"]
    run([f"out={tmp_path / 'whole'}", *settings])
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            run([f"out={tmp_path / 'run'}", *settings], Faults(signals={2: signal.SIGTERM, 5: signal.SIGTERM}))
        assert stopped.value.code == 0
    run([f"out={tmp_path / 'run'}", *settings])
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_killed_from_outside_at_any_moment(tmp_path, whole):
    out = tmp_path / "run"
    for pause in (0.0, 0.02, 0.05):
        process = start([f"out={out}", "train.log_every=4"])
        while process.exitcode is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.005)
        time.sleep(pause)
        process.kill()
        process.join()
    run([f"out={out}"])
    assert_same(out, whole)


def kill_at_write(count: int) -> None:
    write, calls = run_folder._Writer.write, []

    def killing(self, data):
        calls.append(data)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    run_folder._Writer.write = killing


def kill_at_rename(name: str, after: bool) -> None:
    rename = os.rename

    def killing(source, target):
        if after:
            rename(source, target)
        if Path(source).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        if not after:
            rename(source, target)

    os.rename = killing


@pytest.mark.parametrize(
    ("moment", "left", "continues_from"),
    [
        (partial(kill_at_write, 10), [".tmp-step-4"], 0),
        (partial(kill_at_rename, ".tmp-step-8", False), [".tmp-step-8", "step-4"], 4),
        (partial(kill_at_rename, ".tmp-step-8", True), ["step-4", "step-8"], 8),
        (partial(kill_at_rename, "step-4", False), ["step-12", "step-4", "step-8"], 12),
        (partial(kill_at_rename, "step-4", True), [".tmp-old-step-4", "step-12", "step-8"], 12),
    ],
    ids=["in-the-file", "before-the-rename", "after-the-rename", "before-the-old-goes", "while-the-old-goes"],
)
def test_a_kill_during_a_checkpoint_loses_nothing_older(moment, left, continues_from, tmp_path, whole):
    out, log = tmp_path / "run", tmp_path / "log"
    assert finish(start([f"out={out}"], None, log, before=moment)) == -signal.SIGKILL
    assert checkpoints(out) == left
    assert finish(start([f"out={out}"], None, log)) == 0
    assert (f"continues from step {continues_from}" in log.read_text()) == (continues_from > 0)
    assert checkpoints(out) == ["step-12", "step-8"]
    assert_same(out, whole)


def test_a_second_interrupt_stops_at_once(tmp_path):
    class Impatient(ToyStage):
        def loss(self, model, batch, draw):
            os.kill(os.getpid(), signal.SIGINT)
            return super().loss(model, batch, draw)

    config = TrainConfig(steps=4, batch=8, accumulate=2)
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started the tests in the background
    with pytest.raises(KeyboardInterrupt):
        engine.train(Impatient(), ToyStream(0, 4), config, tmp_path, "{}")
    assert checkpoints(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is before


# --- damaged checkpoints, full disks ---


def stopped_run(out: Path, step: int = 9) -> None:
    with pytest.raises(SystemExit):
        run([f"out={out}"], Faults(signals={step: signal.SIGTERM}))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no state", "no file"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, tmp_path, whole, caplog):
    out = tmp_path / "run"
    stopped_run(out)
    assert checkpoints(out) == ["step-10", "step-8"]
    path = out / "checkpoints/step-10/training.pt"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "no state":
        path.with_name("state.json").write_text('{"step":')
    else:
        path.unlink()
    run([f"out={out}"])
    assert "step-10: damaged" in caplog.text
    assert checkpoints(out) == ["damaged-step-10", "step-12", "step-8"]
    assert_same(out, whole)


def test_without_any_sound_checkpoint_the_run_does_not_start_over(tmp_path):
    stopped_run(tmp_path)
    for path in tmp_path.glob("checkpoints/*/training.pt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint can be read: step-10 \(.*, step-8 \(.*start over"):
        run([f"out={tmp_path}"])


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def test_a_checkpoint_that_would_run_code_is_refused_unexecuted(tmp_path, monkeypatch):
    stopped_run(tmp_path / "run")
    monkeypatch.setenv("HOSTILE", str(tmp_path / "executed"))
    folder = tmp_path / "run/checkpoints/step-10"
    torch.save({"model": Hostile()}, folder / "training.pt")
    content = (folder / "training.pt").read_bytes()
    (folder / "state.json").write_text(json.dumps({"step": 10, "size": len(content), "crc32": zlib.crc32(content)}))
    with pytest.raises(UserError, match="more than tensors"):
        run([f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "executed").exists()  # it would have


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    stopped_run(tmp_path)
    text = (tmp_path / "recipe.yaml").read_text().replace("norm: true", "norm: false")
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"does not fit this model: missing \[\], unknown \['norm.bias'"):
        run([f"out={tmp_path}", "norm=false"])


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_during_checkpoints(tmp_path, whole):
    """A real EFBIG: no file of the process may grow beyond what training.pt needs."""
    out, log = tmp_path / "run", tmp_path / "log"
    assert finish(start([f"out={out}"], Faults(signals={4: signal.SIGKILL}), log)) == -signal.SIGKILL
    size = (out / "checkpoints/step-4/training.pt").stat().st_size
    assert finish(start([f"out={out}"], None, log, before=partial(limit_files, size // 2))) == 2
    lines = log.read_text().splitlines()
    warnings = [line for line in lines if "not written" in line]
    assert "step-8: not written (File too large); older checkpoints are intact" in warnings[0]
    assert warnings[-1].startswith("addp: ")
    assert "step-12: not written (File too large)" in warnings[-1]
    assert checkpoints(out) == ["step-4"]
    assert finish(start([f"out={out}"], None, log)) == 0
    assert_same(out, whole)


def test_three_refused_checkpoints_in_a_row_end_the_run(tmp_path, monkeypatch, caplog):
    def full(payload, path):
        path.write_bytes(b"a part of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "_save", full)
    with pytest.raises(UserError, match=r"step-3: not written \(No space left on device\)"):
        run([f"out={tmp_path}", "train.checkpoint_every=1"])
    assert len([record for record in caplog.records if "not written" in record.message]) == 2
    assert checkpoints(tmp_path) == []


def test_a_disk_that_refuses_the_model_or_the_figures(tmp_path, monkeypatch, caplog, whole):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ToyStage, "export", full)
        patch.setattr("torchvision.utils.save_image", full)
        with pytest.raises(UserError, match=r"trained model could not be written \(No space left.*intact"):
            run([f"out={tmp_path}"])
    assert "noise-6.png: not written (No space left on device); the run continues" in caplog.text
    assert not list(tmp_path.glob("*.safetensors"))
    run([f"out={tmp_path}"])
    assert_same(tmp_path, whole)


# --- losses that are not finite ---


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_step_is_skipped_counted_and_leaves_no_trace(precision, tmp_path, caplog):
    """With the rate at zero around it, a skipped step must leave the very same weights, buffers and moments."""
    faults = Faults(nan_loss=(5,), nan_gradient=(6, 7))
    options = [f"train.precision={precision}", "train.checkpoint_every=1", "train.keep=20"]
    run([f"out={tmp_path}", *options], faults)
    at = [torch.load(tmp_path / f"checkpoints/step-{step}/training.pt", weights_only=True) for step in range(1, 13)]
    for step in (6, 7, 8):
        for part in ("model", "ema"):
            for name, value in at[step - 1][part].items():
                assert torch.equal(value, at[4][part][name]), (step, part, name)
    assert not torch.equal(at[8]["model"]["conv.weight"], at[4]["model"]["conv.weight"])
    assert all(value.isfinite().all() for value in at[-1]["model"].values())
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


def test_the_count_in_a_row_survives_a_restart(tmp_path):
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
    assert checkpoints(tmp_path) == []


def test_fp16_overflow_lowers_the_scale_and_resumes_exactly(tmp_path, monkeypatch):
    """fp16 with its loss scale on a CPU, which accelerate offers on GPUs only."""
    make = engine._accelerator

    def fp16(stage, config):
        accelerator = make(stage, config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        return accelerator

    monkeypatch.setattr(engine, "_accelerator", fp16)
    faults = Faults(nan_loss=(4,))
    run([f"out={tmp_path / 'whole'}"], faults)
    with pytest.raises(SystemExit):
        run([f"out={tmp_path / 'run'}"], Faults(nan_loss=(4,), signals={6: signal.SIGTERM}))
    run([f"out={tmp_path / 'run'}"], faults)
    assert_same(tmp_path / "run", tmp_path / "whole")
    scaler = [torch.load(tmp_path / f"{o}/checkpoints/step-12/training.pt")["scaler"] for o in ("run", "whole")]
    assert scaler[0] == scaler[1]
    assert scaler[0]["scale"] < 2.0**30
    assert metrics(tmp_path / "run")[-2]["skipped"] == 1


def test_fp16_needs_a_device_that_has_it(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(UserError, match=r"train.precision=fp16: needs a GPU"):
        run([f"out={tmp_path}", "train.precision=fp16"])


# --- the batch's split ---


def test_accumulation_equals_a_big_batch(tmp_path):
    class Plain(ToyStage):
        def loss(self, model, batch, draw):
            return {"loss": super().loss(model, batch, draw)["ce"]}

    losses = []
    for accumulate in (1, 4):
        config = TrainConfig(steps=12, batch=8, accumulate=accumulate, lr=0.05, log_every=1)
        out = tmp_path / str(accumulate)
        engine.train(Plain(0.0, False), ToyStream(0, config.micro_batch), config, out, "{}")
        losses.append([line["loss"] for line in metrics(out) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


SPLIT = ["dropout=0", "norm=false", "train.log_every=1", "train.steps=20", "train.checkpoint_every=0"]


def test_two_processes_with_half_the_batch_each(tmp_path):
    """The curve of two gloo processes under torchrun is that of one with the whole batch."""
    run([f"out={tmp_path / 'one'}", *SPLIT])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    script = [toy_stage.__file__, str(tmp_path / "log"), f"out={tmp_path / 'two'}", *SPLIT]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([*torchrun, *script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [*range(1, 21), 20]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = load_file(tmp_path / "two/model.safetensors"), load_file(tmp_path / "one/model.safetensors")
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-6), name


def test_compute_only_switches_change_no_more_than_rounding(tmp_path):
    run([f"out={tmp_path / 'plain'}", *SPLIT])
    run([f"out={tmp_path / 'last'}", *SPLIT, "train.channels_last=true"])
    for ours, theirs in zip(metrics(tmp_path / "last"), metrics(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two(settings: list[str], log: Path, faults: Faults | None = None, **options) -> list[int]:
    """Exit codes of two processes of one run."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common["ACCELERATE_USE_CPU"] = "1"
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    processes = [start(settings, faults, log, environment=ranks[rank], **options) for rank in (0, 1)]
    return [finish(process) for process in processes]


def test_two_processes_stop_at_the_same_step_and_continue_exactly(tmp_path):
    settings = ["train.accumulate=2"]
    assert two([f"out={tmp_path / 'whole'}", *settings], tmp_path / "log") == [0, 0]
    faults = Faults(signals={6: signal.SIGTERM}, only_rank=1)
    assert two([f"out={tmp_path / 'run'}", *settings], tmp_path / "log", faults) == [0, 0]
    assert checkpoints(tmp_path / "run") == ["step-4", "step-7"]
    assert two([f"out={tmp_path / 'run'}", *settings], tmp_path / "log") == [0, 0]
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_two_processes_agree_on_errors(tmp_path):
    """A loss that is not finite on one process alone, and a disk that is full for the one that writes."""
    log, faults = tmp_path / "log", Faults(nan_loss=(5, 6), only_rank=1)
    assert two([f"out={tmp_path / 'nan'}", "train.max_nonfinite=2"], log, faults) == [2, 2]
    assert two([f"out={tmp_path / 'odd'}", "train.batch=6", "train.accumulate=2"], log) == [2, 2]
    assert "take a multiple of 4" in log.read_text()


def shard() -> None:
    """FSDP on CPUs, which accelerate sets up for GPUs only."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    build = engine._Run._build

    def built(self):
        build(self)
        assert self.sharded
        assert all(hasattr(weight, "to_local") for weight in self.model.parameters())

    engine._Run._build = built


def test_fsdp_equals_one_process_and_continues_exactly(tmp_path):
    settings, log = [*SPLIT, "train.accumulate=2", "train.ema=null"], tmp_path / "log"
    run([f"out={tmp_path / 'one'}", *settings])
    assert two([f"out={tmp_path / 'two'}", *settings], log, Faults(signals={6: signal.SIGTERM}), before=shard) == [0, 0]
    assert checkpoints(tmp_path / "two") == ["step-7"]
    assert two([f"out={tmp_path / 'two'}", *settings], log, before=shard) == [0, 0]
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)
    assert two([f"out={tmp_path / 'ema'}", "train.ema=0.9"], log, before=shard) == [2, 2]
    assert "train.ema: is not available with FSDP" in log.read_text()


# --- the folder ---


def test_another_recipe_in_the_folder_is_refused_by_its_keys(tmp_path):
    stopped_run(tmp_path)
    with pytest.raises(UserError, match=r"another recipe: dropout=0.3 \(was 0.1\), train.lr=0.01 \(was 0.05\);"):
        run([f"out={tmp_path}", "train.lr=0.01", "dropout=0.3"])


def test_keys_that_change_no_result_may_change(tmp_path, whole):
    out = tmp_path / "run"
    stopped_run(out)
    free = ["train.keep=5", "train.checkpoint_every=100", "train.preview_every=1", "train.max_nonfinite=2"]
    run([f"out={out}", *free])
    assert checkpoints(out) == ["step-10", "step-12", "step-8"]
    assert_same(out, whole)


def test_weights_kept_on_the_way(tmp_path, whole):
    """They change nothing, and are what a run of that length under this schedule has: its checkpoint, as a file."""
    run([f"out={tmp_path}", "train.export_every=4", "train.checkpoint_every=4", "train.keep=9", "train.ema=0.9"])
    kept = tmp_path / "models"
    assert sorted(folder.name for folder in kept.iterdir()) == ["step-4", "step-8"]
    for folder in kept.iterdir():
        weights = load_file(folder / "model.safetensors")
        saved = torch.load(tmp_path / "checkpoints" / folder.name / "training.pt", weights_only=True)
        assert all(torch.equal(weights[name], saved["ema"][name]) for name in weights)
        raw = load_file(folder / "model-raw.safetensors")
        assert all(torch.equal(raw[name], saved["model"][name]) for name in raw)
    run([f"out={tmp_path / 'plain'}", "train.export_every=4"])
    assert_same(tmp_path / "plain", whole)


def test_a_finished_run_may_be_extended(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run([f"out={tmp_path}"])
    run([f"out={tmp_path}", "train.steps=16"])
    assert "train.steps: 16 instead of 12" in caplog.text
    assert "continues from step 12" in caplog.text
    assert [line["step"] for line in metrics(tmp_path)] == [4, 8, 12, 12, 16, 16]
    with pytest.raises(UserError, match="is at step 16 already, past the 14"):
        run([f"out={tmp_path}", "train.steps=14"])


@pytest.mark.parametrize("kind", ["file", "below a file", "not ours"])
def test_a_folder_that_cannot_be_written(kind, tmp_path):
    (tmp_path / "file").write_text("")
    out = {"file": tmp_path / "file", "below a file": tmp_path / "file/run", "not ours": Path("/proc/addp")}[kind]
    with pytest.raises(UserError, match=f"out={out}: cannot be written"):
        prepare_out(out, "a: 1")


def hold(out: Path) -> None:
    prepare_out(out, "a: 1")
    os.kill(os.getpid(), signal.SIGSTOP)


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_is_no_obstacle(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / "recipe.yaml").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"process {process.pid} on .* works in this folder"):
        prepare_out(tmp_path, "a: 1")
    process.kill()
    process.join()
    assert prepare_out(tmp_path, "a: 1") is None
    assert prepare_out(tmp_path, "a: 1") is None
    run_folder.release_out(tmp_path)


def test_figures_past_the_checkpoint_and_broken_lines_are_dropped(tmp_path, whole):
    stopped_run(tmp_path, step=7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    run([f"out={tmp_path}"])
    assert_same(tmp_path, whole)


def test_randomness_is_a_function_of_the_step(tmp_path):
    """Draws of the stage, the preview or anything else in between change nothing."""

    class Greedy(ToyStage):
        def after_step(self, model, draw, accelerator):
            torch.rand(draw.step)
            return super().after_step(model, draw, accelerator)

    config = TrainConfig(steps=5, batch=8, lr=0.05, log_every=1)
    for name, kind in (("plain", ToyStage), ("greedy", Greedy)):
        engine.train(kind(), ToyStream(0, 8), config, tmp_path / name, "{}")
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "greedy")
    assert seed_for(0, "step", 1, 0) != seed_for(0, "step", 1, 1)
    assert math.isfinite(metrics(tmp_path / "plain")[0]["loss"])


@pytest.mark.parametrize("method", ["preview", "evaluate", "export"])
def test_what_fails_after_the_last_step_costs_none(method, tmp_path, whole, monkeypatch, caplog):
    def broken(self, *_):
        raise RuntimeError("no figure today")

    with monkeypatch.context() as patch:
        patch.setattr(ToyStage, method, broken)
        with pytest.raises(RuntimeError, match="no figure today"):
            run([f"out={tmp_path}", "train.preview_every=0"])
    caplog.clear()
    with caplog.at_level(logging.INFO, "addp"):
        run([f"out={tmp_path}", "train.preview_every=0"])
    assert "continues from step 12" in caplog.text
    for name in ("model.safetensors", "model-raw.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
