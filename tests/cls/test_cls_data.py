"""Training and validation images of classification: which they are, and that they differ."""

import shutil
import tarfile

import numpy as np
import pytest
from image_data import add_member, encode, noise_image, save_image
from PIL import Image

from addp_core.base.errors import UserError
from addp_core.data.config import DataConfig
from addp_core.data.image_source import ImageSource
from cls.data import open_splits


def write_folders(root, images: int = 10) -> DataConfig:
    for name in ("cat", "dog"):
        for i in range(images):
            save_image(root / name / f"{i}.png")
    return DataConfig(source=str(root))


def names_of(source: ImageSource) -> set[bytes]:
    return {b"/".join(name.split(b"/")[-2:]) for name in source.relative_names()}


def test_validation_on_the_training_images_is_refused(tmp_path, caplog):
    config = write_folders(tmp_path / "set")
    with pytest.raises(UserError, match=r"val: .*/set has no split to validate on.*val_share=0\.1 to hold out"):
        open_splits(config)
    train, val = open_splits(config, str(tmp_path / "set"))
    assert len(train) == len(val) == 20
    assert "its metrics say nothing about other images" in caplog.text
    (tmp_path / "both").mkdir()
    (tmp_path / "set").rename(tmp_path / "both" / "Training")
    shutil.copytree(tmp_path / "both" / "Training", tmp_path / "both" / "Testing")
    with pytest.raises(UserError, match=r"no folder 'val'; it has Testing, Training; expected val=.*val_share=0\.1"):
        open_splits(DataConfig(source=str(tmp_path / "both")))


def test_held_out_share(tmp_path, caplog):
    caplog.set_level("INFO")
    config = write_folders(tmp_path / "set")
    train, val = open_splits(config, val_share=0.3)
    assert (len(train), len(val)) == (14, 6)
    assert np.bincount(val.labels).tolist() == [3, 3]
    assert (train.classes, val.classes) == (("cat", "dog"),) * 2
    assert not names_of(train) & names_of(val)
    assert [val.read(i)[1] for i in range(6)] == val.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "6 of 20 images are held out for validation (val_share=0.3, seed 0)" in caplog.text
    moved = shutil.copytree(tmp_path / "set", tmp_path / "elsewhere" / "moved")
    assert names_of(open_splits(DataConfig(source=str(moved)), val_share=0.3)[1]) == names_of(val)
    assert names_of(open_splits(config, val_share=0.3, seed=1)[1]) != names_of(val)
    with pytest.raises(UserError, match=r"val_share: found 0\.3 beside val="):
        open_splits(config, str(tmp_path), 0.3)
    for i in range(1, 10):
        (tmp_path / "set" / "cat" / f"{i}.png").unlink()
    with pytest.raises(UserError, match="class 'cat' has 1 image; expected at least two"):
        open_splits(config, val_share=0.3)


def test_a_share_of_the_labels(tmp_path, caplog):
    caplog.set_level("INFO")
    config = write_folders(tmp_path / "set")
    tenth, val = open_splits(config, val_share=0.2, label_share=0.1)
    half, _ = open_splits(config, val_share=0.2, label_share=0.5)
    assert np.bincount(tenth.labels).tolist() == [1, 1]
    assert np.bincount(half.labels).tolist() == [4, 4]
    assert "8 of 16 images are trained on (label_share=0.5, seed 0)" in caplog.text
    assert names_of(tenth) < names_of(half)
    assert not names_of(half) & names_of(val)
    assert [half.read(i)[1] for i in range(8)] == half.labels.tolist()
    assert names_of(open_splits(config, val_share=0.2, label_share=0.5, seed=1)[0]) != names_of(half)
    everything, _ = open_splits(config, val_share=0.2, label_share=1.0)
    assert len(everything) == 16


def test_validation_images_without_classes(tmp_path):
    write_folders(tmp_path / "train")
    Image.new("RGB", (8, 8)).save(tmp_path / "ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "val").mkdir()
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").rename(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UserError, match=r"val: .*no class folders for its 1 images.*sorted by valprep\.sh"):
        open_splits(DataConfig(source=str(tmp_path)))


def test_held_out_share_of_shards(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(8):
                add_member(tar, f"{shard}{i}.png", encode(noise_image(8, 8)))
                add_member(tar, f"{shard}{i}.cls", str(i % 2).encode())
    train, val = open_splits(DataConfig(source=str(tmp_path)), val_share=0.25)
    assert (len(train), val.labels.tolist().count(0), val.labels.tolist().count(1)) == (12, 2, 2)
