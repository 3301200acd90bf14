"""Files that are missing, damaged, hostile or of something else, and writing that fails."""

import errno
import json
import os
import pickle

import pytest
import torch
from checks import assert_user_error
from safetensors.torch import save_file
from tiny import tiny_addp

from addp_core import load_addp, load_encoder, load_predictor, load_tokenizer, save_model


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_pickles_that_would_run_code_are_refused(tmp_path, form):
    path, created = tmp_path / "hostile.pth", tmp_path / "created"
    content = {"model": {"blocks.0.attn.qkv.weight": torch.zeros(1)}, "args": Hostile(str(created))}
    if form == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(str(created)), protocol=2))
    for load in (load_addp, load_encoder, load_tokenizer, load_predictor):
        assert_user_error(
            lambda load=load: load(path), str(path), "refused because unpickling it could run code", "mkdir"
        )
    assert not created.exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_files(tmp_path, name, content):
    path = tmp_path / name
    if content is None:  # truncated
        (save_file if name.endswith("tensors") else torch.save)({"a": torch.zeros(1000)}, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    assert_user_error(lambda: load_addp(path), str(path))


def test_a_web_page_in_place_of_a_file(tmp_path):
    (tmp_path / "vqgan.ckpt").write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    assert_user_error(
        lambda: load_tokenizer(tmp_path / "vqgan.ckpt"), "not a checkpoint", "<!DOCTYPE html", "download it again"
    )


def test_missing_files_name_the_nearest(tmp_path):
    (tmp_path / "addp-vit-base-16.pth").touch()
    assert_user_error(
        lambda: load_addp(tmp_path / "addp-vit-base16.pth"), "no such file", "did you mean 'addp-vit-base-16.pth'"
    )
    assert_user_error(lambda: load_addp(tmp_path), "has no model.safetensors", "start its command again")
    assert_user_error(lambda: load_addp("hf://oops"), "expected hf://owner/repository/file")


def test_files_without_tensors(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    assert_user_error(lambda: load_addp(tmp_path / "list.pth"), "found a list")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    assert_user_error(lambda: load_addp(tmp_path / "empty.pth"), "no tensors in it (entries: epoch)")


def test_architecture_of_another_version(tmp_path):
    text = json.dumps({"kind": "addp", "architecture": {"image_size": "big"}})
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"addp": text})
    assert_user_error(lambda: load_addp(tmp_path / "m.safetensors"), "does not fit this version")


def test_weights_of_an_unknown_kind(tmp_path):
    text = json.dumps({"kind": "depth", "architecture": {}})
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"addp": text})
    assert_user_error(
        lambda: load_encoder(tmp_path / "m.safetensors", 64), "the weights of 'depth'", "expected one of addp"
    )


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_model(tiny_addp(seed=1), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tiny_addp(seed=2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_model_without_a_predictor_round_trips(tmp_path):
    model = tiny_addp()
    model.predictor = None
    save_model(model, tmp_path / "m.safetensors")
    assert load_addp(tmp_path / "m.safetensors").predictor is None
