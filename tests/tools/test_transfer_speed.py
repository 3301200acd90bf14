"""`addp throughput det=true seg=true finetune=true`: both sides do the same work, and the report is complete."""

import importlib.util
import json

import pytest
import torch

from addp_core.base.errors import UserError
from addp_core.recipes.cli import run as cli
from addp_core.recipes.config import load
from tools.speed import transfer
from tools.speed.recipe import Recipe
from tools.speed.transfer import SIDES, TITLES

CPU = torch.device("cpu")
SETTINGS = ["model=tiny", "dense_size=32", "size=32", "batch=2", "precision=fp32", "train=false", "sample=false"]
ALL = ["det=true", "seg=true", "finetune=true"]


@pytest.mark.parametrize(("task", "side"), [(task, side) for task, sides in SIDES.items() for side in sides])
def test_a_side_takes_a_step(task, side):
    package = "detectron2" if side == "detectron2" else "mmseg" if task.startswith("seg") else "torch"
    if not importlib.util.find_spec(package):
        pytest.skip(f"needs {package}")
    worker = transfer._Worker(task, side, load(Recipe, settings=[*SETTINGS, *ALL]), CPU)
    before = {name: p.detach().clone() for name, p in worker.model.named_parameters() if p.requires_grad}
    assert worker.step() > 0
    changed = [name for name, p in worker.model.named_parameters() if name in before and not p.equal(before[name])]
    assert bool(changed) == (task != "det")  # which has no optimizer


@pytest.mark.parametrize("task", ["det", "finetune"])
def test_both_sides_have_as_many_parameters(task):
    """Up to positions, class tokens and the final norm."""
    if task == "det":
        pytest.importorskip("detectron2", reason="needs detectron2")
    recipe = load(Recipe, settings=[*SETTINGS, *ALL])
    ours, theirs = (
        sum(p.numel() for p in build(recipe, CPU)[0].blocks.parameters())
        if task == "det"
        else sum(p.numel() for name, p in build(recipe, CPU)[0].named_parameters() if "blocks." in name)
        for build in SIDES[task].values()
    )
    assert ours == theirs


def test_the_verb_reports_each_side_that_is_installed(capsys, tmp_path):
    report = tmp_path / "report.json"
    assert cli(["throughput", *SETTINGS, "det=true", "repeats=1", "warmup=0", "device=cpu", f"json={report}"]) == 0
    found, text = json.loads(report.read_text())["transfer"], capsys.readouterr().out
    assert list(found) == ["det"]
    assert TITLES["det"] in text
    ours = found["det"]["addp"]
    assert ours["seconds"]["low"] <= ours["seconds"]["median"] <= ours["seconds"]["high"]
    assert ours["precision"] == "fp32"
    assert ours["peak_memory_bytes"] > 0
    if importlib.util.find_spec("detectron2"):
        assert found["det"]["detectron2"]["addp_times_this"]["median"] > 0


def test_files_are_refused():
    with pytest.raises(UserError, match=r"det, seg, finetune: found model=run/x\.safetensors; expected one of tiny"):
        load(Recipe, settings=["model=run/x.safetensors", "det=true"])
