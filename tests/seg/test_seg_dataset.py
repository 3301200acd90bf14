"""Data workers of segmentation that are not forked, as on Linux from Python 3.14 on; the listing that runs record."""

import os
import shutil

import torch
from checks import start_method
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from seg import dataset  # noqa: F401 (importing it registers its parts)
from seg.mmseg_config import fill_runtime, read_base_config
from seg.scenes import SceneListing


def test_workers_of_a_forkserver_read_the_same_batches(scenes, tmp_path):
    init_default_scope("mmseg")
    batches = []
    for workers in (0, 1):
        cfg = read_base_config()
        fill_runtime(cfg, tmp_path, workers, str(scenes))
        with start_method("forkserver"):
            loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
            iterator = iter(loader)
            batches.append(next(iterator))
            if workers:
                iterator._shutdown_workers()
    assert all(map(torch.equal, batches[0]["inputs"], batches[1]["inputs"]))


def test_the_digest_of_a_listing_follows_the_pairs_and_not_their_place(scenes_copy, tmp_path):
    listing = SceneListing(scenes_copy, "train")
    digest = listing.digest()
    assert len(listing) == 12
    moved = shutil.move(scenes_copy, tmp_path / "moved")
    assert SceneListing(moved, "train").digest() == digest
    first = listing.pairs[0]
    for path in (first.image, first.class_map):
        os.remove(moved / path.relative_to(scenes_copy))
    assert SceneListing(moved, "train").digest() != digest
