"""The indexes of tar shards in the user's cache: read once, shared by processes, and never trusted when outdated."""

import os
import tarfile
import time
from pathlib import Path

import pytest
from image_data import add_member, encode, noise_image

from addp_core.data import tar_index
from addp_core.data.sources import open_source

LONG_AGO = 1_000_000_000  # seconds; a file that has just been written may change again without another time


@pytest.fixture
def shard(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index, "MIN_BYTES", 0)
    return write_shard(tmp_path / "shards" / "a.tar", ["cat/é.png", "dog/2.png", "dog/10.png"])


def write_shard(path: Path, names: list[str], changed: float = LONG_AGO) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            add_member(tar, name, encode(noise_image(8, 8, seed=i)))
        add_member(tar, "notes.txt", b"text")
    os.utime(path, (changed, changed))
    return path


def listing(path: Path) -> list:
    """Return the names, labels, sizes and pixels of a source."""
    source = open_source(str(path))
    names = [(source.name(i), source.encoded_size(i), source.read_bytes(i)) for i in range(len(source))]
    return [source.classes, source.digest(), *names]


@pytest.fixture
def headers_read(monkeypatch) -> list:
    """Every shard whose headers are read from here on."""
    read, original = [], tarfile.open

    def recording(*args, **kwargs):
        read.append(args or kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(tarfile, "open", recording)
    return read


def index_file(tmp_path: Path) -> Path:
    (file,) = (path for path in (tmp_path / "cache" / "addp" / "tars").iterdir() if path.suffix != ".lock")
    return file


def test_headers_are_read_once_and_the_images_stay_the_same(shard, headers_read, caplog):
    caplog.set_level("INFO", logger="addp")
    first = listing(shard)
    assert len(headers_read) == 1
    assert listing(shard) == first
    assert len(headers_read) == 1
    assert caplog.text.count("passed over: 1 .txt") == 2


def test_a_changed_shard_is_read_again(shard, headers_read):
    listing(shard)
    write_shard(shard, ["cat/1.png"], LONG_AGO + 1)
    headers_read.clear()
    assert len(open_source(str(shard))) == 1
    assert len(headers_read) == 1


@pytest.mark.parametrize("damage", [b"", b"xx\n{}", None])
def test_a_damaged_index_is_built_again(shard, tmp_path, headers_read, damage):
    first = listing(shard)
    file = index_file(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:-3] + b"9}}" if damage is None else damage)
    assert listing(shard) == first
    assert len(headers_read) == 2
    assert file.read_bytes() == content


def test_what_has_just_been_written_is_not_stored(shard, tmp_path, headers_read):
    os.utime(shard, (time.time(), time.time()))
    first = listing(shard)
    assert listing(shard) == first
    assert len(headers_read) == 2


def test_places_that_cannot_be_written_do_without(shard, tmp_path, headers_read, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert listing(shard) == listing(shard)
    assert len(headers_read) == 2


def test_of_several_processes_one_reads_the_headers(shard, tmp_path, monkeypatch):
    log, original = tmp_path / "builds", tarfile.open

    def slow(*args, **kwargs):
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return original(*args, **kwargs)

    monkeypatch.setattr(tarfile, "open", slow)
    children = []
    for _ in range(3):
        if not (child := os.fork()):
            os._exit(len(open_source(str(shard))) != 3)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert log.read_text() == "x"
