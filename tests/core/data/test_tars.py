"""Tar shards: the rules of folders, WebDataset's labels, damage, and processes that share them."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from image_data import (
    add_member,
    concatenate,
    encode,
    equal_rows,
    make_stream,
    noise_image,
    take_batches,
    write_shards,
)
from PIL import Image

from addp_core.base.errors import UserError
from addp_core.data.sources import open_source


def write_tar(path: Path, names: list[str], labels: str = "", texts: tuple[str, ...] = ()) -> None:
    """Write a tar of images; beside each image, a file with the extension `labels` and one of the texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {".jpg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".bmp": "BMP"}
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            stem, extension = os.path.splitext(name)
            add_member(tar, name, encode(noise_image(8, 8, seed=i), kinds.get(extension.lower(), "PNG")))
            if labels:
                add_member(tar, stem + labels, texts[i % len(texts)].encode())


def labels_of(path: Path, split: str = "train", **options) -> list[str]:
    """Return the class name of each image, "" without."""
    source = open_source(str(path), split, **options)
    return [source.classes[label] if label >= 0 else "" for label in source.labels]


def test_tar_file_with_a_tar_inside(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        add_member(tar, "k.png", encode(Image.new("RGB", (4, 4), (7, 0, 0))))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        add_member(tar, "dog/10.png", encode(Image.new("RGB", (4, 4), (10, 0, 0))))
        add_member(tar, "dog/9.png", encode(Image.new("RGB", (4, 4), (9, 0, 0))))
        add_member(tar, "cat/1.png", encode(Image.new("RGB", (4, 4), (1, 0, 0))))
        add_member(tar, "readme.txt", b"no image")
        add_member(tar, "koala.tar", inner.getvalue())
    source = open_source(str(tmp_path / "all.tar"))
    found = [source.read(i) for i in range(len(source))]
    assert [image.getpixel((0, 0))[0] for image, _ in found] == [1, 9, 10, 7]
    assert [source.classes[label] for _, label in found] == ["cat", "dog", "dog", "koala"]
    assert source.name(0) == f"{tmp_path}/all.tar/cat/1.png"


def test_order_of_tar_shards_does_not_depend_on_the_directory_listing(tmp_path, monkeypatch):
    write_shards(tmp_path)
    source = open_source(str(tmp_path))
    expected = [f"{tmp_path}/shard-{shard}.tar/{i}.png" for shard in range(3) for i in range(4)]
    assert [source.name(i) for i in range(len(source))] == expected
    for i in range(12):
        assert (np.asarray(source.read(i)[0]) == np.asarray(noise_image(12, 12, seed=10 * (i // 4) + i % 4))).all()
    scandir = os.scandir
    monkeypatch.setattr("os.scandir", lambda path: nullcontext(sorted(scandir(path), key=str)[::-1]))
    reopened = open_source(str(tmp_path))
    assert [reopened.name(i) for i in range(12)] == expected
    assert (np.asarray(reopened.read(5)[0]) == np.asarray(source.read(5)[0])).all()
    assert not list(tmp_path.glob("*.pickle"))


def test_tar_shards_in_forked_workers(tmp_path):
    write_shards(tmp_path)
    source = open_source(str(tmp_path))
    expected = concatenate(take_batches(make_stream(source), 12))  # the parent's files are open when the workers start
    assert equal_rows(concatenate(take_batches(make_stream(source, workers=2), 12)), expected)


def test_truncated_tar_is_warned_about(tmp_path, caplog):
    write_shards(tmp_path, 2)
    open_source(str(tmp_path))
    assert "probably truncated" not in caplog.text  # the folder's name, which is logged, contains the word
    path = tmp_path / "shard-1.tar"
    path.write_bytes(path.read_bytes()[:1024])
    assert len(open_source(str(tmp_path))) == 5
    assert f"{path} has no end-of-archive marker" in caplog.text


def test_members_are_chosen_like_files(tmp_path, caplog):
    caplog.set_level("INFO")
    names = ["a/1.jpg", "a/2.webp", "b/3.tif", "b/4.BMP", "__MACOSX/a/._1.jpg", "a/._1.jpg", "b/@eaDir/4.png", "a/x.md"]
    write_tar(tmp_path / "set.tar", names)
    source = open_source(str(tmp_path / "set.tar"))
    assert [os.path.relpath(source.name(i), tmp_path / "set.tar") for i in range(len(source))] == names[:4]
    assert [source.read(i)[1] for i in range(4)] == [0, 0, 1, 1]
    assert "passed over: 1 in __MACOSX/, 1 hidden, 1 in @eaDir/, 1 .md" in caplog.text


def test_links_in_a_tar_are_their_targets(tmp_path, caplog):
    caplog.set_level("INFO")
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        add_member(tar, "./a/1.png", encode(noise_image(8, 8)))
        for name, kind, target in (
            ("./b/1.png", tarfile.LNKTYPE, "./a/1.png"),
            ("./c/1.png", tarfile.SYMTYPE, "../b/1.png"),
            ("./c/2.png", tarfile.SYMTYPE, "../gone.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    source = open_source(str(tmp_path / "links.tar"))
    assert source.classes == ("a", "b", "c")
    assert [np.asarray(source.read(i)[0]).tobytes() for i in range(3)] == [noise_image(8, 8).tobytes()] * 3
    assert "passed over: 1 dangling link" in caplog.text


def test_shards_are_found_at_any_depth_and_in_any_case(tmp_path):
    write_tar(tmp_path / "part0" / "000.tar", ["cat/1.png", "dog/2.png"])
    write_tar(tmp_path / "part1" / "001.TAR", ["cat/3.png"])
    assert labels_of(tmp_path) == ["cat", "dog", "cat"]
    assert labels_of(tmp_path / "part1" / "001.TAR", classes=["dog", "cat"]) == [""]  # one folder around all images


@pytest.mark.parametrize(
    ("labels", "texts", "expected"),
    [
        (".cls", ("0", "2\n", "1"), ["0", "2", "1", "0"]),
        (".cls", ("cat", "ant"), ["cat", "ant", "cat", "ant"]),
        (".json", ('{"label": 1, "width": 8}', '{"label": 0, "width": 8}'), ["1", "0", "1", "0"]),
        (".json", ('{"caption": "a cat"}',), ["", "", "", ""]),
    ],
)
def test_webdataset_labels(tmp_path, labels, texts, expected):
    for shard in range(2):
        write_tar(tmp_path / f"imagenet-{shard:04d}.tar", [f"{shard}{i}.jpg" for i in range(4)], labels, texts)
    assert labels_of(tmp_path) == expected * 2


def test_webdataset_labels_that_are_wrong_or_missing(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", ["1.jpg", "2.jpg"], ".cls", ("0", "-1"))
    with pytest.raises(UserError, match=r"a\.tar/2\.cls is '-1'; expected the number or the name of a class"):
        open_source(str(tmp_path))
    write_tar(tmp_path / "a.tar", ["1.jpg", "2.jpg"], ".cls", ("0", "7"))
    with pytest.raises(UserError, match=r"data\.classes: .* has label 7, but there are 2 classes"):
        open_source(str(tmp_path), classes=["cat", "dog"])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        add_member(tar, "3.png", encode(noise_image(8, 8)))
    assert open_source(str(tmp_path)).labels.tolist() == [0, 7, -1]
    assert "1 of 3 images have no .cls file" in caplog.text


def test_numbers_of_classes_whose_names_are_numbers(tmp_path):
    """Sorted folders 0 to 11 are 0, 1, 10, 11, 2, ...; the label 2 is the class of that name."""
    write_tar(tmp_path / "a.tar", ["1.jpg", "2.jpg", "3.jpg"], ".cls", ("2", "10", "0"))
    source = open_source(str(tmp_path), classes=sorted(map(str, range(12))))
    assert [source.classes[label] for label in source.labels] == ["2", "10", "0"]
    assert open_source(str(tmp_path), classes=["cat", *map(str, range(1, 12))]).labels.tolist() == [2, 10, 0]


def test_shards_are_classes_only_if_they_are_not_numbered(tmp_path):
    for name in ("cat", "dog"):
        write_tar(tmp_path / "named" / f"{name}.tar", ["1.png", "2.png"])
    for name in ("n01440764", "n01443537"):
        write_tar(tmp_path / "imagenet" / f"{name}.tar", ["1.png"])
    for number in range(2):
        write_tar(tmp_path / "numbered" / f"{number}.tar", ["1.png"])
    assert labels_of(tmp_path / "named") == ["cat", "cat", "dog", "dog"]
    assert labels_of(tmp_path / "imagenet") == ["n01440764", "n01443537"]
    assert labels_of(tmp_path / "numbered") == ["", ""]
    assert labels_of(tmp_path / "numbered", classes=["0", "1"]) == ["0", "1"]
    assert labels_of(tmp_path / "named" / "cat.tar") == ["", ""]


def test_splits_in_and_among_shards(tmp_path):
    write_tar(tmp_path / "one.tar", ["set/train/cat/1.png", "set/train/dog/2.png", "set/Valid/dog/3.png"])
    assert labels_of(tmp_path / "one.tar") == ["cat", "dog"]
    assert labels_of(tmp_path / "one.tar", "val", classes=["cat", "dog"]) == ["dog"]
    for name in ("pets-train-0.tar", "pets-train-1.tar", "pets-validation-0.tar"):
        write_tar(tmp_path / "pets" / name, ["cat/1.png", "dog/2.png"])
    assert (len(labels_of(tmp_path / "pets")), len(labels_of(tmp_path / "pets", "val"))) == (4, 2)
    with pytest.raises(UserError, match="no shard of 'test'; it has train, val"):
        open_source(str(tmp_path / "pets"), "test")


def test_damaged_shards_are_named(tmp_path):
    write_shards(tmp_path)
    path = tmp_path / "shard-1.tar"
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"shard-1\.tar is empty \(0 bytes\)"):
        open_source(str(tmp_path))
    path.write_bytes(b"\x1f\x8b" + bytes(1024))
    with pytest.raises(UserError, match=r"shard-1\.tar is compressed"):
        open_source(str(tmp_path))
    path.write_bytes(content[:1024] + b"damage" * 86 + content[1540:])  # Python's reader would end here
    with pytest.raises(UserError, match=r"shard-1\.tar cannot be read as \.tar \(damaged at byte 1,024\)"):
        open_source(str(tmp_path))


def test_shards_can_be_sent_to_workers_of_any_start_method(tmp_path):
    write_shards(tmp_path)
    source = open_source(str(tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read_bytes(5) == source.read_bytes(5)
    assert copy.digest() == source.digest()


def test_names_that_lead_out_of_the_tar_are_passed_over(tmp_path, caplog):
    caplog.set_level("INFO")
    write_tar(tmp_path / "a.tar", ["../../x.png", "cat/../../y.png", "cat/1.png", "cat/../dog/2.png"])
    source = open_source(str(tmp_path / "a.tar"))
    assert source.names_below(str(tmp_path / "a.tar")) == ["cat/1.png", "dog/2.png"]
    assert "passed over: 2 with .. in the name" in caplog.text


@pytest.mark.parametrize("folder", ["train", "set/train", "ILSVRC/Data/CLS-LOC/train"])
def test_a_tar_of_one_split_has_no_other(tmp_path, folder):
    write_tar(tmp_path / "a.tar", [f"{folder}/cat/1.png", f"{folder}/dog/2.png"])
    assert labels_of(tmp_path / "a.tar") == ["cat", "dog"]
    with pytest.raises(UserError, match=r"has no folder 'val'; it has train"):
        open_source(str(tmp_path / "a.tar"), "val")


def test_tars_that_were_joined_byte_by_byte(tmp_path):
    """Python's reader, as tar itself, ends at the zeros of the first, however many they are."""
    write_tar(tmp_path / "a.tar", ["cat/1.png"])
    write_tar(tmp_path / "b.tar", ["dog/2.png"])
    first, second = (tmp_path / "a.tar").read_bytes(), (tmp_path / "b.tar").read_bytes()
    for zeros in (0, 512, 1 << 20):
        (tmp_path / "c.tar").write_bytes(first + bytes(zeros) + second)
        with pytest.raises(UserError, match=r"c\.tar holds another \.tar behind its end.*tar --concatenate") as error:
            open_source(str(tmp_path / "c.tar"))
        assert "\n" not in str(error.value)
    (tmp_path / "c.tar").write_bytes(first + b"a signature" * 100)
    assert len(open_source(str(tmp_path / "c.tar"))) == 1


@pytest.mark.parametrize(
    ("program", "compress"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)]
)
def test_compressed_tars_are_named_with_their_program(tmp_path, program, compress):
    write_tar(tmp_path / "a.tar", ["cat/1.png"])
    compressed = compress((tmp_path / "a.tar").read_bytes())
    (tmp_path / "a.tar").write_bytes(compressed)
    with pytest.raises(UserError, match=rf"/a\.tar is compressed \({program}\).*decompress it with {program} first"):
        open_source(str(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "dog.tar", compressed)
    with pytest.raises(UserError, match=rf"/a\.tar/dog\.tar is compressed \({program}\)"):
        open_source(str(tmp_path / "a.tar"))


def test_links_over_many_links(tmp_path, caplog):
    """Chains, a circle and thousands of links that lead nowhere; tar stores a file given twice as a link to itself."""
    caplog.set_level("INFO")
    chains = {f"{i}.png": f"{i + 1}.png" for i in range(5000)}
    nowhere = {f"gone/{i}.png": f"gone/{i + 1}.png" for i in range(5000)}
    links = chains | nowhere | {"circle/a.png": "circle/b.png", "circle/b.png": "circle/a.png", "5000.png": "5000.png"}
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        add_member(tar, "5000.png", encode(noise_image(8, 8)))
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            tar.addfile(member)
    source = open_source(str(tmp_path / "links.tar"))
    assert len(source) == 5001
    assert source.read_bytes(0) == source.read_bytes(5000)
    assert "passed over: 5,002 dangling link" in caplog.text


def test_numbers_in_names_of_any_script_and_length(tmp_path):
    names = ["10.png", "9.png", "٣.png", "²", "①", f"{'1' * 5000}.png", "a²b2.png"]
    write_tar(tmp_path / "a.tar", [name if name.endswith(".png") else f"{name}/1.png" for name in names])
    write_tar(tmp_path / "b.tar", ["1.png"])
    source = open_source(str(tmp_path))
    assert len(source) == len(names) + 1
    assert source.names_below(str(tmp_path))[:3] == ["a.tar/٣.png", "a.tar/9.png", "a.tar/10.png"]
    write_tar(tmp_path / "a.tar", ["²/1.png", "①/1.png", "x/1.png"])
    assert set(labels_of(tmp_path / "a.tar")) == {"²", "①", "x"}


@pytest.mark.parametrize("number", ["10000001", "1" * 5000])
def test_numbers_that_cannot_be_classes(tmp_path, number):
    write_tar(tmp_path / "a.tar", ["1.jpg"], ".cls", (number,))
    with pytest.raises(UserError, match=r"a\.tar/1\.cls is '1\d*'; expected the number of a class, at most 10,000,000"):
        open_source(str(tmp_path))
