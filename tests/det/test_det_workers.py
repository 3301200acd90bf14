"""Data workers of detection that are not forked, as on Linux from Python 3.14 on; and the record of a changed dataset."""

import json
import logging
import shutil

import torch
from checks import start_method

from addp_core.recipes.cli import main
from addp_core.recipes.config import load
from det.coco import open_coco
from det.train import Recipe, make_stream


def test_workers_of_a_forkserver_read_the_same_batches(toy_coco):
    batches = []
    for workers in (0, 1):
        settings = [f"data={toy_coco}", "data.size=32", "train.batch=2", f"data.workers={workers}"]
        recipe = load(Recipe, None, ["out=run", "model=tiny", *settings])
        with start_method("forkserver"):
            stream = make_stream(recipe, open_coco(recipe.data, "train")).batches()
            batches.append(next(stream))
            stream.close()
    assert torch.equal(batches[0].images, batches[1].images)
    for expected, loaded in zip(batches[0].targets, batches[1].targets, strict=True):
        assert all(torch.equal(expected[key], loaded[key]) for key in expected)


def test_a_run_says_that_its_annotations_have_changed(toy_coco, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_coco, "coco")
    arguments = ["det", "train", "tiny", "model=tiny", "init=random", "data=coco", "out=run", "data.size=32"]
    arguments += ["data.workers=0", "train.batch=2", "train.warmup_steps=0", "train.preview_every=0"]
    assert main([*arguments, "train.steps=1"]) == 0
    path = tmp_path / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "addp"):
        assert main([*arguments, "train.steps=2"]) == 0
    assert "data: changed since this run last read it: train: 8 images as before, but others" in caplog.text
