"""Checkpoints that are damaged, hostile or of another model, and disks that are full."""

import errno
import json
import os
import pickle
import resource
import signal
import zlib
from functools import partial

import pytest
import torch
from toy_stage import Faults, ToyStage, assert_same, checkpoint_names, run, start_process, stopped_run, wait_for

from addp_core.base.errors import UserError
from addp_core.training import checkpoints as checkpoints_module


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no state", "no file"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, tmp_path, uninterrupted, caplog):
    out = tmp_path / "run"
    stopped_run(out)
    assert checkpoint_names(out) == ["step-10", "step-8"]
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
    assert checkpoint_names(out) == ["damaged-step-10", "step-12", "step-8"]
    assert_same(out, uninterrupted)


def test_a_run_without_any_intact_checkpoint_does_not_start_over(tmp_path):
    stopped_run(tmp_path)
    for path in tmp_path.glob("checkpoints/*/training.pt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint can be read: step-10 \(.*, step-8 \(.*start over"):
        run([f"out={tmp_path}"])
    with pytest.raises(UserError, match=r"no checkpoint can be read: damaged-step-10, damaged-step-8"):
        run([f"out={tmp_path}"])


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch):
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
    assert (tmp_path / "executed").exists()  # so it would have run


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    stopped_run(tmp_path)
    text = (tmp_path / "recipe.yaml").read_text().replace("norm: true", "norm: false")
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"does not fit this model: missing \[\], unknown \['norm.bias'"):
        run([f"out={tmp_path}", "norm=false"])


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_during_checkpoints(tmp_path, uninterrupted):
    """The process may only write files half as large as training.pt (EFBIG), then any file."""
    out, log = tmp_path / "run", tmp_path / "log"
    assert wait_for(start_process([f"out={out}"], Faults(signals={4: signal.SIGKILL}), log)) == -signal.SIGKILL
    size = (out / "checkpoints/step-4/training.pt").stat().st_size
    assert wait_for(start_process([f"out={out}"], None, log, before=partial(limit_files, size // 2))) == 2
    lines = log.read_text().splitlines()
    warnings = [line for line in lines if "not written" in line]
    assert "step-8: not written (File too large); older checkpoints are intact" in warnings[0]
    assert warnings[-1].startswith("addp: ")
    assert "step-12: not written (File too large)" in warnings[-1]
    assert checkpoint_names(out) == ["step-4"]
    assert wait_for(start_process([f"out={out}"], None, log)) == 0
    assert_same(out, uninterrupted)


def test_three_failed_checkpoints_in_a_row_end_the_run(tmp_path, monkeypatch, caplog):
    def full(payload, path):
        path.write_bytes(b"a part of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints_module, "save_tensors", full)
    with pytest.raises(UserError, match=r"step-3: not written \(No space left on device\)"):
        run([f"out={tmp_path}", "train.checkpoint_every=1"])
    assert len([record for record in caplog.records if "not written" in record.message]) == 2
    assert checkpoint_names(tmp_path) == []


def test_a_full_disk_while_writing_the_model_or_images(tmp_path, monkeypatch, caplog, uninterrupted):
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
    assert_same(tmp_path, uninterrupted)
