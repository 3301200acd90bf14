"""Several processes of one run give the results of one process, and agree on errors and signals."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import toy_stage
from ranks import Fault, assert_ends, run_ranks
from safetensors.torch import load_file
from toy_stage import ROUNDING_ONLY, Faults, assert_same, checkpoint_names, metrics, run


def run_two_processes(out: Path, *settings: str, fault: Fault | tuple[()] = ()) -> None:
    """Run two processes of one run, which both end with exit code 0."""
    job = out.parent / f"{out.name}-job-{len(list(out.parent.iterdir()))}"
    ended = run_ranks(["toy", f"out={out}", *settings], job, fault=fault)
    assert ended.codes == [0, 0], ended.text


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    """Two gloo processes with half the batch each give the metrics and weights of one process."""
    run([f"out={tmp_path / 'one'}", *ROUNDING_ONLY])
    run_two_processes(tmp_path / "two", *ROUNDING_ONLY)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [*range(1, 21), 20]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = load_file(tmp_path / "two/model.safetensors"), load_file(tmp_path / "one/model.safetensors")
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-6), name


def test_two_processes_stop_at_the_same_step_and_continue_exactly(tmp_path):
    run_two_processes(tmp_path / "uninterrupted", "train.accumulate=2")
    run_two_processes(tmp_path / "run", "train.accumulate=2", fault=Fault("SIGTERM", "step", 1, 7))
    assert checkpoint_names(tmp_path / "run") == ["step-4", "step-7"]
    run_two_processes(tmp_path / "run", "train.accumulate=2")
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")


def test_two_processes_agree_on_losses_that_are_not_finite(tmp_path):
    settings = ["toy", f"out={tmp_path / 'run'}", "train.max_nonfinite=2"]
    ended = run_ranks(settings, tmp_path / "job", before=lose_finite_losses_on_rank_1)
    assert_ends(ended, [2, 2], "step 7: not finite", "2 such steps in a row")


def lose_finite_losses_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        toy_stage.run = partial(run, faults=Faults(nan_loss=(5, 6)))


def test_a_batch_that_cannot_be_split_is_refused_once(tmp_path):
    settings = ["toy", f"out={tmp_path / 'run'}", "train.batch=6", "train.accumulate=2"]
    assert_ends(run_ranks(settings, tmp_path / "job"), [2, 2], "addp: train.batch=6", "take a multiple of 4")
