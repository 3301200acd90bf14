"""Reading COCO files, well-formed and broken, and finding them."""

from pathlib import Path

import numpy as np
import pytest
from coco_files import (
    HEIGHT,
    WIDTH,
    annotation,
    box_run_lengths,
    coco_content,
    perfect_results,
    rectangle,
)
from PIL import Image
from pycocotools import mask as coco_mask

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError
from det.average_precision import coco_metrics
from det.coco import CocoDataset, locate_coco, open_coco
from det.config import CocoConfig, CocoFiles
from det.masks import bounding_box, to_rle


def test_labels_number_the_categories_by_id_and_boxes_are_clipped_to_the_image(make_dataset):
    dataset = make_dataset(coco_content(annotation(1, 0, 7, (5, 5, 8, 8)), annotation(2, 10, 2, (25, 15, 20, 20))))
    assert dataset.classes == ("two", "seven")
    assert [category.id for category in dataset.categories] == [2, 7]
    assert [obj["label"] for i in range(2) for obj in dataset.objects(i)] == [1, 0]
    assert dataset.objects(1)[0]["bbox"] == [25, 15, 5, 5]
    image, label = dataset.open_image(1)
    assert (image.width, image.height, label) == (WIDTH, HEIGHT, -1)
    assert image.objects == dataset.objects(1)


UNUSABLE = {
    "with an empty mask": [
        {"segmentation": []},
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}},
        {"segmentation": [[5, 5, 5, 5, 5, 5]], "area": 0},
    ],
    "with a box of zero size": [{"bbox": [5, 5, 0, 4]}, {"bbox": [5, 5, 4, -1]}],
    "with a box outside the image": [{"bbox": [WIDTH, 2, 4, 4]}, {"bbox": [-9, 2, 4, 4]}],
    "without a box of four numbers": [{"bbox": "1 2 3 4"}, {"bbox": [1, 2, float("nan"), 4]}, {"bbox": [1, 2, 3]}],
    "without a box and without a mask": [{"bbox": None, "segmentation": None}],
    "with coordinates from 0 to 1, as if in fractions of the image; expected pixels": [
        {"bbox": [0.25, 0.25, 0.5, 0.5]},
        {"segmentation": [[0.1, 0.1, 0.5, 0.1, 0.5, 0.9]]},
    ],
    "of categories that are not listed": [{"category_id": 3}],
    "of images that are not listed": [{"image_id": 5}, {"image_id": None}],
    "with a mask of another size than the image": [
        {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [300, 300]}},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [3, 4, 2]}},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "0220<"}},
    ],
    "with a mask that is neither polygons nor run lengths": [
        {"segmentation": "a mask"},
        {"segmentation": [[1, 2, 3, 4, 5, "6"]]},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [-5, 605]}},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "\u00ff\x01"}},
    ],
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_unusable_annotations_are_skipped_and_named(make_dataset, reason, caplog):
    unusable = [annotation(100 + i, 0, 7, (5, 5, 8, 8), **changes) for i, changes in enumerate(UNUSABLE[reason])]
    dataset = make_dataset(coco_content(annotation(1, 0, 7, (5, 5, 8, 8)), *unusable))
    assert dataset.skipped == {reason: [entry["id"] for entry in unusable]}
    assert len(dataset.objects(0)) == 1
    assert f"{len(unusable)} of {1 + len(unusable)} annotations skipped: {len(unusable)} {reason} (100" in caplog.text
    ground_truth = dataset.to_coco()
    # COCOeval adds the smallest number to its divisors
    assert coco_metrics(ground_truth, perfect_results(ground_truth))["box_AP"] == pytest.approx(1, abs=1e-9)


def test_all_three_mask_formats_give_the_same_mask(make_dataset):
    box = (4, 3, 9, 7)
    counts = box_run_lengths(*box)
    size = [HEIGHT, WIDTH]
    code = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)["counts"].decode()
    formats = [rectangle(*box), {"size": size, "counts": counts}, {"size": size, "counts": code}]
    entries = [annotation(i + 1, 0, 7, box, segmentation=segmentation) for i, segmentation in enumerate(formats)]
    dataset = make_dataset(coco_content(*entries))
    masks = [coco_mask.decode(to_rle(obj["segmentation"], *size)) for obj in dataset.objects(0)]
    assert len(masks) == 3
    assert all(bounding_box(mask) == (4, 3, 13, 10) and mask.sum() == 63 for mask in masks)


BROKEN_FILES = {
    "not JSON": "{'images': []",
    "holds a list (is it a file of detections?)": [],
    "has no list 'annotations'": {"images": [{}], "categories": [{}]},
    "list 'images' is empty": coco_content(images=0),
    "two of its images have the id 0": {**coco_content(), "images": [coco_content()["images"][0]] * 2},
    "two of its categories have the id 2": {**coco_content(), "categories": [{"id": 2, "name": "a"}] * 2},
    "lies outside the image folder": {
        **coco_content(),
        "images": [{"id": 1, "file_name": "../x.png", "height": 1, "width": 1}],
    },
    "has no height and width": {**coco_content(), "images": [{"id": 1, "file_name": "x.png"}]},
    "without file_name": {**coco_content(), "images": [{"id": 1}]},
    "whose id is not a whole number": {**coco_content(), "images": [{"id": "one", "file_name": "x.png"}]},
    "a category without an integer id": {**coco_content(), "categories": [{"name": "a"}]},
}


@pytest.mark.parametrize("message", BROKEN_FILES)
def test_a_file_that_is_not_cocos_is_refused_in_one_line(make_dataset, message):
    with pytest.raises(UserError) as caught:
        make_dataset(BROKEN_FILES[message])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "a.json" in str(caught.value)


def test_missing_images_are_named_and_tolerated_up_to_a_limit(make_dataset, caplog):
    content = coco_content(annotation(1, 0, 7, (5, 5, 8, 8)), images=6)
    with pytest.raises(UserError, match=r"4 of 6 image files are missing .*\(2.png, 3.png, 4.png and 1 more\), 1 tol"):
        make_dataset(content, max_errors=0.01)
    dataset = make_dataset(content, max_errors=4)
    assert dataset.missing == ["2.png", "3.png", "4.png", "5.png"]
    assert "4 of 6 image files are missing" in caplog.text
    with pytest.raises(ImageError, match="No such file"):
        dataset.open_image(2)


def test_an_image_whose_size_differs_from_the_annotations_raises_an_image_error(make_dataset, tmp_path):
    dataset = make_dataset(coco_content())
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    with pytest.raises(ImageError, match=r"9 x 9 pixels, but 30 x 20 in the annotations$"):
        dataset.open_image(1)


def test_swapped_sides_name_the_exif_orientation(make_dataset, tmp_path):
    dataset = make_dataset(coco_content())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "1.png", exif=exif)
    with pytest.raises(
        ImageError, match=r"20 x 30 pixels, but 30 x 20 in .*: were .* without the .*EXIF orientation\?"
    ):
        dataset.open_image(1)


def test_more_unreadable_images_than_tolerated_are_found_before_training(make_dataset, tmp_path):
    content = coco_content(annotation(1, 0, 7, (5, 5, 8, 8)))
    make_dataset(content).check_readable()
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"")
        make_dataset_again = CocoDataset(tmp_path / "a.json", tmp_path, max_errors=1)
        if i == 0:
            make_dataset_again.check_readable()
    message = (
        r"data.max_errors: at least 2 of 2 images of .*a.json are unreadable, 1 tolerated: .*0.png \(the file is em"
    )
    with pytest.raises(UserError, match=message):
        make_dataset_again.check_readable()


def test_all_images_are_decoded_completely(make_dataset, tmp_path):
    """One of many, with a header that is intact."""
    content = coco_content(annotation(1, 0, 7, (5, 5, 8, 8)), images=150)
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for i in range(150):
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    dataset = make_dataset(content)
    dataset.check_readable()
    encoded = (tmp_path / "149.png").read_bytes()
    (tmp_path / "149.png").write_bytes(encoded[: len(encoded) // 2])
    dataset.check_readable(samples=100)
    with pytest.raises(UserError, match=r"at least 1 of 150 images .*149\.png \(image file is truncated"):
        dataset.check_readable()


def test_images_of_which_most_are_unreadable_are_found_whatever_is_tolerated(make_dataset, tmp_path):
    """Of a large dataset, fewer images are looked at than may be unreadable."""
    content = coco_content(annotation(1, 0, 7, (5, 5, 8, 8)), images=6)
    for i in range(6):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"{i}.png")
    dataset = make_dataset(content, max_errors=5)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"")
        if i < 3:
            dataset.check_readable()
    dataset.max_errors = 3
    with pytest.raises(UserError, match=r"data\.max_errors: at least 4 of 6 .*, 3 tolerated"):
        dataset.check_readable()
    dataset.max_errors = 5
    dataset.check_readable()  # two thirds are tolerated as said
    dataset.max_errors = 1
    with pytest.raises(UserError, match=r"data\.max_errors: 1 of 1 images of .* that were looked at are unreadable"):
        dataset.check_readable(samples=1)
    for i in range(4, 6):
        (tmp_path / f"{i}.png").write_bytes(b"")
    dataset.max_errors = 100
    with pytest.raises(UserError, match=r"data\.max_errors: 6 of 6 images of .* that were looked at are unreadable"):
        dataset.check_readable()


def test_more_than_half_unreadable_where_few_are_tolerated(make_dataset, tmp_path):
    content = coco_content(annotation(1, 0, 7, (5, 5, 8, 8)), images=8)
    for i in range(8):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"{i}.png")
    dataset = make_dataset(content, max_errors=2)
    for name in ("0.png", "2.png"):
        (tmp_path / name).write_bytes(b"")
    dataset.check_readable()
    with pytest.raises(UserError, match=r"data\.max_errors: 2 of 3 images of .* that were looked at are unreadable"):
        dataset.check_readable(samples=3)


def test_images_without_objects_are_kept_or_dropped(make_dataset):
    crowd = annotation(2, 10, 7, (5, 5, 8, 8), iscrowd=1)
    assert len(make_dataset(coco_content(annotation(1, 0, 7, (5, 5, 8, 8)), crowd))) == 2
    assert make_dataset(coco_content(annotation(1, 0, 7, (5, 5, 8, 8)), crowd), keep_empty=False).ids == [0]
    with pytest.raises(UserError, match="no image has an object"):
        make_dataset(coco_content(crowd), keep_empty=False)


def test_files_are_found_under_the_root_or_by_their_own_keys(make_dataset, tmp_path):
    make_dataset(coco_content(annotation(1, 0, 7, (5, 5, 8, 8))))
    for annotations, images in (("instances_val2017.json", "val2017"), ("instances_val.json", "images")):
        root = tmp_path / images
        (root / "annotations").mkdir(parents=True)
        (root / images).mkdir()
        for i in range(2):
            (root / images / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
        (root / "annotations" / annotations).write_bytes((tmp_path / "a.json").read_bytes())
        assert len(open_coco(CocoFiles(root=str(root)), "val")) == 2
    files = CocoFiles(val_annotations=str(tmp_path / "a.json"), val_images=str(tmp_path))
    assert len(open_coco(files, "val")) == 2
    for config, message in (
        (CocoFiles(), "data.root: missing"),
        (CocoFiles(root=str(tmp_path / "imagess")), "is not a folder; did you mean 'images'"),
        (CocoFiles(root=str(tmp_path)), "has none of annotations/instances_val2017.json"),
        (CocoFiles(val_annotations=str(tmp_path / "b.json")), "does not exist; did you mean 'a.json'"),
        (CocoFiles(val_annotations=str(tmp_path / "a.json"), val_images=str(tmp_path / "0.png")), "is not a folder"),
    ):
        with pytest.raises(UserError, match="data\\.") as caught:
            open_coco(config, "val")
        assert message in str(caught.value)


def test_addresses_are_refused():
    for key in ("root", "train_annotations"):
        with pytest.raises(UserError, match=rf"data\.{key}: https://host/x is an address; expected a path"):
            locate_coco(CocoFiles(**{key: "https://host/x"}), "train")


def test_a_broken_file_under_the_root_is_named(tmp_path: Path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"instances_train.json: not JSON"):
        open_coco(CocoFiles(root=str(tmp_path)), "train")


def test_an_impossible_scale_range_is_refused():
    with pytest.raises(ValueError, match=r"scale: \[2.0, 1.0\], expected 0 < low <= high"):
        CocoConfig(scale=(2.0, 1.0))
