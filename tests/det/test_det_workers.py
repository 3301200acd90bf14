"""Data workers of detection that are not forked, as on Linux from Python 3.14 on; the digest that runs record."""

import json
import shutil

import torch
from checks import start_method

from addp_core.recipes.config import load
from det.coco import open_coco
from det.config import CocoConfig
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
    for name in ("images", "boxes", "labels", "masks"):
        assert torch.equal(getattr(batches[0], name), getattr(batches[1], name))


def test_the_digest_of_a_dataset_follows_its_objects_and_not_its_place(toy_coco, tmp_path):
    root = shutil.copytree(toy_coco, tmp_path / "coco")
    config = CocoConfig(root=str(root))
    digest = open_coco(config, "train").digest()
    assert digest == open_coco(CocoConfig(root=str(toy_coco)), "train").digest()
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    assert open_coco(config, "train").digest() != digest
