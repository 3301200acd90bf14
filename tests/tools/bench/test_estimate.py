"""`addp bench estimate=true`: what the steps will take, by speeds that are given or measured."""

import json
import sys
from pathlib import Path

import pytest
from bench_commands import bench_command, commands_run, last_line

from addp_core.recipes.cli import main
from addp_core.training.pace import PACE_FILE, read_pace
from tools import children

FINETUNE = (
    "finetune.set={train.batch: 10, train.epochs: 4, train.evaluate_every: 3, augment.mixup: 0, augment.cutmix: 0}"
)

# Stands in for `addp`: 50 images a second in training, 200 in validation, until it is killed.
SLOW = """
import json, os, sys, time
from pathlib import Path

verb = sys.argv[1]
keys = dict(each.split("=", 1) for each in sys.argv[2:] if "=" in each)
notes, out = Path(sys.argv[0]).parent, Path(keys["out"])
with (notes / "started").open("a") as file:
    file.write(" ".join([verb, keys.get("train.steps", ""), keys.get("train.batch", "")]).strip() + chr(10))
if (notes / "broken").exists():
    sys.exit("addp: model: cannot be read today")
if (notes / "killed").exists():
    os.kill(os.getpid(), 9)
out.mkdir()
if int(keys.get("train.steps", 0)) > 2:
    with (out / "metrics.jsonl").open("w") as file:
        for step in range(1, 20):
            print(json.dumps({"step": step, "img_s": 5.0 if step == 1 else 50.0}), file=file, flush=True)
else:
    for key in {"model", "tokenizer", "predictor"} & keys.keys():
        assert Path(keys[key], "model.safetensors").exists(), keys[key]
    if "train.export_every" in keys:
        (out / "models" / "step-1").mkdir(parents=True)
        (out / "models" / "step-1" / "model.safetensors").touch()
    if verb in ("tokenizer", "predictor", "pretrain"):
        sys.exit()
    with open(os.environ["ADDP_PACE_FILE"], "w") as file:
        for number in range(20):
            print(json.dumps(["validation", 10.0 if number else 0, 1000 + number / 20]), file=file, flush=True)
time.sleep(60)
"""


@pytest.fixture
def slow(tmp_path, monkeypatch) -> Path:
    """Children run SLOW. Returns its folder."""
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "addp.py").write_text(SLOW)
    monkeypatch.setattr(children, "ADDP", [sys.executable, str(folder / "addp.py")])
    return folder


def steps_of(out: Path) -> dict[str, dict]:
    """Return the steps of estimate.json by name."""
    return {step["name"]: step for step in json.loads((out / "estimate.json").read_text())["steps"]}


def test_given_speeds(toys, fake, tmp_path, capsys):
    out = tmp_path / "out"
    settings = ["seeds=[0,1,2]", "finetune.grid={train.lr: [0.1, 0.2]}", FINETUNE, "random=false", "jobs=2"]
    speeds = "estimate.img_s={finetune: 20, finetune.validation: 40, det: 10, linprobe: 50, robustness: 3}"
    line = bench_command(toys, out, *settings, "estimate=true", "estimate.gpus=4", "price_per_hour=36", speeds)
    assert main(line) == 0
    assert commands_run(fake, out) == []
    assert sorted(path.name for path in out.iterdir()) == ["estimate.json", "estimate.md"]
    step = steps_of(out)["finetune/a"]
    # 20 images in 4 epochs, validated on 20 images after 3 and 6 of 8 steps and at the end: 5.5 s a run; two settings
    # at a time, then two seeds at a time
    assert step["phases"]["training"] == {"images": 4 * 80, "img_s": 20}
    assert step["phases"]["validation"] == {"images": 4 * 3 * 20, "img_s": 40}
    assert (step["runs"], step["seconds"]) == (4, 11.0)
    assert step["hours_of_gpus_or_processes"] == pytest.approx(4 * 5.5 * 4 / 3600)
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == ["step", "runs", "phase", "images", "img/s", "time", "GPU-hours", "price"]
    assert table.splitlines()[1].split() == ["finetune/a", "4", "training", "320", "20", "0:00:11", "0.0244", "0.11"]
    assert "seg/a, seg/b: cannot be estimated: estimate.img_s has no seg: add its images per second\n" in table
    assert "det/a, det/b: validation at the given speed of det; det.validation gives its own\n" in table
    assert "all: without 2 of 10 steps\n" in table
    assert "time: 4 GPUs for each run, 2 runs at a time\n" in table
    assert steps_of(out)["robustness/b"]["phases"]["validation"]["images"] == 3 * 6  # images of ImageNet-A


def test_steps_that_are_done_cost_nothing(toys, fake, tmp_path, capsys):
    out = tmp_path / "out"
    line = bench_command(toys, out, FINETUNE, "random=false", "bench.only=finetune")
    assert main([*line, "bench.only=finetune/a"]) == 0
    assert main([*line, "estimate=true", "estimate.img_s={finetune: 20}"]) == 0
    assert list(steps_of(out)) == ["finetune/b"]
    assert "estimate" not in (out / "recipe.yaml").read_text().partition("enabled: true")[2]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            ["estimate=true", "estimate.img_s={finetun: 3}"],
            "estimate.img_s: found 'finetun', expected a benchmark (pretrain, generation, finetune, ",
        ),
        (
            ["estimate=true", "estimate.img_s={det: 0}"],
            "estimate.img_s.det: found 0, expected images per second above 0",
        ),
        (["estimate.gpus=8"], "estimate.gpus: found 8 without estimate=true; add it"),
        (["estimate=true", "data.coco=nowhere"], "data.coco: nowhere is not a folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(toys, slow, tmp_path, capsys, settings, error):
    assert main(bench_command(toys, tmp_path / "out", *settings)) == 2
    assert error in last_line(capsys)
    assert not (tmp_path / "out").exists()
    assert not (slow / "started").exists()


def test_measured_speeds(toys, slow, tmp_path, capsys):
    out = tmp_path / "out"
    settings = ["seeds=[0,1]", FINETUNE, "bench.only=finetune,robustness", "estimate=true", "estimate.seconds=0.5"]
    assert main(bench_command(toys, out, *settings)) == 0
    # one measurement for the three arms, whose architecture is the same: training, validation, the classifier
    assert (slow / "started").read_text().split("\n") == ["finetune 1000000000 10", "finetune 2 2", "robustness", ""]
    steps = steps_of(out)
    assert [step["phases"]["training"]["img_s"] for name, step in steps.items() if "finetune" in name] == pytest.approx(
        [50.0] * 3
    )
    assert steps["finetune/a"]["phases"]["validation"]["img_s"] == pytest.approx(200)
    assert steps["robustness/random"]["phases"]["validation"]["img_s"] == pytest.approx(200)
    runs = 2 * (80 / 50 + 3 * 20 / 200)
    assert runs - 0.1 < steps["finetune/a"]["seconds"] < runs + 20  # the start of Python, twice
    assert "measured on " in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] in (["estimate.json", "estimate.md"], ["estimate.md", "estimate.json"])


def test_pretraining_that_the_bench_begins_with(toys, slow, tmp_path, capsys):
    out = tmp_path / "out"
    data = [f"data.imagenet={toys / 'toy' / 'imagenet'}", "random=false", FINETUNE]
    arms = "pretrain.arms={x: {}, y: {train.lr: 0.1}, z: {model.encoder.depth: 2}}"
    settings = ["pretrain.recipe=tiny", arms, "pretrain.set={train.steps: 10, train.batch: 4}", "pretrain.seeds=[0,1]"]
    only = ["bench.only=pretrain,finetune", "estimate=true", "estimate.seconds=0.5", "seeds=[0,1]"]
    assert main(["bench", f"out={out}", *data, *settings, *only]) == 0, capsys.readouterr().out
    verbs = [line.split()[0] for line in (slow / "started").read_text().splitlines()]
    # the shared frozen parts, two kinds of pretraining (a learning rate does not count), two architectures fine-tuned;
    # each its training and what it leaves
    assert verbs == sorted(verbs, key=["tokenizer", "predictor", "pretrain", "finetune"].index)
    assert {verb: verbs.count(verb) for verb in verbs} == {"tokenizer": 2, "predictor": 2, "pretrain": 4, "finetune": 4}
    steps = steps_of(out)
    assert not [step for step in steps.values() if "problem" in step]
    assert (steps["pretrain/x"]["runs"], steps["pretrain/x"]["phases"]["training"]["images"]) == (2, 2 * 40)
    assert list(steps)[:2] == ["pretrain/stages", "pretrain/x"]


def test_a_large_batch_is_measured_with_fewer_images_on_a_cpu(toys, slow, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.bench.measuring.CPU_STEP_FLOP", 1.0)
    settings = [FINETUNE, "bench.only=finetune/a", "estimate=true", "estimate.seconds=0.5", "estimate.gpus=3"]
    assert main(bench_command(toys, tmp_path / "out", *settings)) == 0
    assert "finetune/a: measured with 2 images a step instead of 10\n" in capsys.readouterr().out
    assert (slow / "started").read_text().startswith("finetune 1000000000 2\n")
    phases = steps_of(tmp_path / "out")["finetune/a"]["phases"]
    assert phases["training"]["img_s"] == pytest.approx(3 * 50)  # in proportion to the GPUs


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("broken", "model: cannot be read today"),
        ("killed", "the system has killed it, probably because the memory was full"),
    ],
)
def test_a_command_that_fails_is_named_with_its_error(toys, slow, tmp_path, capsys, fault, error):
    (slow / fault).touch()
    settings = [FINETUNE, "bench.only=finetune", "estimate=true"]
    assert main(bench_command(toys, tmp_path / "out", *settings, "random=false")) == 0
    output = capsys.readouterr().out
    assert f"finetune/a, finetune/b: cannot be estimated: {error}\n" in output
    assert (slow / "started").read_text().count("finetune") == 1


TRAINING = "data.workers=0 train.steps=1 train.batch=2 train.warmup_steps=0"
MARKS = [
    (f"finetune data={{toy}}/imagenet data.size=8 {TRAINING} augment.auto=", {"validation": 20}),
    (
        "linprobe tiny data={toy}/imagenet data.size=8 data.workers=0 fast.epochs=1 fast.knn=0 fast.held_out=0",
        {"validation": 40, "heads": 1},
    ),
    (f"det train tiny data={{toy}}/coco data.size=32 {TRAINING}", {"validation": 2}),
    (f"seg train tiny data={{toy}}/ade20k data.crop=32 data.scale=[48,96] channels=8 {TRAINING}", {"validation": 2}),
    (
        "seg probe tiny data={toy}/ade20k data.size=16 data.workers=0 train.epochs=1 mode=knn",
        {"validation": 6, "heads": 1},
    ),
    ("generate n=3 sampling.steps=2 batch=2", {"sampling": 3}),
]


@pytest.mark.parametrize(("command", "expected"), MARKS, ids=[command.split()[0] for command, _ in MARKS])
def test_commands_say_how_many_images_they_have_processed(toys, tmp_path, monkeypatch, command, expected):
    if command.startswith("seg"):
        pytest.importorskip("mmseg")
    pace = tmp_path / "pace.jsonl"
    monkeypatch.setenv(PACE_FILE, str(pace))
    line = command.format(toy=toys / "toy").split()
    assert main([*line, f"model={toys / 'a'}", f"out={tmp_path / 'out'}"]) == 0
    marks = read_pace(pace)
    assert marks[0].amount == 0
    amounts = {phase: sum(mark.amount for mark in marks if mark.phase == phase) for phase in expected}
    assert amounts == pytest.approx(expected)
    assert {mark.phase for mark in marks} == set(expected)
