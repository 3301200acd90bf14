"""Finding pairs of images and class maps, reading class maps, and what can be learned from them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_segmentation import CLASSES

from addp_core.base.errors import UserError
from seg.scenes import check_numbering, check_pairs, find_pairs, read_class_map, read_class_names

NAMES = tuple(f"thing {i}" for i in range(1, CLASSES + 1))


def test_a_class_map_must_have_the_size_of_its_image(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "map.png")
    with pytest.raises(UserError, match=r"found 4 x 4 pixels, expected its image's 5 x 4$"):
        read_class_map(tmp_path / "map.png", (4, 5), CLASSES)


def test_swapped_sides_name_the_orientation(tmp_path):
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "map.png")
    with pytest.raises(UserError, match="expected its image's 4 x 6; an EXIF orientation turns the image"):
        read_class_map(tmp_path / "map.png", (6, 4), CLASSES)


def test_labels_0_and_255_are_other(tmp_path):
    Image.fromarray(np.array([[0, 255, 1, CLASSES]], np.uint8)).save(tmp_path / "map.png")
    assert read_class_map(tmp_path / "map.png", None, CLASSES).tolist() == [[255, 255, 0, CLASSES - 1]]


# -------------------- which files are pairs


def make_scenes(root: Path, images: list[str], maps: list[str], labels: tuple[int, ...] = (1, CLASSES)) -> None:
    """Write images, and class maps with these labels, into the split `train`."""
    for folder, names in (("images", images), ("annotations", maps)):
        for name in names:
            path = root / folder / "training" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            values = np.resize(np.array(labels, np.uint8), (8, 8))
            picture = Image.fromarray(values) if folder == "annotations" else Image.new("RGB", (8, 8))
            encoded = io.BytesIO()
            picture.save(
                encoded, {".jpg": "JPEG"}.get(path.suffix.lower(), path.suffix[1:].upper().replace("TIF", "TIFF"))
            )
            path.write_bytes(encoded.getvalue())


def test_images_of_all_formats_are_found(tmp_path):
    images = ["a.jpg", "b.BMP", "c.webp", "d.tif", "nested/e.png"]
    make_scenes(tmp_path, images, ["a.png", "b.png", "c.PNG", "d.png", "nested/e.png"])
    pairs = find_pairs(tmp_path, "train")
    assert [str(pair.image.relative_to(tmp_path / "images/training")) for pair in pairs] == images
    assert [pair.class_map.name for pair in pairs] == ["a.png", "b.png", "c.PNG", "d.png", "e.png"]


def test_files_of_the_system_are_passed_over_and_counted(tmp_path, caplog):
    make_scenes(tmp_path, ["a.jpg", "@eaDir/a.jpg", "__MACOSX/a.jpg", ".trash/a.jpg"], ["a.png", "__MACOSX/a.png"])
    folder = tmp_path / "images" / "training"
    (folder / "._a.jpg").write_bytes(b"metadata of macOS")
    (folder / "b.jpg").symlink_to("nowhere.jpg")
    (folder / "notes.txt").write_text("not an image")
    caplog.set_level("INFO", "addp")
    assert [pair.image.name for pair in find_pairs(tmp_path, "train", log_dropped=True)] == ["a.jpg"]
    about_images, about_maps = (record.getMessage() for record in caplog.records)
    for count in ("2 hidden", "1 in @eaDir/", "1 in __MACOSX/", "1 dangling link", "1 .txt"):
        assert count in about_images
    assert about_maps == f"data: {tmp_path}/annotations/training: passed over: 1 in __MACOSX/"


def test_unpaired_images_and_class_maps_are_named(tmp_path, caplog):
    make_scenes(tmp_path, ["a.jpg", "b.jpg", "b.png"], ["a.png", "b.png", "c.png", "d.png"])
    find_pairs(tmp_path, "train", log_dropped=True)
    unused, shared = (record.getMessage() for record in caplog.records)
    assert unused.startswith("data: 2 class maps have no image and are not used: ")
    assert all(f"annotations/training/{name}.png" in unused for name in "cd")
    assert "1 class maps belong to several images" in shared
    (tmp_path / "annotations" / "training" / "a.png").rename(tmp_path / "annotations" / "training" / "a.bmp")
    with pytest.raises(UserError, match=r"training/a\.png is missing \(found a\.bmp, which is no \.png\)"):
        find_pairs(tmp_path, "train")


# -------------------- what can be learned


def test_further_class_maps_are_read_until_two_classes_are_found(tmp_path):
    make_scenes(tmp_path, ["a.jpg", "c.jpg"], ["a.png", "c.png"], (3,))
    make_scenes(tmp_path, ["b.jpg"], ["b.png"], (0, 5))
    pairs = find_pairs(tmp_path, "train")
    assert check_pairs(pairs, NAMES, limit=0, min_classes=2) == {0, 3, 5}
    with pytest.raises(UserError, match=r"hold no label but 3, and .* expected two classes"):
        check_pairs([pairs[0], pairs[2]], NAMES, limit=0, min_classes=2)
    assert check_pairs(pairs, NAMES, limit=0) == {3}


def test_a_class_table_has_each_number_once(tmp_path):
    (tmp_path / "objectInfo.txt").write_text("Idx\tName\n1\twall\n2\tsky, heaven\n2\ttree\n")
    with pytest.raises(UserError, match=r"objectInfo\.txt: found Idx 2 2 times \('sky', 'tree'\), expected each"):
        read_class_names(tmp_path)


def test_addresses_are_refused():
    with pytest.raises(UserError, match=r"data\.source: https://host/x is an address; expected a path"):
        find_pairs("https://host/x", "train")


def test_labels_numbered_from_0_are_pointed_out(caplog):
    check_numbering({0, 1, CLASSES}, NAMES)
    check_numbering({0, 255, CLASSES}, NAMES)
    assert not caplog.records
    check_numbering({0, 1, CLASSES - 1}, NAMES)
    check_numbering({1, CLASSES - 1, 255}, NAMES)
    assert caplog.text.count("has the last label, 13 (thing 13): if your labels begin at 0") == 2
    with pytest.raises(UserError, match=r"hold 0 and 255 but never 13 \(thing 13\)"):
        check_numbering({0, 1, CLASSES - 1, 255}, NAMES)
