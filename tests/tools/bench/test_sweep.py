"""`addp sweep`: what it runs, what it repeats and what it reports."""

import json
import subprocess
import sys
import threading

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transfers import NO_AUGMENTATION, write_color_images, write_tiny_checkpoint

from addp_core.recipes.cli import main
from tools import children
from tools.bench.arguments import as_argument
from tools.bench.sweep import Recipe, SweepRun, _markdown_table


def test_arms_over_grid_and_seeds(tmp_path, capsys):
    images, model = tmp_path / "images", write_tiny_checkpoint(tmp_path)
    write_color_images(images)
    common = {"data": str(images), "data.size": 8, "data.workers": 0, "train.batch": 8, "train.steps": 1}
    common |= NO_AUGMENTATION
    recipe = {
        "verb": "finetune",
        "set": common,
        "arms": {"ours": {"model": str(model)}, "unfit": {"model": str(model), "data.size": 9}},
        "grid": {"train.lr": [0.001, 0.0]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(recipe))
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="1"):  # the patches of one arm do not tile its images
        main(["sweep", str(path), f"out={out}", "seeds=[0]", "jobs=2"])
    table, errors = capsys.readouterr()
    assert "| ours | train.lr=" in table
    assert "unfit" not in table
    failed = [out / "unfit" / f"lr={lr},seed0" / "log.txt" for lr in (0.001, 0.0)]
    assert f"2 of 4 runs failed: {failed[0]}, {failed[1]}; the first one ends with: addp: " in errors
    assert "data.size=9" in (out / "unfit" / "lr=0.001,seed0" / "log.txt").read_text()
    summary = json.loads((out / "sweep.json").read_text())["arms"]["ours"]
    assert summary["mean"] == max(summary["grid"].values())
    results = json.loads((out / "ours" / "lr=0.001,seed0" / "results.json").read_text())
    assert summary["grid"]["ours/lr=0.001,seed0"] == results["last"]["top1"]

    assert (out / "ours" / "best-seed0" / "results.json").samefile(
        out / "ours" / f"lr={summary['setting']['train.lr']},seed0" / "results.json"
    )
    assert not (out / "unfit" / "best-seed0").exists()

    logs = {log: log.read_text() for log in (out / "ours").glob("*seed0/log.txt")}
    recipe["arms"].pop("unfit")
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


def test_the_table_and_the_names_of_runs():
    recipe = Recipe(out="", verb="finetune", arms={"a": {}}, seeds=[0, 1])
    summary = {"a": {"setting": {"train.lr": 0.1}, "values": [40.0, 44.0], "mean": 42.0, "sd": 2.8284}}
    assert _markdown_table(recipe, summary).splitlines()[2] == "| a | train.lr=0.1 | 42.00 ± 2.83 | 40.00, 44.00 |"
    assert SweepRun("a", (("train.lr", 0.1), ("train.layer_decay", None)), 2).name == "a/lr=0.1,layer_decay=None,seed2"
    assert tuple(as_argument(value, 4) for value in ("run-{seed}", None, True, [1, 2])) == (
        "run-4",
        "null",
        "true",
        "[1, 2]",
    )


# Stands in for a training: fails with learning rate 9, with seed 2, and while another process holds its folder.
TRAINING = """
import fcntl, json, os, pathlib, sys
keys = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
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
    """Return a command line whose trainings take no time."""
    (tmp_path / "training.py").write_text(TRAINING)
    monkeypatch.setattr(children, "ADDP", [sys.executable, str(tmp_path / "training.py")])
    write_color_images(tmp_path / "images", train=1, val=1)
    common = json.dumps({"data": str(tmp_path / "images"), "init": "random"})
    return [
        "sweep",
        f"out={tmp_path / 'out'}",
        "verb=finetune",
        "arms={a: {model: tiny}}",
        f"set={common}",
        "metric=AP",
    ]


def test_a_setting_that_fails_is_left_out(sweep, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*sweep, "grid={train.lr: [0.1, 0.2, 9.0]}", "seeds=[0, 1]"]) == 0
    table, errors = capsys.readouterr()
    edge = "a: train.lr: 0.1 is the smallest value of the grid; a wider grid may do better"
    left_out = f"a: left out because it failed: {out}/a/lr=9.0,seed0/log.txt"
    assert table.splitlines()[0] == "| arm | best setting | AP, mean ± sd of 2 seeds | each seed |"
    assert table.splitlines()[2:] == ["| a | train.lr=0.1 | 0.0493 ± 0.0004 | 0.0490, 0.0496 |"]
    assert (out / "sweep.md").read_text() == f"{table}\n{edge}\n\n{left_out}\n"
    assert edge in errors
    assert left_out in errors
    assert f"the end of {out}/a/lr=9.0,seed0/log.txt:\n" in errors
    assert "step 2  loss 1e30\naddp: step 3: not finite: loss\n" in errors
    summary = json.loads((out / "sweep.json").read_text())["arms"]["a"]
    assert summary["grid"]["a/lr=9.0,seed0"] is None


# Ends when the run of the other seed has begun too.
MEETING = """
import json, pathlib, sys, time
keys = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
out = pathlib.Path(json.loads(keys["out"]))
(out / "begun").touch()
deadline = time.time() + 60
while len(list(out.parent.glob("*/begun"))) < 2 and time.time() < deadline:
    time.sleep(0.01)
if time.time() < deadline:
    (out / "results.json").write_text(json.dumps({"AP": 0.5}))
    (out / "finished.json").write_text("{}")
"""


@pytest.mark.parametrize("grid", ["{train.lr: [0.1]}", "{}"])
def test_without_a_choice_all_seeds_are_trained_together(sweep, tmp_path, capsys, grid):
    (tmp_path / "training.py").write_text(MEETING)
    assert main([*sweep, f"grid={grid}", "seeds=[0, 1]", "jobs=2"]) == 0
    assert "0.5000, 0.5000" in capsys.readouterr().out


def test_a_failed_seed_of_the_best_setting_is_an_error(sweep, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main([*sweep, "grid={train.lr: [0.1, 0.2]}", "seeds=[0, 2]"])
    table, errors = capsys.readouterr()
    assert "mean ± sd of 1 seed |" in table
    log = f"{tmp_path}/out/a/lr=0.1,seed2/log.txt"
    ending = f"1 of 3 runs failed: {log}; the first one ends with: addp: step 3: not finite: loss"
    assert errors.splitlines()[-1].endswith(ending)
    assert "may do better" not in errors  # each of two values is an edge


def test_an_edited_recipe_is_not_taken_for_the_one_of_before(sweep, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    line = [*sweep, f"recipe={recipe}", "grid={train.lr: [0.1]}", "seeds=[0]"]
    trainings = tmp_path / "out" / "a" / "lr=0.1,seed0" / "log.txt"
    for text, again in (("train: {epochs: 3}", True), ("train: {epochs: 3}", False), ("train: {epochs: 4}", True)):
        recipe.write_text(text)
        trainings.unlink(missing_ok=True)
        assert main(line) == 0
        assert trainings.exists() == again


def test_a_replaced_checkpoint_is_trained_from(tmp_path, capsys):
    """With a real training, whose folder would say that it has finished."""
    images, model = tmp_path / "images", write_tiny_checkpoint(tmp_path)
    write_color_images(images)
    common = {"data": str(images), "data.size": 8, "data.workers": 0, "train.batch": 8, "train.steps": 1}
    settings = f"set={json.dumps(common | NO_AUGMENTATION)}"
    line = [
        "sweep",
        f"out={tmp_path / 'out'}",
        "verb=finetune",
        f"arms={{a: {{model: {model}}}}}",
        settings,
        "seeds=[0]",
    ]
    runs = tmp_path / "out" / "a"
    assert main(line) == 0
    first = (runs / "seed0" / "model.safetensors").read_bytes()
    assert main(line) == 0
    assert not (runs / "seed0,before1").exists()
    weights = {name: value + 1 for name, value in load_file(model).items()}
    with safe_open(model, "pt") as file:
        metadata = file.metadata()
    save_file(weights, model, metadata)
    assert main(line) == 0
    assert (runs / "seed0,before1" / "model.safetensors").read_bytes() == first
    assert (runs / "seed0" / "model.safetensors").read_bytes() != first
    assert "a/seed0: its recipe or checkpoint has changed; the previous run is in" in capsys.readouterr().err
    # the same with a command that differs in what has no effect
    save_file({name: value + 1 for name, value in weights.items()}, model, metadata)
    quieter = f"set={json.dumps(common | NO_AUGMENTATION | {'train.log_every': 7})}"
    assert main([quieter if each == settings else each for each in line]) == 0
    assert (runs / "seed0,before2").exists()
    # random weights take the architecture alone
    random = [each.replace("{model:", "{init: random, model:") for each in line if not each.startswith("out=")]
    random.append(f"out={tmp_path / 'random'}")
    assert main(random) == 0
    save_file(weights, model, metadata)
    assert main(random) == 0
    assert [path.name for path in sorted((tmp_path / "random" / "a").iterdir())] == ["best-seed0", "seed0"]


def test_another_metric_is_read_again(sweep, tmp_path, capsys):
    grid = "grid={train.lr: [0.1, 0.2]}"
    assert main([*sweep, grid, "seeds=[0]"]) == 0
    training = (tmp_path / "training.py").read_text().replace('"AP"', '"AR": 61.0, "AP"')
    (tmp_path / "training.py").write_text(training)
    capsys.readouterr()
    assert main([*sweep, grid, "seeds=[0]", "metric=AR"]) == 0
    assert "61.00 ± 0.00" in capsys.readouterr().out


def test_the_training_of_a_killed_sweep_is_waited_for(sweep, tmp_path, capsys):
    run = tmp_path / "out" / "a" / "lr=0.1,seed0"
    run.mkdir(parents=True)
    code = f"import fcntl, os, sys; file = os.open({str(run / '.lock')!r}, os.O_RDWR | os.O_CREAT)\n"
    code += "fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as orphan:
        assert orphan.stdout.readline() == "locked\n"
        threading.Timer(1.5, orphan.stdin.close).start()
        assert main([*sweep, "grid={train.lr: [0.1]}", "seeds=[0]"]) == 0
    assert "waiting: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["verb=fintune", "arms={a: {}}"], "verb: found 'fintune', expected a verb of addp; did you mean 'finetune'?"),
        (["verb=finetune"], "arms"),
    ],
)
def test_wrong_sweeps(settings, message, tmp_path, capsys):
    assert main(["sweep", f"out={tmp_path}", *settings]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["set={data: {here}/nowhere, init: random}"], "addp: data.source: {here}/nowhere does not exist"),
        (["set={data: {here}/images}"], "addp: arms.a.model: tiny: a size, which has no weights"),
        (["arms={a: {model: '{here}/seed{seed}.pth'}}"], "addp: arms.a.model: {here}/seed0.pth: no such file"),
        (["arms={a: {model: '{here}/model-{seed}'}}"], "addp: arms.a.model: {here}/model-1: no such file"),
        (["arms={a: {model: {here}/training.py}}"], "addp: arms.a.model: {here}/training.py: not a checkpoint"),
        (["grid={train.lrr: [0.1]}"], "addp: finetune: unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (["grid={train.lr: [0.1, -1]}"], "addp: finetune: train.lr: found -1"),
        (["verb=det train", "recipe=tiny"], "has none of annotations/"),
        (["verb=seg train", "recipe=tiny"], "objectInfo150.txt"),
    ],
)
def test_inputs_are_checked_before_the_first_training(sweep, settings, message, tmp_path, capsys):
    (tmp_path / "model-0").mkdir()
    write_tiny_checkpoint(tmp_path / "model-0")
    settings = [setting.replace("{here}", str(tmp_path)) for setting in settings]
    assert main([*sweep, "grid={train.lr: [0.1]}", "seeds=[0,1]", *settings]) == 2
    assert message.replace("{here}", str(tmp_path)) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_finished_sweep_does_not_need_its_checkpoints(sweep, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    checkpoint = write_tiny_checkpoint(tmp_path / "run")
    line = [*sweep, f"arms={{a: {{model: {checkpoint}}}}}", "grid={train.lr: [0.1, 0.2]}", "seeds=[0,1]"]
    assert main(line) == 0
    checkpoint.unlink()
    assert main(line) == 0
    assert main([*line, "seeds=[0,1,3]"]) == 2


def test_a_file_instead_of_a_folder(sweep, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert main([*sweep, "grid={train.lr: [0.1]}"]) == 2
    assert f"out: {tmp_path}/out cannot be written (File exists)" in capsys.readouterr().err
