"""The toy datasets as detectron2 knows them."""

import pytest


@pytest.fixture(scope="session")
def toy_sets(toy_coco):
    """Register the splits of `toy_coco` as zoo_train and zoo_val."""
    from detectron2.data.datasets import register_coco_instances

    for split in ("train", "val"):
        annotations = toy_coco / "annotations" / f"instances_{split}2017.json"
        register_coco_instances(f"zoo_{split}", {}, str(annotations), str(toy_coco / f"{split}2017"))
