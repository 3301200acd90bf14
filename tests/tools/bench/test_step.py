"""A step of the bench: its fingerprint, which has to stay the same for a finished bench to count as finished."""

from pathlib import Path
from types import SimpleNamespace

from tools.bench import sweep
from tools.bench.arms import Arm
from tools.bench.benchmarks.det import Detection
from tools.bench.step import Command, Step


def test_the_fingerprint_of_a_step_stays():
    arm = Arm("a", "runs/a", "pretrained", "0123", 5, (8, 8), True)
    commands = [
        Command(["sweep", "out/det/a/sweep.yaml"]),
        Command(["det", "predict", "model=x", "out=y", "score=0.1"]),
    ]
    trials = sweep.Recipe("out/det/a", "det train", {"a": {}}, grid={"train.lr": [0.1, 0.2]})
    step = Step("det", arm, Path("out"), [0, 1], commands=commands, trials=trials, basis={"b": {"c": 1}, "a": None})
    assert step.basis_digest[:16] == "c76d859abc96a74c"
    assert step.fingerprint[:16] == "47e4a59b9997ca4a"
    step.processes, step.commands[1].arguments[2] = 8, "model=z"  # neither changes the result
    assert step.fingerprint[:16] == "47e4a59b9997ca4a"


def test_a_dataset_of_boxes_alone_has_no_mask_ap():
    step = SimpleNamespace(metrics=Detection.metrics)
    measured = Detection().measured_metrics(step, [{"box_AP": 0.1}, {"box_AP": 0.2}])
    assert [metric.key for metric in measured] == ["box_ap"]
    measured = Detection().measured_metrics(step, [{"box_AP": 0.1, "mask_AP": 0.1}])
    assert [metric.key for metric in measured] == ["box_ap", "mask_ap"]
