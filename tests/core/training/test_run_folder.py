"""Who may work in a run folder, and with which recipe."""

import errno
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from toy_stage import N, Recipe, run, stopped_run

from addp_core.base.errors import UserError
from addp_core.recipes import config as recipes
from addp_core.training.run_folder import mark_finished, prepare_out, release_out


def test_a_folder_with_a_run_of_another_recipe_is_refused(tmp_path):
    stopped_run(tmp_path)
    with pytest.raises(UserError, match=r"another recipe: dropout=0.3 \(was 0.1\), train.lr=0.01 \(was 0.05\);"):
        run([f"out={tmp_path}", "train.lr=0.01", "dropout=0.3"])


def store_without(key: str, out: Path) -> str:
    """Remove a key from the folder's recipe.yaml, as if the run had begun before the key existed; return the YAML."""
    lines = (out / "recipe.yaml").read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.strip().startswith(f"{key}:"))
    (out / "recipe.yaml").write_text(text)
    return text


def test_a_key_that_an_old_recipe_lacks_has_its_default(tmp_path, caplog):
    stopped_run(tmp_path)
    store_without("dropout", tmp_path)
    store_without("momentum", tmp_path)
    with pytest.raises(UserError, match=r"another recipe: dropout=0.3 \(was 0.1\), train.momentum=0.5 \(was 0.9\);"):
        run([f"out={tmp_path}", "dropout=0.3", "train.momentum=0.5"])
    with caplog.at_level("INFO", "addp"):
        run([f"out={tmp_path}"])
    assert "continues from step 10" in caplog.text


def test_a_run_that_finished_before_a_key_existed_is_finished(tmp_path, uninterrupted, caplog):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    mark_finished(tmp_path, store_without("dropout", tmp_path), {})
    with caplog.at_level("INFO", "addp"):
        run([f"out={tmp_path}"])
        assert "this run has already finished" in caplog.text
        run([f"out={tmp_path}", "train.steps=13"])
    assert "continues from step 12" in caplog.text


@pytest.mark.parametrize("length", ["train.steps=3", "train.epochs=0.6"])
def test_a_length_that_the_run_has_passed_leaves_its_recipe_as_it_was(tmp_path, length):
    stopped_run(tmp_path)
    before = (tmp_path / "recipe.yaml").read_text()
    recipe = recipes.load(Recipe, None, [f"out={tmp_path}", "train.steps=null", length])
    with pytest.raises(
        UserError, match=r"has already reached step 10, but this recipe ends at 3; expected train.steps=1"
    ):
        prepare_out(tmp_path, recipe, lambda: {"train": Images()})
    assert (tmp_path / "recipe.yaml").read_text() == before
    run([f"out={tmp_path}"])


class Images:
    def __len__(self) -> int:
        return N

    def digest(self) -> str:
        return ""


@pytest.mark.parametrize("kind", ["file", "inside a file", "not writable"])
def test_a_folder_that_cannot_be_written(kind, tmp_path):
    (tmp_path / "file").write_text("")
    out = {"file": tmp_path / "file", "inside a file": tmp_path / "file/run", "not writable": Path("/proc/addp")}[kind]
    with pytest.raises(UserError, match=f"out={out}: cannot be written"):
        prepare_out(out, "a: 1")


def test_images_that_cannot_be_read_are_no_fault_of_the_folder(tmp_path):
    def datasets():
        raise OSError(errno.EIO, os.strerror(errno.EIO), "photos/dog")

    with pytest.raises(UserError, match=r"^data: photos/dog: cannot be read \(Input/output error\)$"):
        prepare_out(tmp_path, "a: 1", datasets)


def claim_and_pause(out: Path) -> None:
    prepare_out(out, "a: 1")
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_second_run_in_one_folder_is_refused_until_the_first_has_died(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=claim_and_pause, args=(tmp_path,))
    process.start()
    while not (tmp_path / "recipe.yaml").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"process {process.pid} on .* works in this folder"):
        prepare_out(tmp_path, "a: 1")
    process.kill()
    process.join()
    assert prepare_out(tmp_path, "a: 1") is None
    assert prepare_out(tmp_path, "a: 1") is None
    release_out(tmp_path)
