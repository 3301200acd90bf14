"""Who may work in a run folder, and with which recipe."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from toy_stage import run, stopped_run

from addp_core.base.errors import UserError
from addp_core.training.run_folder import prepare_out, release_out


def test_a_folder_with_a_run_of_another_recipe_is_refused(tmp_path):
    stopped_run(tmp_path)
    with pytest.raises(UserError, match=r"another recipe: dropout=0.3 \(was 0.1\), train.lr=0.01 \(was 0.05\);"):
        run([f"out={tmp_path}", "train.lr=0.01", "dropout=0.3"])


@pytest.mark.parametrize("kind", ["file", "inside a file", "not writable"])
def test_a_folder_that_cannot_be_written(kind, tmp_path):
    (tmp_path / "file").write_text("")
    out = {"file": tmp_path / "file", "inside a file": tmp_path / "file/run", "not writable": Path("/proc/addp")}[kind]
    with pytest.raises(UserError, match=f"out={out}: cannot be written"):
        prepare_out(out, "a: 1")


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
