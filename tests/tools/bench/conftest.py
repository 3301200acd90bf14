"""What tests of the bench share: toy datasets, two small checkpoints, and children that do nothing."""

import shutil
import sys
from pathlib import Path

import pytest
from tiny import tiny_addp

from addp_core import save_model
from addp_core.recipes.cli import main
from tools import children
from tools.bench import bench

SBATCH = """#!/bin/bash
echo "$@" >> $FAKE_ADDP/sbatch.txt
echo $((100 + $(wc -l < $FAKE_ADDP/sbatch.txt)));
"""
SQUEUE = """#!/bin/bash
[ -e $FAKE_ADDP/down ] && { echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }
cat $FAKE_ADDP/queue.txt
"""
SCONTROL = """#!/bin/bash
echo "$@" > $FAKE_ADDP/scontrol.txt
"""


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> Path:
    """A folder with toy datasets (toy/) and two small checkpoints (a/, b/), not to be changed."""
    root = tmp_path_factory.mktemp("toys")
    sizes = ["size=16", "scene=48", "imagenet_train=20", "imagenet_val=20", "variants=6", "corrupted=1"]
    sizes += ["coco_train=4", "coco_val=2", "ade_train=4", "ade_val=2"]
    datasets = "only=[imagenet,imagenet-a,imagenet-c,coco,ade20k]"
    assert main(["toy", f"out={root / 'toy'}", datasets, *sizes]) == 0
    for name, seed in (("a", 0), ("b", 1)):
        (root / name).mkdir()
        save_model(tiny_addp((8, 8), seed=seed), root / name / "model.safetensors")
    return root


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """Children run fake_addp.py, and no report is drawn. Returns the folder that fake_addp.py reads and writes."""
    folder = tmp_path / "fake"
    folder.mkdir()
    # a copy for each test, so that a test can tell its own processes by their command lines
    script = shutil.copy(Path(__file__).with_name("fake_addp.py"), folder)
    monkeypatch.setenv("FAKE_ADDP", str(folder))
    monkeypatch.setattr(bench, "write_report", lambda out: out / "report.html")
    monkeypatch.setattr(children, "ADDP", [sys.executable, str(script)])
    return folder


@pytest.fixture
def slurm(fake, monkeypatch):
    """Stand-ins of Slurm's commands; fake/queue.txt lists the jobs in its queue, and fake/down makes it unreachable."""
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    (fake / "queue.txt").write_text("")
    monkeypatch.setenv("PATH", f"{fake}:/usr/bin:/bin")
    return fake
