"""`addp bench` with the real verbs."""

import json

import pytest
import yaml
from bench_commands import bench_command, bench_json
from transfers import write_tiny_mage

from addp_core import load_encoder, save_model
from addp_core.networks.classifier import Classifier
from addp_core.recipes.cli import main
from tools import children
from tools.bench.sweep import best_run

SMALL = """
seeds: [0]
generation:
  set: {n: 6, sweep.steps: [2, 3], sweep.schedule: [cosine, linear], sweep.pairwise: true, is_splits: 2,
        extractor: "best:finetune/random", workers: 0}
finetune:
  set: {data.size: 8, data.workers: 0, train.batch: 4, train.steps: 1, augment.auto: "", train.warmup_steps: 0}
linprobe: {recipe: tiny, set: {data.size: 8, data.workers: 0, fast.epochs: 1, fast.knn: 3, fast.held_out: 0.0}}
robustness: {set: {workers: 0}}
det:
  recipe: tiny
  set: {data.size: 32, data.workers: 0, train.steps: 1, train.batch: 2, train.warmup_steps: 0}
seg:
  recipe: tiny
  set: {data.crop: 32, data.scale: [48, 96], data.workers: 0, channels: 8, train.batch: 2, train.steps: 1,
        train.warmup_steps: 0}
seg_probe: {recipe: tiny, set: {data.size: 16, data.workers: 0, blocks: [-1], train.epochs: 1, k: 3}}
"""


def run_here(self, arguments, output, processes=1, environment=None) -> int:
    """`Children.run_addp` without a process: importing torch in each would take most of the time."""
    with output.open("a") as file:
        file.write(f"{arguments}\n")
    return main(list(arguments))


def test_every_benchmark_for_real(toys, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mmseg")
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(children.Children, "run_addp", run_here)
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of features
    (tmp_path / "small.yaml").write_text(SMALL)
    out = tmp_path / "out"
    datasets = ("imagenet", "imagenet_a", "imagenet_c", "coco", "ade20k")
    verb, *arguments = bench_command(toys, out, f"model={toys / 'a'}", "bench.only=[]", datasets=datasets)
    arguments = [argument for argument in arguments if not argument.startswith("models=")]
    line = [verb, str(tmp_path / "small.yaml"), *arguments]
    assert main(line) == 0, capsys.readouterr().err
    steps = {step["name"]: step for step in bench_json(out)["steps"]}
    assert {name: step["state"] for name, step in steps.items() if step["state"] != "done"} == {
        "generation/random": "left out"
    }
    results = json.loads((out / "finetune" / "addp" / "addp" / "best-seed0" / "results.json").read_text())
    assert steps["finetune/addp"]["scores"] == {"top1": [results["last"]["top1"]]}
    results = json.loads((out / "linprobe" / "addp" / "addp" / "best-seed0" / "results.json").read_text())
    assert steps["linprobe/addp"]["scores"] == {key: [results["best"][key]] for key in ("top1", "knn")}
    assert set(steps["generation/addp"]["scores"]) == {"fd", "cs", "precision", "recall"}
    rows = steps["generation/addp"]["rows"]
    assert [(row["setting"]["sampling.steps"], row["setting"]["sampling.schedule"]) for row in rows] == [
        (2, "cosine"),
        (3, "linear"),
    ]
    assert min(row["scores"]["fd"] for row in rows) == steps["generation/addp"]["scores"]["fd"]
    assert steps["generation/addp"]["details"]["precision and recall"].startswith(
        "the pooled features of the classifier"
    )
    assert set(steps["robustness/random"]["scores"]) == {"a", "c"}
    assert set(steps["det/addp"]["scores"]) == {"box_ap", "mask_ap"}
    for name in ("generation/addp", "det/addp", "seg/random"):
        images = [out / path for path in steps[name]["pictures"]]
        assert len(images) >= 2
        assert all(path.stat().st_size > 100 for path in images)
    assert "data:image/" in (out / "report.html").read_text()
    assert bench_json(out)["chance"]["finetune"] == {"top1": 10.0}
    assert bench_json(out)["chance"]["robustness"]["a"] == pytest.approx(100 / 6)
    assert 0 < bench_json(out)["chance"]["seg"]["miou"] < 30
    results = json.loads((out / "seg_probe" / "addp" / "addp" / "best-seed0" / "results.json").read_text())
    assert steps["seg_probe/addp"]["scores"] == {probe: [results["best"][probe]["mIoU"]] for probe in ("linear", "knn")}
    assert bench_json(out)["chance"]["seg_probe"]["knn"] == bench_json(out)["chance"]["seg"]["miou"]
    assert all(step["seconds"] > 0 for step in steps.values() if step["state"] == "done")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("results.json")}
    assert main(line) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_mage_generates_beside_addp(toys, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(children.Children, "run_addp", run_here)
    classifier = tmp_path / "classifier.safetensors"
    save_model(Classifier(load_encoder(toys / "a", (8, 8)), classes=3), classifier)
    (run, tokenizer), out = write_tiny_mage(tmp_path, side=2), tmp_path / "out"
    images = {"n": 4, "sampling.steps": 2, "is_splits": 2, "workers": 0, "cache": str(tmp_path / "cache")}
    settings = [f"generation.set={json.dumps(images | {'extractor': str(classifier)})}", "seeds=[0]"]
    models = f"models={{addp: {toys / 'a'}, mage: {{model: {run}, tokenizer: {tokenizer}}}}}"
    assert main(bench_command(toys, out, models, "bench.only=[generation]", *settings)) == 0, capsys.readouterr().err
    steps = {step["name"]: step for step in bench_json(out)["steps"] if step["state"] == "done"}
    assert [*steps] == ["generation/addp", "generation/mage"]
    evaluation, filling = steps["generation/mage"]["commands"][:2]
    assert f"tokenizer={tokenizer}" in evaluation
    assert f"tokenizer={tokenizer}" in filling
    assert steps["generation/mage"]["scores"].keys() == {"fd", "cs", "precision", "recall"}


def test_two_models_in_processes_of_their_own(toys, tmp_path, capsys):
    out = tmp_path / "out"
    settings = yaml.safe_load(SMALL)["finetune"]["set"]
    line = bench_command(
        toys, out, "random=false", f"finetune.set={json.dumps(settings)}", "bench.only=finetune", "seeds=[3]"
    )
    assert main(line) == 0, capsys.readouterr().err
    rows = capsys.readouterr().out.splitlines()[1:3]
    for row, name in zip(rows, "ab", strict=True):
        run = best_run(out / "finetune" / name / name, 3)
        top1 = json.loads((run / "results.json").read_text())["last"]["top1"]
        assert row.split() == [name, f"{top1:.2f}"]
        assert yaml.safe_load((run / "recipe.yaml").read_text())["model"] == str(toys / name)
    assert "| a |" in (out / "finetune" / "a" / "log.txt").read_text()  # the output of the sweep
