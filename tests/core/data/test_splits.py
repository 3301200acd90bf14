"""Which folders are splits and which are classes."""

import logging
from pathlib import Path

import pytest
from image_data import save_image

from addp_core.base.errors import UserError
from addp_core.data.sources import open_source


def write_classes(root: Path, *names: str) -> None:
    """Write one image for each class."""
    for name in names:
        save_image(root / name / "1.png")


@pytest.mark.parametrize(
    ("train", "val"), [("Training", "Validation"), ("Train", "valid"), ("TRAIN", "Val"), ("train", "validation")]
)
def test_names_of_splits_in_any_case(tmp_path, caplog, train, val):
    caplog.set_level("INFO")
    write_classes(tmp_path / train, "cat", "dog")
    write_classes(tmp_path / val, "cat", "dog")
    write_classes(tmp_path / "Testing", "cat", "dog")
    for split, folder in (("train", train), ("val", val), ("test", "Testing")):
        source = open_source(str(tmp_path), split)
        assert (source.classes, source.name(0)) == (("cat", "dog"), str(tmp_path / folder / "cat" / "1.png"))
    assert "the split test is Testing" in caplog.text


def test_missing_split_is_named(tmp_path):
    write_classes(tmp_path / "Training", "cat", "dog")
    write_classes(tmp_path / "Testing", "cat", "dog")
    with pytest.raises(UserError, match=r"data\.split: .* has no folder 'val'; it has Testing, Training"):
        open_source(str(tmp_path), "val")


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_class_with_the_name_of_a_split(tmp_path, caplog, name):
    for split in ("train", "val"):
        write_classes(tmp_path / split, "apple", "bear", name)
    classes = tuple(sorted(["apple", "bear", name]))
    assert open_source(str(tmp_path)).classes == classes
    inner = open_source(str(tmp_path / "train"))
    assert (inner.classes, len(inner)) == (classes, 3)
    assert f"{name} is read as a class, like the folders beside it (apple, bear)" in caplog.text


def test_splits_beside_other_folders(tmp_path, caplog):
    write_classes(tmp_path / "train", "cat", "dog")
    write_classes(tmp_path / "val", "cat", "dog")
    (tmp_path / "devkit").mkdir()
    (tmp_path / "devkit" / "readme.txt").touch()
    assert len(open_source(str(tmp_path))) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    save_image(tmp_path / "unlabeled" / "1.png")
    assert len(open_source(str(tmp_path))) == 2
    assert "passed over beside the splits train, val: unlabeled" in caplog.text


def test_splits_are_refused_as_classes(tmp_path):
    write_classes(tmp_path / "train" / "Train", "cat")
    write_classes(tmp_path / "train" / "Test", "cat")
    with pytest.raises(UserError, match="holds the splits Test, Train where class folders are expected"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("given", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_of_kaggle(tmp_path, given):
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    write_classes(root / "train", "n01440764", "n01443537")
    for split in ("val", "test"):
        save_image(root / split / f"ILSVRC2012_{split}_00000001.png")
    for split in ("train", "val"):
        (tmp_path / "ILSVRC" / "Annotations" / "CLS-LOC" / split).mkdir(parents=True)
    (tmp_path / "LOC_synset_mapping.txt").touch()
    train = open_source(str(tmp_path / given))
    assert (len(train), train.classes) == (2, ("n01440764", "n01443537"))
    assert [len(open_source(str(tmp_path / given), split)) for split in ("val", "test")] == [1, 1]


def test_splits_inside_one_folder(tmp_path):
    write_classes(tmp_path / "archive" / "Training", "cat", "dog")
    write_classes(tmp_path / "archive" / "Testing", "cat", "dog")
    assert len(open_source(str(tmp_path))) == 2
