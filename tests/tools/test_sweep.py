"""`addp sweep`: what it runs, repeats and tells."""

import json
import subprocess
import sys
import threading

import pytest
from transfers import NO_AUGMENTATION, write_color_images, write_tiny_checkpoint

from addp_core.recipes.cli import main
from tools.bench import children
from tools.bench.sweep import Cell, _table, word


def test_arms_over_grid_and_seeds(tmp_path, capsys, caplog):
    images, pretrained = tmp_path / "images", write_tiny_checkpoint(tmp_path)
    write_color_images(images)
    common = {"data": str(images), "data.size": 8, "data.workers": 0, "train.batch": 8, "train.steps": 1}
    common |= NO_AUGMENTATION
    recipe = {
        "verb": "finetune",
        "set": common,
        "arms": {"ours": {"model": str(pretrained)}, "absent": {"model": str(tmp_path / "seed{seed}.pth")}},
        "grid": {"train.lr": [0.001, 0.0]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(recipe))
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="1"):  # one arm has no file
        main(["sweep", str(path), f"out={out}", "seeds=[0]", "jobs=2"])
    table, errors = capsys.readouterr()
    assert "| ours | train.lr=" in table
    assert "absent" not in table
    failed = [out / "absent" / f"lr={lr},seed0" / "log.txt" for lr in (0.001, 0.0)]
    assert f"2 of 4 runs failed: {failed[0]}, {failed[1]}; the first says: addp: " in errors
    assert "seed0.pth: no such file" in (out / "absent" / "lr=0.001,seed0" / "log.txt").read_text()
    found = json.loads((out / "sweep.json").read_text())["arms"]["ours"]
    assert found["mean"] == max(found["grid"].values())
    results = json.loads((out / "ours" / "lr=0.001,seed0" / "results.json").read_text())
    assert found["grid"]["ours/lr=0.001,seed0"] == results["last"]["top1"]

    assert (out / "ours" / "best-seed0" / "results.json").samefile(
        out / "ours" / f"lr={found['setting']['train.lr']},seed0" / "results.json"
    )
    assert not (out / "absent" / "best-seed0").exists()

    logs = {log: log.read_text() for log in (out / "ours").glob("*seed0/log.txt")}
    recipe["arms"].pop("absent")
    path.write_text(json.dumps(recipe))
    assert main(["sweep", str(path), f"out={out}", "seeds=[0,3]"]) == 0
    assert {log: log.read_text() for log in logs} == logs  # nothing was repeated
    assert len(list((out / "ours").glob("lr=*seed3/results.json"))) == 1
    links = sorted((out / "ours").glob("best-seed*"))
    assert [(link.name, json.loads((link / "finished.json").read_text())["step"]) for link in links] == [
        ("best-seed0", 1),
        ("best-seed3", 1),
    ]
    assert not links[1].readlink().is_absolute()
    assert links[1].readlink().name.endswith("seed3")
    assert len(json.loads((out / "sweep.json").read_text())["arms"]["ours"]["values"]) == 2


def test_the_table_by_hand():
    from tools.bench.sweep import Recipe

    recipe = Recipe(out="", verb="finetune", arms={"a": {}}, seeds=[0, 1])
    summary = {"a": {"setting": {"train.lr": 0.1}, "values": [40.0, 44.0], "mean": 42.0, "sd": 2.8284}}
    assert _table(recipe, summary).splitlines()[2] == "| a | train.lr=0.1 | 42.00 ± 2.83 | 40.00, 44.00 |"
    assert Cell("a", (("train.lr", 0.1), ("train.layer_decay", None)), 2).name == "a/lr=0.1,layer_decay=None,seed2"
    assert (word("run-{seed}", 4), word(None, 4), word(True, 4), word([1, 2], 4)) == (
        "run-4",
        "null",
        "true",
        "[1, 2]",
    )


# Stands in for a training: fails at a rate of 9 and with seed 2, and where another process works in its folder.
TRAINING = """
import fcntl, json, os, pathlib, sys
keys = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
out, lr, seed = pathlib.Path(json.loads(keys["out"])), float(keys["train.lr"]), int(keys["train.seed"])
file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
if lr == 9 or seed == 2:
    print("step 2  loss 1e30")
    sys.exit("addp: step 3: not finite: loss")
(out / "results.json").write_text(json.dumps({"AP": 0.05 - 0.01 * lr + 0.0006 * seed}))
(out / "finished.json").write_text("{}")
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> list[str]:
    """A command line over trainings that take no time."""
    (tmp_path / "training.py").write_text(TRAINING)
    monkeypatch.setattr(children, "ADDP", [sys.executable, str(tmp_path / "training.py")])
    return ["sweep", f"out={tmp_path / 'out'}", "verb=finetune", "arms={a: {}}", "metric=AP"]


def test_a_setting_that_fails_is_left_out(sweep, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*sweep, "grid={train.lr: [0.1, 0.2, 9.0]}", "seeds=[0, 1]"]) == 0
    table, errors = capsys.readouterr()
    edge = "a: train.lr: 0.1 is the smallest of the grid; a wider one may find better"
    left = f"a: left out, for it failed: {out}/a/lr=9.0,seed0/log.txt"
    assert table.splitlines()[0] == "| start | best setting | AP, mean ± sd of 2 seeds | each seed |"
    assert table.splitlines()[2:] == ["| a | train.lr=0.1 | 0.0493 ± 0.0004 | 0.0490, 0.0496 |"]
    assert (out / "sweep.md").read_text() == f"{table}\n{edge}\n\n{left}\n"
    assert edge in errors
    assert left in errors
    assert f"the end of {out}/a/lr=9.0,seed0/log.txt:\n" in errors
    assert "step 2  loss 1e30\naddp: step 3: not finite: loss\n" in errors
    found = json.loads((out / "sweep.json").read_text())["arms"]["a"]
    assert found["grid"]["a/lr=9.0,seed0"] is None


def test_a_seed_that_fails_of_the_best_setting_is_an_error(sweep, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main([*sweep, "grid={train.lr: [0.1, 0.2]}", "seeds=[0, 2]"])
    table, errors = capsys.readouterr()
    assert "mean ± sd of 1 seed |" in table
    named = f"1 of 3 runs failed: {tmp_path}/out/a/lr=0.1,seed2/log.txt; the first says: addp: step 3: not finite: loss"
    assert errors.splitlines()[-1].endswith(named)
    assert "may find better" not in errors  # of two values each is an end


def test_another_figure_is_read_anew(sweep, tmp_path, capsys):
    grid = "grid={train.lr: [0.1, 0.2]}"
    assert main([*sweep, grid, "seeds=[0]"]) == 0
    training = (tmp_path / "training.py").read_text().replace('"AP"', '"AR": 61.0, "AP"')
    (tmp_path / "training.py").write_text(training)
    capsys.readouterr()
    assert main([*sweep, grid, "seeds=[0]", "metric=AR"]) == 0
    assert "61.00 ± 0.00" in capsys.readouterr().out


def test_a_training_that_a_killed_sweep_left_is_waited_for(sweep, tmp_path, capsys):
    run = tmp_path / "out" / "a" / "lr=0.1,seed0"
    run.mkdir(parents=True)
    code = f"import fcntl, os, sys; file = os.open({str(run / '.lock')!r}, os.O_RDWR | os.O_CREAT)\n"
    code += "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as orphan:
        assert orphan.stdout.readline() == "held\n"
        threading.Timer(1.5, orphan.stdin.close).start()
        assert main([*sweep, "grid={train.lr: [0.1]}", "seeds=[0]"]) == 0
    assert "waiting: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verb=fintune", "arms={a: {}}"], "verb: found 'fintune', expected a verb of addp; did you mean 'finetune'?"),
        (["verb=finetune"], "arms"),
    ],
)
def test_wrong_input(words, message, tmp_path, capsys):
    assert main(["sweep", f"out={tmp_path}", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_none(sweep, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert main([*sweep, "grid={train.lr: [0.1]}"]) == 2
    assert f"out: {tmp_path}/out cannot be written (File exists)" in capsys.readouterr().err
