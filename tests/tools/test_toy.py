"""`addp toy`: the datasets have the real formats, are the same for the same seed, and are complete or absent."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from addp_core.base.errors import UserError
from addp_core.data.corruptions import CORRUPTIONS
from addp_core.data.sources import open_source
from addp_core.recipes.cli import main
from tools.toy import classification, toy
from tools.toy.coco import polygons
from tools.toy.digits import DigitScans

SMALL = {
    "size": 32,
    "scene": 64,
    "imagenet_train": 40,
    "imagenet_val": 20,
    "coco_train": 24,
    "coco_val": 20,
    "ade_train": 12,
    "ade_val": 6,
    "variants": 12,
    "corrupted": 2,
}
NAMES = ["imagenet", "coco", "ade20k", "imagenet-a", "imagenet-r", "sketch", "imagenet-c"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    toy.run(toy.Recipe(out=str(out), **SMALL))
    return out


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_every_dataset_and_its_contact_sheet_and_nothing_else(made):
    assert sorted(path.name for path in made.iterdir()) == sorted([*NAMES, "contact"])
    assert sorted(path.name for path in (made / "contact").iterdir()) == sorted(f"{name}.png" for name in NAMES)
    for name in NAMES:
        sheet = Image.open(made / "contact" / f"{name}.png")
        assert min(sheet.size) > 60
        assert np.asarray(sheet.convert("L")).std() > 10


def test_the_seed_decides_every_byte(made, tmp_path):
    toy.run(toy.Recipe(out=str(tmp_path / "a"), only=["coco", "imagenet-c"], **SMALL))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["coco", "contact", "imagenet-c"]
    for name in ("coco", "imagenet-c"):  # a dataset does not depend on the others
        assert files(tmp_path / "a" / name) == files(made / name)
    toy.run(toy.Recipe(out=str(tmp_path / "b"), only=["sketch"], seed=1, **SMALL))
    ours, theirs = files(tmp_path / "b" / "sketch"), files(made / "sketch")
    assert ours.keys() == theirs.keys()
    assert sum(ours[name] == theirs[name] for name in ours) == 0


def test_a_second_run_writes_nothing(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    toy.run(toy.Recipe(out=str(made), **SMALL))
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_other_settings_are_refused_only_for_the_datasets_they_change(made):
    toy.run(toy.Recipe(out=str(made), only=["coco"], **{**SMALL, "variants": 99}))
    with pytest.raises(UserError, match=r"variants: 99, but .*sketch was made with variants=12"):
        toy.run(toy.Recipe(out=str(made), only=["sketch"], **{**SMALL, "variants": 99}))
    with pytest.raises(UserError, match="seed: 3"):
        toy.run(toy.Recipe(out=str(made), seed=3, **SMALL))


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="was not made by addp toy"):
        toy.run(toy.Recipe(out=str(tmp_path), only=["coco"], **SMALL))
    assert files(tmp_path) == {"coco/mine.txt": b"keep"}


def test_a_dataset_is_complete_or_absent(tmp_path, monkeypatch):
    recipe = toy.Recipe(out=str(tmp_path), only=["sketch"], **SMALL)
    save, saved = classification.save_image, []

    def fail_at_the_fifth(image, path, *options):
        saved.append(path)
        if len(saved) == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(image, path, *options)

    monkeypatch.setattr(classification, "save_image", fail_at_the_fifth)
    with pytest.raises(UserError, match=r"out: .*sketch.* cannot be written: No space left on device"):
        toy.run(recipe)
    assert not (tmp_path / "sketch").exists()
    toy.run(recipe)
    assert len(list((tmp_path / "sketch").rglob("*.JPEG"))) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contact", "sketch"]


def test_out_cannot_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        toy.run(toy.Recipe(out=str(tmp_path / "file" / "below"), only=["sketch"], **SMALL))


def test_the_command(tmp_path, capsys):
    settings = [f"{key}={value}" for key, value in SMALL.items()]
    assert main(["toy", f"out={tmp_path}", "only=[imagenet-a]", *settings]) == 0
    assert (tmp_path / "imagenet-a").is_dir()
    assert main(["toy", f"out={tmp_path}", "only=[imagenette]"]) == 2
    assert "imagenet-a" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- content


def test_imagenet_folders_are_read_by_open_source(made):
    digits = tuple("0123456789")
    for split, count in (("train", 40), ("val", 20)):
        source = open_source(str(made / "imagenet"), split)
        assert (len(source), source.classes) == (count, digits)
        image, label = source.read(0)
        assert (image.size, label) == ((32, 32), 0)
        assert np.bincount([source.read(i)[1] for i in range(count)]).tolist() == [count // 10] * 10


def test_no_scan_is_used_for_training_and_validation():
    scans = DigitScans()
    pools = {split: np.concatenate([scans.pool(split, digit) for digit in range(10)]) for split in ("train", "val")}
    assert len(pools["train"]) + len(pools["val"]) == 1797
    assert 0.79 < len(pools["train"]) / 1797 < 0.81
    seen = {scan.tobytes() for scan in pools["train"]}
    assert not any(scan.tobytes() in seen for scan in pools["val"])


def test_variants_have_a_subset_of_the_classes_as_the_real_ones(made):
    for name, classes in (("imagenet-a", "023578"), ("imagenet-r", "013469"), ("sketch", "0123456789")):
        source = open_source(str(made / name))
        assert source.classes == tuple(classes)
        assert len(source) == 12


def test_imagenet_c_has_the_same_images_75_times(made):
    assert sorted(path.name for path in (made / "imagenet-c").iterdir() if path.is_dir()) == sorted(CORRUPTIONS)
    assert len(CORRUPTIONS) == 15
    for name in CORRUPTIONS:
        for severity in "12345":
            source = open_source(str(made / "imagenet-c" / name / severity))
            assert [Path(source.name(i)).name for i in range(len(source))] == ["val_000000.JPEG", "val_000001.JPEG"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_file_is_consistent(made, split):
    content = json.loads((made / "coco" / "annotations" / f"instances_{split}2017.json").read_text())
    assert [category["id"] for category in content["categories"]] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert [category["name"] for category in content["categories"]] == list("0123456789")
    sizes = {}
    for image in content["images"]:
        sizes[image["id"]] = (image["width"], image["height"])
        assert Image.open(made / "coco" / f"{split}2017" / image["file_name"]).size == sizes[image["id"]]
    kinds = {"polygon": 0, "coded": 0, "crowd": 0}
    for thing in content["annotations"]:
        width, height = sizes[thing["image_id"]]
        x, y, w, h = thing["bbox"]
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        mask = thing["segmentation"]
        if isinstance(mask, dict):
            kinds["crowd" if thing["iscrowd"] else "coded"] += 1
            assert mask["size"] == [height, width]
            assert sum(mask["counts"]) == height * width
            assert sum(mask["counts"][1::2]) == thing["area"]
            flat = np.repeat(np.arange(len(mask["counts"])) % 2, mask["counts"]).reshape(width, height).T
            rows, columns = np.nonzero(flat)
            assert [x, y, x + w, y + h] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        else:
            kinds["polygon"] += 1
            points = [np.array(polygon).reshape(-1, 2) for polygon in mask]
            assert all(len(polygon) >= 4 for polygon in points)
            area = sum(abs(np.sum(p[:, 0] * np.roll(p[:, 1], -1) - p[:, 1] * np.roll(p[:, 0], -1))) / 2 for p in points)
            assert area == thing["area"]
            every = np.concatenate(points)
            assert [*every.min(0), *every.max(0)] == [x, y, x + w, y + h]
    assert all(kinds.values()), kinds
    assert {image["id"] for image in content["images"]} - {thing["image_id"] for thing in content["annotations"]}


def test_coco_can_have_the_categories_of_coco(tmp_path):
    keys = ["only=[coco]", "coco_train=2", "coco_val=2", "scene=48"]
    for name, more in (("digits", []), ("coco", ["coco_names=true"])):
        assert main(["toy", f"out={tmp_path / name}", *keys, *more]) == 0
    digits, coco = (
        json.loads((tmp_path / name / "coco" / "annotations" / "instances_train2017.json").read_text())
        for name in ("digits", "coco")
    )
    assert digits["annotations"] == coco["annotations"]
    assert len(coco["categories"]) == 80
    assert {entry["id"]: entry["name"] for entry in coco["categories"]} | {1: "person", 90: "toothbrush"} == {
        entry["id"]: entry["name"] for entry in coco["categories"]
    }
    made_before = tmp_path / "digits" / "coco" / "toy.json"  # by a version without the key
    made_before.write_text(
        json.dumps({k: v for k, v in json.loads(made_before.read_text()).items() if "name" not in k})
    )
    assert main(["toy", f"out={tmp_path / 'digits'}", *keys]) == 0
    assert main(["toy", f"out={tmp_path / 'digits'}", *keys, "coco_names=true"]) == 2


def test_coco_ids_are_never_used_twice(made):
    for key in ("images", "annotations"):
        ids = [
            entry["id"]
            for split in ("train", "val")
            for entry in json.loads((made / "coco" / "annotations" / f"instances_{split}2017.json").read_text())[key]
        ]
        assert len(set(ids)) == len(ids)


def test_coco_file_in_pycocotools(made):
    coco = pytest.importorskip("pycocotools.coco")
    mask_of = pytest.importorskip("pycocotools.mask")
    loaded = coco.COCO(made / "coco" / "annotations" / "instances_val2017.json")
    for thing in loaded.loadAnns(loaded.getAnnIds()):
        mask = loaded.annToMask(thing)
        assert mask.sum() == pytest.approx(thing["area"], rel=0.12, abs=6)
        box = mask_of.toBbox(loaded.annToRLE(thing))
        assert np.abs(box - thing["bbox"]).max() <= 1


@pytest.mark.parametrize(
    "rows",
    [
        ["#"],
        ["##.", "#..", "###"],
        [".#.", "###", ".#."],
        ["#.#", "..."],
        ["##..", "#.##", ".###"],
        [".....", ".###.", ".#.#.", "##.##"],
    ],
)
def test_polygons_cover_exactly_the_mask(rows):
    mask = np.array([[sign == "#" for sign in row] for row in rows])
    covered = np.zeros(mask.shape, dtype=int)
    for polygon in polygons(mask):
        corners = np.array(polygon).reshape(-1, 2)
        for row, column in np.ndindex(*mask.shape):  # crossings of a ray to the right of the pixel's centre
            x, y = column + 0.5, row + 0.5
            ends = zip(corners, np.roll(corners, -1, axis=0), strict=True)
            covered[row, column] += sum(min(a[1], b[1]) < y < max(a[1], b[1]) and a[0] > x for a, b in ends) % 2
    assert (covered == mask).all()


def test_ade20k_layout(made):
    root = made / "ade20k"
    table = [line.split("\t") for line in (root / "objectInfo.txt").read_text().splitlines()]
    assert table[0] == ["Idx", "Name"]
    assert [name for _, name in table[1:]] == [*"0123456789", "sky", "grass", "sand"]
    seen = set()
    for split, count in (("training", 12), ("validation", 6)):
        images = sorted((root / "images" / split).glob("*.jpg"))
        maps = sorted((root / "annotations" / split).glob("*.png"))
        assert [path.stem for path in images] == [path.stem for path in maps]
        assert len(images) == count
        for image, labels in zip(images, maps, strict=True):
            labels = Image.open(labels)
            assert labels.mode == "L"
            assert labels.size == Image.open(image).size
            values = set(np.unique(labels).tolist())
            assert 0 in values
            assert values & {11, 12, 13}
            assert values & set(range(1, 11))
            seen |= values
    assert seen <= set(range(14))
    assert len(seen) >= 12
