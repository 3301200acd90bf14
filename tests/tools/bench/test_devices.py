"""GPUs of commands that run at the same time, on a machine that pretends to have some."""

import json
import sys
from pathlib import Path

import pytest
import torch
from bench_commands import bench_command, last_line, set_behavior
from transfers import NO_AUGMENTATION, write_color_images, write_tiny_checkpoint

from addp_core.base.errors import UserError
from addp_core.recipes.cli import main
from tools import children
from tools.bench import devices
from tools.bench.devices import DeviceShares

# stands in for `addp finetune`: notes its GPUs, and ends when another one has done so
RUN = """
import os, sys, time
from pathlib import Path

out = Path(next(each[4:] for each in sys.argv if each.startswith("out=")).strip(chr(34)))
notes = Path(sys.argv[0]).parent
(notes / f"gpus-{out.parent.name}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
while len(list(notes.glob("gpus-*"))) < 2:
    time.sleep(0.05)
(out / "results.json").write_text('{"last": {"top1": 1.0}}')
(out / "finished.json").write_text("{}")
"""


def pretend(monkeypatch, count: int, visible: str | None) -> None:
    """Let torch count so many GPUs, and set CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def shares_of(jobs: int | None, processes: int) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES of commands that all run at the same time."""
    shares = DeviceShares(jobs, processes)
    taken = [shares.take() for _ in range(shares.jobs)]
    return [context.__enter__().get("CUDA_VISIBLE_DEVICES", "unset") for context in taken]


@pytest.mark.parametrize(
    ("count", "visible", "jobs", "processes", "expected"),
    [
        (4, None, 2, 1, ["0", "1"]),
        (4, None, 2, 2, ["0,1", "2,3"]),
        (4, None, None, 1, ["0", "1", "2", "3"]),
        (5, None, None, 2, ["0,1", "2,3"]),
        (4, None, 1, 2, ["unset"]),  # a single command may see them all
        (1, None, None, 1, ["unset"]),
        (2, "6, 3", 2, 1, ["6", "3"]),
        (1, "5,-1,2", 1, 1, ["unset"]),
        (2, "GPU-8f2,GPU-1aa", 2, 1, ["GPU-8f2", "GPU-1aa"]),
        (1, "MIG-a1,MIG-b2,MIG-c3", 3, 1, ["MIG-a1", "MIG-b2", "MIG-c3"]),  # torch counts one of them
        (0, None, 3, 2, ["unset"] * 3),  # CPUs
        (0, "0,1", None, 1, ["unset"] * 2),
    ],
)
def test_each_command_has_gpus_of_its_own(monkeypatch, count, visible, jobs, processes, expected):
    pretend(monkeypatch, count, visible)
    assert shares_of(jobs, processes) == expected


def test_each_command_has_cores_of_its_own_unless_the_user_says_how_many(monkeypatch):
    def threads(jobs: int | None, processes: int = 1) -> list[str | None]:
        shares = DeviceShares(jobs, processes)
        return [shares.take().__enter__().get("OMP_NUM_THREADS") for _ in range(shares.jobs)]

    pretend(monkeypatch, 0, None)
    monkeypatch.setattr(devices, "usable_cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(2) == [None] * 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert (threads(None), threads(3), threads(9)) == (["3"] * 2, ["2"] * 3, ["1"] * 9)
    assert threads(1) == [None]  # all of them
    assert threads(2, processes=2) == [None] * 2  # torchrun decides
    pretend(monkeypatch, 4, None)
    assert threads(None) == ["1"] * 4


def test_more_processes_than_gpus_are_refused(monkeypatch):
    pretend(monkeypatch, 4, "4,5,6,7")
    with pytest.raises(UserError, match=r"^jobs: found 3 with processes=2, which take 6 GPUs, but the GPUs are "):
        DeviceShares(3, 2)
    with pytest.raises(UserError) as caught:
        DeviceShares(None, 8, "bench.processes")
    assert str(caught.value) == (
        "bench.processes: found 8, but the GPUs are CUDA_VISIBLE_DEVICES=4,5,6,7; expected 4 or fewer"
    )


def test_a_share_is_used_again_when_it_is_free(monkeypatch):
    pretend(monkeypatch, 2, None)
    shares = DeviceShares(2, 1)
    with shares.take() as first:
        for _ in range(3):
            with shares.take() as second:
                assert first | second == second != first


def test_runs_of_a_sweep(tmp_path, monkeypatch, capsys):
    images, model = tmp_path / "images", write_tiny_checkpoint(tmp_path)
    write_color_images(images)
    (tmp_path / "addp.py").write_text(RUN)
    monkeypatch.setattr(children, "ADDP", [sys.executable, str(tmp_path / "addp.py")])
    common = {"data": str(images), "data.size": 8, "model": str(model), **NO_AUGMENTATION}
    recipe = {"verb": "finetune", "set": common, "arms": {"one": {}, "two": {}}, "seeds": [0]}
    (tmp_path / "sweep.yaml").write_text(json.dumps(recipe))
    line = ["sweep", str(tmp_path / "sweep.yaml"), f"out={tmp_path / 'out'}"]
    pretend(monkeypatch, 2, None)
    assert main([*line, "jobs=3"]) == 2
    assert last_line(capsys) == (
        "addp: jobs: found 3 with processes=1, which take 3 GPUs, but the GPUs are CUDA_VISIBLE_DEVICES=0,1; "
        "expected jobs=2 or fewer"
    )
    assert not (tmp_path / "out").exists()
    assert main([*line, "jobs=2"]) == 0
    assert sorted(path.read_text() for path in tmp_path.glob("gpus-*")) == ["0", "1"]


def test_evaluations_of_a_bench(toys, fake: Path, tmp_path, monkeypatch, capsys):
    set_behavior(fake, meet="robustness/a/seed")
    pretend(monkeypatch, 2, "GPU-8f2,GPU-1aa")
    line = bench_command(toys, tmp_path / "out", "bench.only=[robustness/a]", "seeds=[0,1]", "random=false")
    assert main([*line, "bench.processes=3"]) == 2
    assert "bench.processes: found 3, but the GPUs are CUDA_VISIBLE_DEVICES=GPU-8f2,GPU-1aa" in last_line(capsys)
    assert main([*line, "jobs=null"]) == 0
    assert sorted(path.read_text() for path in fake.glob("here-*")) == ["GPU-1aa", "GPU-8f2"]
