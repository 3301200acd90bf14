"""`addp bench`: what it runs, in which order, what it repeats, and what it refuses before it starts."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import tiny_addp

from addp_core.recipes.cli import main
from addp_core.recipes.config import find_recipe, load
from addp_core.training.run_folder import lock, release_out
from addp_core.weights.checkpoint import save_model
from tools.bench import bench, children
from tools.bench.inputs import open_arms, typed
from tools.bench.steps import TRAININGS, as_words
from tools.bench.sweep import best_run

# Stands in for `addp` where the bench is the subject: leaves what the verbs leave, in no time. What it is to do, and
# what it did, lies in the folder of the variable PLAY.
FAKE = """
import json, os, pathlib, sys, time
import yaml
play = pathlib.Path(os.environ["PLAY"])
words = sys.argv[1:]
keys = dict(word.split("=", 1) for word in words if "=" in word)
recipe = yaml.safe_load(open(words[1])) if words[0] == "sweep" else {}
out = pathlib.Path(recipe.get("out") or keys["out"])
with (play / "done.txt").open("a") as file:
    file.write(f"{words[0]} {out}\\n")
told = json.loads((play / "told.json").read_text()) if (play / "told.json").exists() else {}
if told.get("fail") and told["fail"] in str(out):
    sys.exit("addp: nothing works today")
if told.get("wait") and told["wait"] in str(out):
    (play / "waits").touch()
    time.sleep(60)
if told.get("meet") and told["meet"] in str(out):
    (play / f"here-{out.name}").touch()
    while len(list(play.glob("here-*"))) < 2:
        time.sleep(0.05)
    print("here it is")
scores = {"last": {"top1": 50.0}, "best": {"top1": 40.0}, "classes": 10}
scores |= {"box_AP": 0.25, "mask_AP": 0.2, "mIoU": 30.0, "constant_mIoU": 4.0}
if words[0] == "sweep":
    (arm,) = recipe["arms"]
    for seed in recipe["seeds"]:
        run = out / arm / f"run-{seed}"
        run.mkdir(parents=True, exist_ok=True)
        (run / "results.json").write_text(json.dumps(scores))
        if not (out / arm / f"best-seed{seed}").exists():
            (out / arm / f"best-seed{seed}").symlink_to(run.name)
    setting = {key: values[0] for key, values in recipe["grid"].items()}
    row = {"setting": setting, "grid": {}, "notes": told.get("notes", [])}
    (out / "sweep.json").write_text(json.dumps({"arms": {arm: row}}))
elif words[0] == "robustness":
    assert pathlib.Path(keys["model"], "results.json").exists()
    out.mkdir()
    rows = [{"key": "imagenet_a", "classes": 6, "score": 20.0}, {"key": "imagenet_c", "classes": 10, "score": 10.0}]
    (out / "results.json").write_text(json.dumps({"rows": rows, "average": None}))
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Toy sets and two small models."""
    root = tmp_path_factory.mktemp("room")
    sizes = ["size=16", "scene=48", "imagenet_train=20", "imagenet_val=20", "variants=6", "corrupted=1"]
    sizes += ["coco_train=4", "coco_val=2", "ade_train=4", "ade_val=2"]
    sets = "only=[imagenet,imagenet-a,imagenet-c,coco,ade20k]"
    assert main(["toy", f"out={root / 'toy'}", sets, *sizes]) == 0
    for name, seed in (("a", 0), ("b", 1)):
        (root / name).mkdir()
        save_model(tiny_addp((8, 8), seed=seed), root / name / "model.safetensors")
    return root


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """Children run the script above, no report is drawn; the folder that the script reads and writes."""
    play = tmp_path / "play"
    play.mkdir()
    (play / "fake.py").write_text(FAKE)
    monkeypatch.setenv("PLAY", str(play))
    monkeypatch.setattr(bench, "write_report", lambda out: out / "report.html")
    monkeypatch.setattr(children, "ADDP", [sys.executable, str(play / "fake.py")])
    return play


def command(room: Path, out: Path, *more: str, sets=("imagenet", "imagenet_a", "coco", "ade20k")) -> list[str]:
    """Every benchmark but generation."""
    paths = [f"data.{name}={room / 'toy' / name.replace('_', '-')}" for name in sets]
    only = "bench.only=finetune,linprobe,robustness,det,seg"
    return ["bench", f"out={out}", f"models={{a: {room / 'a'}, b: {room / 'b'}}}", *paths, only, *more]


def content(out: Path) -> dict:
    return json.loads((out / "bench.json").read_text())


def states(out: Path) -> dict[str, str]:
    return {step["name"]: step["state"] for step in content(out)["steps"]}


def done(play: Path, out: Path) -> list[str]:
    """The commands since the last call, with paths below `out`."""
    path = play / "done.txt"
    lines = path.read_text().replace(f"{out}/", "").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


# -------------------- what runs, and what does not run again


def test_steps_tables_and_what_a_second_start_repeats(room, fake, tmp_path, capsys):
    out = tmp_path / "out"
    line = command(room, out, "seeds=[0,1]", "finetune.grid={train.lr: [0.1, 0.2]}")
    assert main(line) == 0
    table = capsys.readouterr().out
    ran = done(fake, out)
    assert ran[:4] == [f"sweep finetune/{arm}" for arm in ("a", "b", "random")] + ["sweep linprobe/a"]
    assert ran[6:8] == ["robustness robustness/a/seed0", "robustness robustness/a/seed1"]
    assert ran[12:14] == ["sweep det/a", "det det/a/pictures"]
    assert len(ran) == 3 * (1 + 1 + 2 + 2 + 2)
    header, *rows, chance, _, report = table.splitlines()
    assert re.split(r" {2,}", header.strip()) == [
        *("finetune top1", "linprobe top1", "robustness a", "robustness c"),
        *("det box_ap", "det mask_ap", "seg miou"),
    ]
    assert [row.split()[0] for row in rows] == ["a", "b", "random"]
    assert all("50.00 ± 0.00" in row and "25.00 ± 0.00" in row for row in rows)
    assert re.split(r" {2,}", chance.strip())[:4] == ["chance", "10.00", "10.00", "16.67"]
    assert Path(report) == out / "report.html"
    found = content(out)
    assert [(name, arm["init"], arm["images_seen"]) for name, arm in found["arms"].items()] == [
        ("a", "pretrained", None),
        ("b", "pretrained", None),
        ("random", "random", None),
    ]
    assert found["arms"]["a"]["parameters"] == found["arms"]["random"]["parameters"] > 5000
    assert found["chance"]["seg"] == {"miou": 4.0}
    assert found["chance"]["robustness"]["c"] < 0  # 1 - mCE: worse than AlexNet's errors
    step = next(step for step in found["steps"] if step["name"] == "finetune/a")
    assert (step["setting"], step["seeds"], step["scores"]) == ({"train.lr": 0.1}, [0, 1], {"top1": [50.0, 50.0]})
    assert step["commands"] == [f"addp sweep {out}/finetune/a/sweep.yaml"]
    assert step["runs"]["1"] == "finetune/a/a/best-seed1"
    written = yaml.safe_load((out / "finetune" / "random" / "sweep.yaml").read_text())
    assert written["arms"] == {"random": {"model": str(room / "a"), "init": "random"}}
    assert {state for name, state in states(out).items() if not name.startswith("generation/")} == {"done"}

    def again(*more: str) -> list[str]:
        assert main([*line, *more]) == 0
        return done(fake, out)

    assert again() == []
    assert capsys.readouterr().out == table
    no_matter = ["jobs=2", "price_per_hour=3", "det.set={data.workers: 0}", "robustness.set={workers: 0}"]
    assert again(*no_matter) == []  # for the figures
    wider = "det.grid={train.lr: [0.1, 0.2]}"
    assert again(wider) == [
        f"{words} det/{arm}{rest}"
        for arm in ("a", "b", "random")
        for words, rest in (("sweep", ""), ("det", "/pictures"))
    ]
    assert not (out / "before").exists()  # the runs that are there are good for the wider sweep, too
    # other settings of one benchmark, and what depends on it
    ran = again("finetune.set={train.steps: 7}", wider)
    assert {words.split()[1].split("/")[0] for words in ran} == {"finetune", "robustness"}
    assert sorted(path.name for path in (out / "before").iterdir())[:2] == ["finetune-a-1", "finetune-b-1"]
    assert (out / "before" / "finetune-a-1" / "a" / "best-seed0" / "results.json").exists()


def test_evaluations_run_some_at_a_time(room, fake, tmp_path):
    (fake / "told.json").write_text(json.dumps({"meet": "robustness/a/seed"}))
    line = command(room, tmp_path, "bench.only=[robustness/a]", "seeds=[0,1]")
    assert main([*line, "jobs=2"]) == 0  # each waits for the other one
    log = (tmp_path / "robustness" / "a" / "log.txt").read_text()
    assert log.count("$ addp robustness") == log.count("here it is") == 2
    lines = log.splitlines()
    assert all(lines[i + 1].endswith("here it is") for i in (0, 2))
    assert [path.name for path in (tmp_path / "robustness" / "a").glob("*.txt")] == ["log.txt"]

    (fake / "told.json").write_text(json.dumps({"fail": "robustness/b/seed1"}))
    with pytest.raises(SystemExit):
        main(command(room, tmp_path, "bench.only=[robustness/b]", "seeds=[0,1]", "jobs=2"))
    (failed,) = [step for step in content(tmp_path)["steps"] if step["state"] == "failed"]
    assert (failed["name"], failed["error"]) == ("robustness/b", "addp: nothing works today")


def test_a_benchmark_for_some_arms(room, fake, tmp_path, capsys):
    assert main(command(room, tmp_path, "det.arms=[a,random]", "linprobe.arms=[b]")) == 0
    left = {step["name"]: step["error"] for step in content(tmp_path)["steps"] if step["state"] == "left out"}
    assert {name for name in left if name[:3] in ("det", "lin")} == {"det/b", "linprobe/a", "linprobe/random"}
    assert left["det/b"] == "not one of det.arms"
    capsys.readouterr()
    assert main(command(room, tmp_path, "seg.arms=[randm]")) == 2
    assert "seg.arms: found 'randm', expected some of a, b, random; did you mean 'random'?" in capsys.readouterr().err


def test_weights_kept_on_the_way_know_their_budget(room, tmp_path):
    def trained(run: Path, img_s: float) -> None:
        run.mkdir(exist_ok=True)
        lines = [{"step": step, "images": 4 * step, "img_s": img_s} for step in (10, 20, 30)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    trained(tmp_path, 2.0)
    kept = tmp_path / "models" / "step-20"
    kept.mkdir(parents=True)
    for folder in (tmp_path, kept):
        (folder / "model.safetensors").write_bytes((room / "a" / "model.safetensors").read_bytes())
    names = {"whole": tmp_path, "half": kept, "file": tmp_path / "model.safetensors"}
    whole, half, file, _ = [arm.about() for arm in open_arms({k: str(v) for k, v in names.items()}, random=True)]
    assert (whole["images_seen"], whole["seconds"]) == (120, 60)
    assert (half["images_seen"], half["seconds"], half["run"]) == (80, 40, str(tmp_path))
    assert file == whole | {"model": str(tmp_path / "model.safetensors")}
    trained(tmp_path / "tokenizer", 12.0)  # 120 images
    trained(tmp_path / "predictor", 24.0)
    whole, half = [arm.about() for arm in open_arms({"whole": str(tmp_path), "half": str(kept)}, random=False)]
    assert [(arm["images_seen"], arm["seconds"]) for arm in (whole, half)] == [(120, 75), (80, 55)]


def test_a_changed_checkpoint_or_set_is_noticed(room, fake, tmp_path):
    out, model = tmp_path / "out", tmp_path / "model.safetensors"
    save_model(tiny_addp((8, 8)), model)
    classes = tmp_path / "set"
    assert main(["toy", f"out={classes}", "only=[imagenet]", "size=16", "imagenet_train=10", "imagenet_val=10"]) == 0
    line = ["bench", f"out={out}", f"model={model}", f"data.imagenet={classes}/imagenet", "bench.only=finetune"]
    assert main([*line, f"data.coco={room}/toy/coco"]) == 0
    assert done(fake, out) == ["sweep finetune/addp", "sweep finetune/random"]
    model.touch()
    assert main(line) == 0
    assert done(fake, out) == []  # the same weights
    save_model(tiny_addp((8, 8), seed=3), model)
    assert main(line) == 0
    assert done(fake, out) == ["sweep finetune/addp"]  # and the same architecture
    save_model(tiny_addp((8, 16)), model)
    picture, other = next((classes / "imagenet" / "train").glob("*/*")), tmp_path / "other"
    other.write_bytes(picture.read_bytes())
    changes = [
        lambda: None,  # the architecture has changed above
        lambda: (classes / "imagenet" / "labels.txt").write_text("more"),
        lambda: picture.with_stem("one-more").write_bytes(picture.read_bytes()),
        lambda: other.replace(picture),
    ]
    for change in changes:
        change()
        assert main(line) == 0
        assert done(fake, out) == ["sweep finetune/addp", "sweep finetune/random"]
    assert main(line) == 0
    assert done(fake, out) == []


def test_pictures_to_paint_on_are_those_of_the_set_at_hand(room, fake, tmp_path):
    for name, kind, count in (("old", "png", 4), ("new", "png", 2), ("other", "bmp", 2)):
        for part in ("train", "val"):
            folder = tmp_path / name / part / "thing"
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (16, 16), (len(name), number, 0)).save(folder / f"{number}.{kind}")
        words = [f"data.imagenet={tmp_path / name}", "bench.only=finetune", "bench.launch=print"]
        assert main(["bench", f"out={tmp_path / 'out'}", f"model={room / 'a'}", *words]) == 0
        shown = sorted((tmp_path / "out" / "inputs" / "imagenet").iterdir())
        wanted = sorted((tmp_path / name / "val" / "thing").iterdir())
        assert [path.read_bytes() for path in shown] == [path.read_bytes() for path in wanted]


@pytest.mark.parametrize(("recipe", "top1"), [("vit_b_90ep", 50), ("fast", 40)])
def test_a_linear_probe_counts_its_last_validation_or_the_head_it_picked(room, fake, tmp_path, recipe, top1):
    assert main(command(room, tmp_path, f"linprobe.recipe={recipe}", "bench.only=linprobe/a")) == 0
    step = next(step for step in content(tmp_path)["steps"] if step["name"] == "linprobe/a")
    assert step["scores"] == {"top1": [top1]}


def test_what_a_sweep_notes_is_said(room, fake, tmp_path, capsys):
    (fake / "told.json").write_text(json.dumps({"notes": ["left out, for it failed: some.log"]}))
    assert main(command(room, tmp_path, "bench.only=det/a")) == 0
    assert "det/a: left out, for it failed: some.log" in capsys.readouterr().err
    step = next(step for step in content(tmp_path)["steps"] if step["name"] == "det/a")
    assert (step["state"], step["notes"]) == ("done", ["left out, for it failed: some.log"])


def test_a_step_that_another_start_is_at_is_left_alone(room, fake, tmp_path, capsys):
    out = tmp_path / "out"
    line = command(room, out, "bench.only=det/a", "bench.share=true")
    assert main(line) == 0
    changed = [*line, "det.set={train.steps: 7}"]
    with holding(out / "det" / "a") as process:
        assert main(changed) == 2
        assert f"process {process.pid}" in last_line(capsys)
    assert not (out / "before").exists()
    assert main(changed) == 0
    assert (out / "before" / "det-a-1" / "step.json").exists()


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen]:
    """Another process that works in a folder."""
    code = f"""
    import fcntl, os, sys
    file = os.open({str(folder / ".lock")!r}, os.O_RDWR | os.O_CREAT)
    fcntl.lockf(file, fcntl.LOCK_EX)
    os.write(file, f"process {{os.getpid()}}".encode())
    print("held", flush=True)
    sys.stdin.read()
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process  # leaving closes its input, upon which it ends


def test_a_failed_step_takes_only_its_dependents_down(room, fake, tmp_path, capsys):
    out = tmp_path / "out"
    (fake / "told.json").write_text(json.dumps({"fail": "finetune/b"}))
    line = command(room, out, "random=false")
    with pytest.raises(SystemExit, match="1"):
        main(line)
    error = last_line(capsys)
    assert "2 of 10 steps failed: finetune/b, robustness/b" in error
    assert error.endswith(f"see {out}/finetune/b/log.txt")
    steps = {step["name"]: step for step in content(out)["steps"]}
    assert (steps["finetune/b"]["state"], steps["finetune/b"]["error"]) == ("failed", "addp: nothing works today")
    assert (steps["robustness/b"]["state"], steps["robustness/b"]["error"]) == ("blocked", "blocked by finetune/b")
    assert [name for name, step in steps.items() if step["state"] == "done"] == [
        *("finetune/a", "linprobe/a", "linprobe/b", "robustness/a", "det/a", "det/b", "seg/a", "seg/b")
    ]
    done(fake, out)
    (fake / "told.json").unlink()
    assert main(line) == 0
    assert done(fake, out) == ["sweep finetune/b", "robustness robustness/b/seed0"]


def start(words: list[str], fake: Path) -> subprocess.Popen:
    """A bench of its own process, with the fake as its children."""
    code = f"""
    import sys
    from addp_core.recipes.cli import main
    from tools.bench import children
    children.ADDP = {[sys.executable, str(fake / "fake.py")]!r}
    sys.exit(main({words!r}))
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def running(fake: Path) -> int:
    """How many children there are."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return sum(line.split()[1:2] == [str(fake / "fake.py")] for line in listed.splitlines())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again(room, fake, tmp_path, capsys, number):
    out = tmp_path / "out"
    line = command(room, out, sets=("imagenet", "coco"))
    line = [word if not word.startswith("bench.only") else "bench.only=[finetune,det/a,det/b]" for word in line]
    (fake / "told.json").write_text(json.dumps({"wait": "det/a"}))
    process = start(line, fake)
    try:
        wait_for(fake / "waits", process)
        assert main(line) == 2  # the second one in the same folder
        assert f"process {process.pid} on" in last_line(capsys)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == (1 if number == signal.SIGTERM else -signal.SIGKILL)
    for _ in range(100):
        if not running(fake):
            break
        time.sleep(0.1)
    assert running(fake) == 0  # no orphans
    if number == signal.SIGTERM:
        assert "the same command continues" in errors
    assert states(out)["det/a"] == states(out)["det/b"] == "missing"
    assert done(fake, out)[-1] == "sweep det/a"
    (fake / "told.json").unlink()
    assert main(line) == 0
    assert done(fake, out) == ["sweep det/a", "det det/a/pictures", "sweep det/b", "det det/b/pictures"]
    table = capsys.readouterr().out
    whole = [word.replace(str(out), str(tmp_path / "whole")) for word in line]
    assert main(whole) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == table.splitlines()[:-1]  # the last one is the report's path


# -------------------- real verbs


def inside(self, words, output, processes=1) -> int:
    """`Children.addp` without a process: importing torch in each would be most of the time."""
    with output.open("a") as file:
        file.write(f"{words}\n")
    return main(list(words))


SMALL = """
seeds: [0]
generation: {set: {n: 6, sampling.steps: 2, extractor: "best:finetune/random", is_splits: 2, workers: 0}}
finetune:
  set: {data.size: 8, data.workers: 0, train.batch: 4, train.steps: 1, augment.auto: "", train.warmup_steps: 0}
linprobe: {recipe: tiny, set: {data.size: 8, data.workers: 0, fast.epochs: 1, fast.knn: 0, fast.held_out: 0.0}}
robustness: {set: {workers: 0}}
det:
  recipe: tiny
  set: {data.size: 32, data.workers: 0, train.steps: 1, train.batch: 2, train.warmup_steps: 0}
seg:
  recipe: tiny
  set: {data.crop: 32, data.scale: [48, 96], data.workers: 0, channels: 8, train.batch: 2, train.steps: 1,
        train.warmup_steps: 0}
"""


def test_every_benchmark_for_real(room, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mmseg")
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(children.Children, "addp", inside)
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of features
    (tmp_path / "small.yaml").write_text(SMALL)
    out = tmp_path / "out"
    sets = ("imagenet", "imagenet_a", "imagenet_c", "coco", "ade20k")
    line = command(room, out, "models=null", f"model={room / 'a'}", "bench.only=[]", sets=sets)
    line = [line[0], str(tmp_path / "small.yaml"), *(word for word in line[1:] if not word.startswith("models="))]
    assert main(line) == 0, capsys.readouterr().err
    steps = {step["name"]: step for step in content(out)["steps"]}
    assert {name: step["state"] for name, step in steps.items() if step["state"] != "done"} == {
        "generation/random": "left out"
    }
    results = json.loads((out / "finetune" / "addp" / "addp" / "best-seed0" / "results.json").read_text())
    assert steps["finetune/addp"]["scores"] == {"top1": [results["last"]["top1"]]}
    results = json.loads((out / "linprobe" / "addp" / "addp" / "best-seed0" / "results.json").read_text())
    assert steps["linprobe/addp"]["scores"] == {"top1": [results["best"]["top1"]]}  # of the heads that it tried
    assert set(steps["generation/addp"]["scores"]) == {"fd", "cs", "precision", "recall"}
    assert set(steps["robustness/random"]["scores"]) == {"a", "c"}
    assert set(steps["det/addp"]["scores"]) == {"box_ap", "mask_ap"}
    for name in ("generation/addp", "det/addp", "seg/random"):
        pictures = [out / path for path in steps[name]["pictures"]]
        assert len(pictures) >= 2
        assert all(path.stat().st_size > 100 for path in pictures)
    assert "data:image/" in (out / "report.html").read_text()
    assert content(out)["chance"]["finetune"] == {"top1": 10.0}
    assert content(out)["chance"]["robustness"]["a"] == pytest.approx(100 / 6)
    assert 0 < content(out)["chance"]["seg"]["miou"] < 30
    assert all(step["seconds"] > 0 for step in steps.values() if step["state"] == "done")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("results.json")}
    assert main(line) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_two_models_side_by_side_in_processes_of_their_own(room, tmp_path, capsys):
    out = tmp_path / "out"
    settings = yaml.safe_load(SMALL)["finetune"]["set"]
    line = command(
        room, out, "random=false", f"finetune.set={json.dumps(settings)}", "bench.only=finetune", "seeds=[3]"
    )
    assert main(line) == 0, capsys.readouterr().err
    rows = capsys.readouterr().out.splitlines()[1:3]
    for row, name in zip(rows, "ab", strict=True):
        run = best_run(out / "finetune" / name / name, 3)
        top1 = json.loads((run / "results.json").read_text())["last"]["top1"]
        assert row.split() == [name, f"{top1:.2f}"]
        assert yaml.safe_load((run / "recipe.yaml").read_text())["model"] == str(room / name)
    assert "| a |" in (out / "finetune" / "a" / "log.txt").read_text()  # what the sweep says


# -------------------- elsewhere


def test_print_gives_commands_that_run_as_they_are(room, fake, tmp_path, capsys):
    out = tmp_path / "out"
    line = command(room, out, "random=false", "bench.only=[robustness/a,det/a]")
    assert main([*line, "bench.launch=print", "bench.processes=4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "# finetune/a",
        f"addp sweep {out}/finetune/a/sweep.yaml",
        "# robustness/a (after finetune/a)",
        f"torchrun --standalone --nproc_per_node 4 -m addp_core robustness model={out}/finetune/a/a/best-seed0 "
        f"out={out}/robustness/a/seed0 imagenet_a={room}/toy/imagenet-a",
        "# det/a",
        f"addp sweep {out}/det/a/sweep.yaml",
        f"addp det predict model={out}/det/a/a/best-seed0 images={out}/inputs/coco out={out}/det/a/pictures "
        "score=0.1 most=8",
    ]
    assert yaml.safe_load((out / "det" / "a" / "sweep.yaml").read_text())["processes"] == 4
    assert sorted(path.name for path in (out / "inputs" / "coco").iterdir())[0].startswith("000.")
    assert done(fake, out) == []
    assert main(line) == 0  # and what is printed is what runs
    assert len(done(fake, out)) == 4


SBATCH = """#!/bin/bash
echo "$@" >> $PLAY/sbatch.txt
echo $((100 + $(wc -l < $PLAY/sbatch.txt)));
"""


def test_slurm_gets_a_job_a_step(room, fake, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    line = command(room, out, "random=false", "bench.only=[robustness/a,det/a]", "bench.launch=slurm")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert main(line) == 2
    assert "no sbatch on the PATH" in last_line(capsys)
    assert not out.exists()
    (fake / "sbatch").write_text(SBATCH)
    (fake / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:/usr/bin:/bin")
    assert main([*line, "bench.sbatch=['--gres=gpu:8','--account=us','-p short']"]) == 0
    assert capsys.readouterr().out.split() == [
        *("101", "finetune/a", "102", "robustness/a", "103", "det/a", "104", "report")
    ]
    jobs = (fake / "sbatch.txt").read_text().splitlines()
    assert jobs[0] == f"--parsable {out}/finetune/a/job.sbatch"
    assert jobs[1].startswith("--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes ")
    assert jobs[3] == f"--parsable --dependency=afterany:101:102:103 {out}/job.sbatch"
    script = (out / "robustness" / "a" / "job.sbatch").read_text()
    assert "#SBATCH --gres=gpu:8\n" in script
    report = (out / "job.sbatch").read_text()  # who pays is asked of this one, too
    assert "#SBATCH --account=us\n#SBATCH -p short\n" in report
    assert "gpu" not in report
    words = script.splitlines()[-1].replace("'", "").partition(" -m addp_core ")[2].split()
    assert words[:3] == ["bench", f"{out}/recipe.yaml", "bench.only=[robustness/a]"]

    # what the jobs do, here: they share the folder, and each has its own step
    lock(out, shared=True)
    try:
        first = (out / "finetune" / "a" / "job.sbatch").read_text().splitlines()[-1].replace("'", "")
        assert main(first.partition(" -m addp_core ")[2].split()) == 0
        assert main(words) == 0
        assert done(fake, out) == ["sweep finetune/a", "robustness robustness/a/seed0"]
        assert states(out)["robustness/a"] == "done"
        assert states(out)["det/a"] == "missing"
    finally:
        release_out(out)


# -------------------- what is refused, before anything starts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench.only=dett"], "bench.only: found 'dett', expected benchmarks (generation, finetune"),
        (["bench.only=dett"], "did you mean 'det"),
        (["bench.only=det/c"], "bench.only: found 'det/c'"),
        (["bench.only=[generation,det]", "data.coco="], "bench.only: det/a cannot be done: data.coco is not given"),
        (["data.sketch={room}/toy/sketchy"], "data.sketch: {room}/toy/sketchy does not exist"),
        (["data.coco={room}/toy/imagenet"], "data.coco: {room}/toy/imagenet has none of annotations/"),
        (["data.ade20k={room}/toy/coco"], "data.ade20k: "),
        (["data.imagenet_c={room}/toy/imagenet"], "data.imagenet_c: {room}/toy/imagenet lacks"),
        (["models={{a: {room}/c}}"], "models.a: {room}/c: no such file"),
        (["models={{random: {room}/a}}"], "models: 'random', expected a name"),
        (["model={room}/a"], "model: found '{room}/a' and models too"),
        (["models={{}}"], "models: none given; expected model="),
        (["det.set={{train.step: 5}}"], "det: unknown key 'train.step'; did you mean 'train.steps'?"),
        (["det.grid={{train.lr: [0.1, -1]}}"], "det: train.lr: found -1"),
        (["finetune.recipe=tinny"], "finetune: no recipe named 'tinny'"),
        (["robustness.set={{worker: 0}}"], "robustness: unknown key 'worker'"),
        (["robustness.seeds=[7]"], "robustness.seeds: found 7, expected seeds of finetune: [0]"),
        (["generation.grid={{n: [1]}}"], "unknown key 'generation.grid'"),
        (["det.set={{model: 'best:finetune/c'}}"], "best:finetune/c: no such step"),
    ],
)
def test_wrong_input(room, fake, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    assert main(command(room, out, *(word.format(room=room) for word in words))) == 2
    assert message.format(room=room) in last_line(capsys)
    assert not out.exists()
    assert done(fake, out) == []


def test_a_missing_package_is_named_before_the_start(room, fake, tmp_path, capsys, monkeypatch):
    find = bench.check_packages.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "mmcv" else find(name, *rest))
    assert main(command(room, tmp_path / "out")) == 2
    assert "seg: the package 'mmcv' is not installed; add it with: " in last_line(capsys)
    assert main(command(room, tmp_path / "out", "bench.only=det/a", "random=false")) == 0


@pytest.mark.parametrize("name", ["demo", "toy", "vit_b", "vit_l"])
def test_named_recipes_hold_keys_of_their_verbs(name):
    recipe = load(bench.Recipe, find_recipe(bench, name))
    for benchmark, training in TRAININGS.items():
        keys = getattr(recipe, benchmark)
        first = {key: values[0] for key, values in keys.grid.items()}
        settings = as_words({training.source: "x", "out": "x", "model": "x", **keys.set, **first})
        typed([*training.verb.split(), keys.recipe, *settings], benchmark)
    typed(["evaluate", "out=x", "reference=x", "model=x", *as_words(recipe.generation.set)], "generation")
    typed(["robustness", "out=x", "model=x", *as_words(recipe.robustness.set)], "robustness")
