"""`addp sweep`: what it runs, repeats and tells."""

import json

import pytest
from test_finetune import PLAIN, images, pretrained  # noqa: F401 (fixtures)

from addp_core.cli import main
from tools.sweep import Cell, _table, word


def test_arms_over_grid_and_seeds(images, pretrained, tmp_path, capsys, caplog):  # noqa: F811
    common = {"data": str(images), "data.size": 8, "data.workers": 0, "train.batch": 8, "train.steps": 1}
    common |= {word.split("=")[0]: "" if "auto" in word else 0 for word in PLAIN}
    recipe = {
        "verb": "finetune",
        "set": common,
        "arms": {"ours": {"model": str(pretrained)}, "absent": {"model": str(tmp_path / "seed{seed}.pth")}},
        "grid": {"train.lr": [0.001, 0.0]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(recipe))
    out = tmp_path / "out"
    assert main(["sweep", str(path), f"out={out}", "seeds=[0]", "jobs=2"]) == 1  # one arm has no file
    table = capsys.readouterr().out
    assert "| ours | train.lr=" in table
    assert "absent" not in table
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
    from tools.sweep import Recipe

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
