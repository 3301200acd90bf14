"""Folders, lists, tar shards and Hugging Face datasets as sources of images."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_data import add_member, noise_image, save_image, write_shards

from addp_core.base.errors import UserError
from addp_core.data.cache import CachedSource
from addp_core.data.config import DataConfig
from addp_core.data.sources import ImageFiles, ImageSource, open_source


def relative_names(source: ImageSource, root: Path) -> list[str]:
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def test_flat_folder_is_sorted_and_ignores_other_files(tmp_path):
    for name in ("b.jpg", "a.PNG", "c.webp", "ü ñ.jpeg"):
        save_image(tmp_path / name)
    for name in ("notes.txt", ".hidden.jpg", "._a.jpg", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert relative_names(source, tmp_path) == ["a.PNG", "b.jpg", "c.webp", "ü ñ.jpeg"]
    image, label = source.read(0)
    assert (image.mode, image.size, label, source.classes) == ("RGB", (10, 10), None, ())


def test_images_beside_subfolders_have_no_classes(tmp_path):
    for name in ("top.jpg", "2019/may/a.jpg", "2019/b.jpg", "2020/c.jpg"):
        save_image(tmp_path / name)
    source = open_source(DataConfig(source=str(tmp_path)))
    assert relative_names(source, tmp_path) == ["2019/b.jpg", "2019/may/a.jpg", "2020/c.jpg", "top.jpg"]
    assert source.classes == ()
    assert source.read(1)[1] is None


def test_imagenet_folders(tmp_path):
    for name in ("train/n02/x.JPEG", "train/n01/y.JPEG", "train/n01/z.JPEG", "val/n02/v.JPEG"):
        save_image(tmp_path / name)
    (tmp_path / "val" / "n01").mkdir()  # a class without images keeps its label
    train, val = open_source(str(tmp_path)), open_source(str(tmp_path), "val")
    assert train.classes == val.classes == ("n01", "n02")
    assert [train.read(i)[1] for i in range(3)] == [0, 0, 1]
    assert val.read(0)[1] == 1
    assert len(open_source(DataConfig(source=str(tmp_path), split="validation"))) == 1
    with pytest.raises(UserError, match=r"data\.split.*no folder 'test'; it has train, val"):
        open_source(str(tmp_path), "test")


def test_class_names_from_the_caller_or_a_file(tmp_path):
    for name in ("set/cat/a.png", "set/dog/b.png"):
        save_image(tmp_path / name)
    root = str(tmp_path / "set")
    source = open_source(root, classes=["ant", "dog", "cat"])
    assert [source.read(i)[1] for i in range(2)] == [2, 1]
    (tmp_path / "classes.txt").write_text("dog\nant\ncat\n\n")
    source = open_source(DataConfig(source=root, classes=str(tmp_path / "classes.txt")))
    assert source.classes == ("dog", "ant", "cat")
    assert [source.read(i)[1] for i in range(2)] == [2, 0]
    with pytest.raises(UserError, match=r"data\.classes: .*(dog is none of the 2 classes; did you mean 'dogs')"):
        open_source(root, classes=["cat", "dogs"])
    (tmp_path / "classes.txt").write_text("dog\ncat\n", encoding="utf-8-sig")  # as Windows' Notepad writes it
    assert open_source(DataConfig(source=root, classes=str(tmp_path / "classes.txt"))).classes == ("dog", "cat")
    (tmp_path / "classes.txt").write_text("dog\ncat\ndog\n")
    with pytest.raises(UserError, match=r"data\.classes: .*classes\.txt has 'dog' 2 times; expected each class once"):
        open_source(DataConfig(source=root, classes=str(tmp_path / "classes.txt")))
    with pytest.raises(UserError, match=r"data\.classes: .* cannot be read"):
        open_source(DataConfig(source=root, classes=str(tmp_path / "no.txt")))


def test_published_lists(tmp_path):
    for name in ("train/n02/a b.png", "train/n01/c.png", "train/unlisted.png", "val/v1.png", "val/v2.png"):
        save_image(tmp_path / name)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "train.txt").write_text("n02/a b.png 1\n\nn01/c.png 0\n")
    (tmp_path / "meta" / "val.txt").write_text("v1.png 1\nv2.png 0\n")
    train, val = open_source(str(tmp_path)), open_source(str(tmp_path), "val")
    assert relative_names(train, tmp_path) == ["train/n02/a b.png", "train/n01/c.png"]
    assert [train.read(i)[1] for i in range(2)] == [1, 0]
    assert train.classes == ("n01", "n02")
    assert [val.read(i)[1] for i in range(2)] == [1, 0]
    assert val.classes == ("0", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png\n", "line 1 is 'a.png'; expected \"relative/path label\""),
        ("a.png 0\na.png cat\n", "line 2"),
        ("a.png -1\n", "line 1"),
        ("\n", "lists no image"),
        ("gone.png 0\n", "gone.png does not exist"),
        ("\0\xff", "line 1"),
        ("a.png 0\n../a.png 0\n", "line 2 names '../a.png'; expected a path below"),
        (" /etc/a.png 0\n", "line 1 names '/etc/a.png'; expected a path below"),
        ("a.png 99999999999999999999\n", "line 1 has label 99999999999999999999; expected at most 10,000,000"),
    ],
)
def test_invalid_lists_are_rejected(tmp_path, text, message):
    save_image(tmp_path / "train" / "a.png")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "train.txt").write_text(text)
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_hub_dataset_through_timm(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for split in ("train", "validation"):
        for name in ("cat/a.png", "dog/b.png"):
            save_image(tmp_path / "set" / split / name)
    source = open_source(f"hfds/{tmp_path / 'set'}")
    assert (len(source), source.classes, source.read(1)[1]) == (2, ("cat", "dog"), 1)
    validation = open_source(f"hfds/{tmp_path / 'set'}", "val")
    assert (validation.labels.tolist(), validation.read(1)[1]) == ([0, 1], 1)
    with pytest.raises(UserError, match="split 'test'"):
        open_source(f"hfds/{tmp_path / 'set'}", "test")
    with pytest.raises(UserError, match=r"data\.image_key.*'img'; expected one of image, label"):
        open_source(DataConfig(source=f"hfds/{tmp_path / 'set'}", image_key="img"))


class FakeHub:
    """A stand-in for timm's reader of a dataset with these splits and two images, and for the dataset itself."""

    class_to_idx = {"cat": 0, "dog": 1}  # noqa: RUF012

    def __init__(self, splits):
        self.splits, self.split, self.dataset, self.column = splits, "", self, "image"

    def __call__(self, _, split, **__):
        if split not in self.splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {self.splits}.')
        self.split = split
        return self

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {self.column: "", "label": np.array([1.0, np.nan]) if isinstance(index, slice) else 1}

    def select_columns(self, _):
        return self

    def with_format(self, _):
        return self


@pytest.mark.parametrize(
    ("requested", "splits", "opened"),
    [
        ("val", ["train", "validation", "test"], "validation"),
        ("val", ["train", "test"], "test"),
        ("val", ["val", "validation"], "val"),
        ("validation", ["train", "val", "test"], "val"),
        ("train", ["train"], "train"),
        ("train[:10%]", ["train[:10%]"], "train[:10%]"),
        ("validation", ["train", "test"], None),
        ("val", ["train"], None),
    ],
)
def test_hub_split_names(requested, splits, opened, monkeypatch):
    hub = FakeHub(splits)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("addp_core.data.sources.create_reader", hub)
    if opened is None:
        with pytest.raises(
            UserError, match=rf"split '{requested}'.*cannot be opened: Unknown split \"{requested}\".*'train'"
        ):
            open_source("hfds/someone/something", requested)
    else:
        source = open_source("hfds/someone/something", requested)
        assert hub.split == opened
        assert source.labels.tolist() == [1, -1]  # the second image has no label
        assert source.name(1) == f"hfds/someone/something/{requested}[1]"
        hub.column = "photo"  # features that were kept by the names of images must not serve for another column
        other = open_source(DataConfig(source="hfds/someone/something", image_key="photo"), requested)
        assert other.name(1) == f"hfds/someone/something/{requested}[1].photo"


def test_hub_dataset_needs_a_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_source("hfds/someone/something")


@pytest.mark.parametrize("kind", ["wds", "hfids", "tfds"])
def test_streaming_datasets_are_rejected_with_alternatives(kind):
    with pytest.raises(UserError, match=r"random access.*\.tar files, or hfds/"):
        open_source(f"{kind}/imagenet")


def write_text_files(root: Path) -> None:
    for i in range(3):
        (root / f"{i}.txt").write_text("text")
    (root / "table.csv").write_text("1,2")


def write_broken_tar(root: Path) -> None:
    (root / "x.tar").write_bytes(b"no tar at all" * 100)


def write_tar_without_images(root: Path) -> None:
    with tarfile.open(root / "x.tar", "w") as tar:
        add_member(tar, "a.txt", b"text")


def write_truncated_tar(root: Path) -> None:
    write_shards(root, 1)
    path = root / "shard-0.tar"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "holds no files; expected images"),
        (lambda root: (root / "sub").mkdir(), "holds no files"),
        (write_text_files, "holds no image but 4 other files (3 .txt, 1 .csv); expected .jpg"),
        (write_broken_tar, "x.tar cannot be read as .tar"),
        (write_tar_without_images, "holds no image but 1 .txt; expected .jpg"),
        (write_truncated_tar, "shard-0.tar cannot be read as .tar"),
    ],
)
def test_sources_without_images_are_rejected(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path))
    assert str(error.value).startswith(f"data.source: {tmp_path}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_path_suggests_a_similar_name(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"does not exist.*did you mean 'photos'"):
        open_source(str(tmp_path / "photo"))
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="is a file"):
        open_source(str(tmp_path / "photos.zip"))
    with pytest.raises(UserError, match=r"data\.source: missing"):
        open_source(DataConfig())


def test_circular_links_are_followed_once(tmp_path):
    save_image(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert relative_names(open_source(str(tmp_path)), tmp_path) == ["link.png", "real/a.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(UserError, match=r"no permission.*locked"):
        open_source(str(tmp_path))


def test_digest_of_a_listing(tmp_path):
    for name in ("a/cat/1.png", "a/cat/2.png", "a/dog/1.png"):
        save_image(tmp_path / name)
    before = open_source(str(tmp_path / "a")).digest()
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    moved = tmp_path / "elsewhere" / "b"
    assert open_source(str(moved)).digest() == before
    assert CachedSource(open_source(str(moved)), 8, 1.0).digest() == before
    (moved / "cat" / "1.png").rename(moved / "cat" / "3.png")
    assert open_source(str(moved)).digest() != before
    (moved / "cat" / "3.png").rename(moved / "cat" / "1.png")
    save_image(moved / "cat" / "1.png", noise_image(20, 20))
    assert open_source(str(moved)).digest() != before


def test_names_below_what_a_recipe_names(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png"):
        save_image(tmp_path / "set" / name)
    assert open_source(str(tmp_path / "set")).names_below(str(tmp_path / "set")) == [
        "train/cat/1.png",
        "train/dog/2.png",
    ]
    outside = ImageFiles(tmp_path / "set", ["train/cat/1.png", "../x.png"])
    with pytest.raises(UserError, match=r"the image .*set/\.\./x\.png is not below .*/set"):
        outside.names_below(str(tmp_path / "set"))


def test_home_folders_of_nobody(tmp_path):
    with pytest.raises(UserError, match=r"~nobody-of-this-name/photos: ~nobody-of-this-name has no home folder"):
        open_source("~nobody-of-this-name/photos")
