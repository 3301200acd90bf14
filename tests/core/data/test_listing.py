"""What is part of a dataset, and what is passed over and counted."""

import os

import pytest
from image_data import save_image

from addp_core.data.listing import list_folder, natural_key, why_passed_over
from addp_core.data.sources import open_source


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cat/1.jpg", ""),
        ("./cat/1.jpg", ""),
        ("cat/._1.jpg", "hidden"),
        (".ipynb_checkpoints/1.jpg", "hidden"),
        ("__MACOSX/cat/1.jpg", "in __MACOSX/"),
        ("cat/@eaDir/1.jpg", "in @eaDir/"),
        ("lost+found", "in lost+found/"),
        ("../cat/1.jpg", "with .. in the name"),
    ],
)
def test_names_that_are_passed_over(name, reason):
    assert why_passed_over(name) == reason


def test_what_is_passed_over_is_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    names = ["cat/1.jpg", "dog/2.BMP", "cat/._1.jpg", "__MACOSX/cat/1.jpg", "dog/@eaDir/2.jpg", "lost+found/3.jpg"]
    for name in names:
        save_image(tmp_path / name)
    (tmp_path / "cat" / "readme.txt").touch()
    (tmp_path / "cat" / "shard.tar").touch()
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "cat" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "dog" / "pipe.jpg")
    source = open_source(str(tmp_path))
    assert (len(source), source.classes) == (2, ("cat", "dog"))
    for text in ("2 dangling link", "1 hidden", "1 in __MACOSX/", "1 in lost+found/", "1 .txt", "1 .tar", "1 special"):
        assert text in caplog.text
    listing = list_folder(tmp_path)
    assert (listing.images, listing.tars) == (["cat/1.jpg", "dog/2.BMP"], ["cat/shard.tar"])
    assert listing.passed_over.total() == 7


def test_system_folder_that_may_not_be_read(tmp_path, monkeypatch):
    """`lost+found` at the root of a disk, which only root may read; any other such folder is an error."""
    for name in ("cat/1.jpg", "dog/2.jpg", "lost+found/x.jpg"):
        save_image(tmp_path / name)
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) in ("lost+found", "locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    assert len(open_source(str(tmp_path))) == 2
    (tmp_path / "locked").mkdir()
    with pytest.raises(Exception, match=r"no permission to read .*locked; change its permissions"):
        open_source(str(tmp_path))


def test_a_folder_is_read_under_its_own_name_and_not_by_a_link_to_it(tmp_path):
    for name in ("set/ant/1.jpg", "set/cat/2.jpg", "elsewhere/3.jpg"):
        save_image(tmp_path / name)
    (tmp_path / "set" / "zoo").mkdir()
    (tmp_path / "set" / "zoo" / "favorites").symlink_to("../cat")
    (tmp_path / "set" / "zoo" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "yak").symlink_to("ant")
    source = open_source(str(tmp_path / "set"))
    assert source.names_below(str(tmp_path / "set")) == ["ant/1.jpg", "cat/2.jpg", "zoo/more/3.jpg"]
    assert [source.classes[label] for label in source.labels] == ["ant", "cat", "zoo"]


def test_names_are_sorted_by_the_numbers_in_them():
    names = ["b10.png", "B9.png", "b009.png", "a", "²", "b٣.png"]
    assert sorted(names, key=natural_key) == ["a", "b٣.png", "B9.png", "b009.png", "b10.png", "²"]
