"""What is read from annotations that are written differently from COCO's, and what is said about it."""

import pytest
from coco_files import HEIGHT, WIDTH, annotation, box_run_lengths, coco_content, rectangle

from addp_core.base.errors import UserError
from det.coco import CocoDataset, open_coco
from det.config import CocoFiles

BOX = (5, 4, 8, 6)
CORNERS = [[5, 4], [13, 4], [13, 10], [5, 10]]


def all_objects(dataset: CocoDataset) -> list[dict]:
    return [obj for index in range(len(dataset)) for obj in dataset.objects(index)]


def open_split(dataset: CocoDataset, masks: bool | str = "auto") -> CocoDataset:
    """Open the files of a dataset as a verb does."""
    files = CocoFiles(val_annotations=str(dataset.path), val_images=str(dataset.folder))
    return open_coco(files, "val", masks=masks)


READ_DIFFERENTLY = {
    "whose polygon is one flat list of numbers": {"segmentation": rectangle(*BOX)[0]},
    "whose polygons are lists of points": {"segmentation": [CORNERS]},
    "whose polygon is a list of points": {"segmentation": CORNERS},
    "without a box, which was taken from the mask": {"bbox": None},
    "with image_id as text": {"image_id": "0"},
    "with category_id as a decimal number": {"category_id": 7.0},
    "whose polygons of fewer than three corners": {"segmentation": [*rectangle(*BOX), [1, 1, 2, 2]]},
}


@pytest.mark.parametrize("message", READ_DIFFERENTLY)
def test_other_notations_of_one_meaning_are_read_and_counted(make_dataset, caplog, message):
    usual = all_objects(make_dataset(coco_content(annotation(4, 0, 7, BOX))))
    assert "read annotations" not in caplog.text
    other = all_objects(make_dataset(coco_content(annotation(4, 0, 7, BOX, **READ_DIFFERENTLY[message]))))
    assert other == usual
    assert f"read annotations 1 {message}" in caplog.text
    assert "(4)" in caplog.text


def test_a_missing_box_is_taken_from_run_lengths(make_dataset):
    segmentation = {"size": [HEIGHT, WIDTH], "counts": box_run_lengths(*BOX)}
    (obj,) = all_objects(make_dataset(coco_content(annotation(1, 0, 7, BOX, bbox=None, segmentation=segmentation))))
    assert obj["bbox"] == list(BOX)


@pytest.mark.parametrize("convert", [str, float])
def test_ids_of_images_and_categories_may_be_text_or_decimal_numbers(make_dataset, caplog, convert):
    content = coco_content(annotation(1, 10, 7, BOX))
    for entry in (*content["images"], *content["categories"]):
        entry["id"] = convert(entry["id"])
    dataset = make_dataset(content)
    assert dataset.ids == [0, 10]
    assert [category.id for category in dataset.categories] == [2, 7]
    assert len(dataset.objects(1)) == 1
    assert "ids of images or categories were read as whole numbers" in caplog.text


@pytest.mark.parametrize(("value", "crowd"), [("0", 0), ("false", 0), ("", 0), (None, 0), ("1", 1), (True, 1)])
def test_iscrowd_as_text_means_what_it_says(make_dataset, value, crowd):
    segmentation = {"size": [HEIGHT, WIDTH], "counts": box_run_lengths(*BOX)}
    (obj,) = all_objects(
        make_dataset(coco_content(annotation(1, 0, 7, BOX, iscrowd=value, segmentation=segmentation)), masks=True)
    )
    assert obj["iscrowd"] == crowd


NO_OBJECT = {
    "22 crowds (iscrowd=1), which are not trained on": {"iscrowd": 1},
    "22 with coordinates from 0 to 1, as if in fractions": {"bbox": [0.1, 0.2, 0.3, 0.4]},
    "22 without a box and without a mask (0, 1, 2 and 19 more)": {"bbox": None, "segmentation": None, "keypoints": []},
    "22 with a mask of another size than the image": {"segmentation": {"size": [3, 3], "counts": [4, 5]}},
    "22 with a box outside the image": {"bbox": [50, 50, 4, 4]},
}


@pytest.mark.parametrize("reason", NO_OBJECT)
def test_a_split_without_a_usable_object_is_refused_with_the_reason(make_dataset, reason):
    entries = [annotation(i, 0, 7, BOX, **NO_OBJECT[reason]) for i in range(22)]
    dataset = make_dataset(coco_content(*entries))
    with pytest.raises(UserError, match="no image has an object: of 22 annotations, ") as caught:
        open_split(dataset)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_list_of_annotations_is_refused(make_dataset):
    with pytest.raises(UserError, match="no image has an object: its list 'annotations' is empty"):
        open_split(make_dataset(coco_content()))


@pytest.mark.parametrize("segmentation", [None, [], [[]], [[1, 2, 3, 4]], ""])
def test_a_file_without_masks_is_read_as_boxes_alone_unless_masks_are_needed(make_dataset, caplog, segmentation):
    entry = annotation(1, 0, 7, BOX, segmentation=segmentation, area=None)
    dataset = make_dataset(coco_content(entry))
    assert not dataset.masks
    assert "boxes alone" in caplog.text or not caplog.text  # an INFO line, which the level may hide
    assert all_objects(dataset) == [{"label": 1, "bbox": [5, 4, 8, 6], "segmentation": None, "area": 48, "iscrowd": 0}]
    assert "segmentation" not in dataset.to_coco()["annotations"][0]
    with pytest.raises(UserError, match=r"1 with an empty mask \(1\); .*; detector.masks=false trains on boxes alone"):
        open_split(dataset, masks=True)


def test_masks_of_some_objects_are_enough_for_masks_and_what_is_lost_is_said(make_dataset, caplog):
    boxes = [annotation(i, 0, 7, BOX, segmentation=[]) for i in range(2, 5)]
    dataset = make_dataset(coco_content(annotation(1, 0, 7, BOX), *boxes))
    assert dataset.masks
    assert len(all_objects(dataset)) == 1
    assert "most annotations are lost: 3 of 4 annotations skipped: 3 with an empty mask (2, 3, 4)" in caplog.text
    assert "detector.masks=false trains on boxes alone" in caplog.text
    without_masks = make_dataset(coco_content(annotation(1, 0, 7, BOX), *boxes), masks=False)
    assert len(all_objects(without_masks)) == 4


def test_boxes_that_are_corners_are_pointed_out(make_dataset, caplog):
    corners = [12, 8, 22, 18]  # of x, y, width, height = 12, 8, 10, 10
    make_dataset(coco_content(annotation(1, 0, 7, (12, 8, 10, 10), bbox=corners)))
    assert "probably wrong: 1 with a box that fits its mask only as [left, top, right, bottom]" in caplog.text
    caplog.clear()
    make_dataset(coco_content(annotation(1, 0, 7, (12, 8, 10, 10), bbox=[0, 0, 5, 5])))
    assert "probably wrong: 1 with a box that does not fit its mask (1)" in caplog.text
    caplog.clear()
    make_dataset(coco_content(annotation(1, 0, 7, (12, 8, 10, 10), bbox=corners, segmentation=[])))
    assert "with a box that reaches past its image, but not if read as [left, top, right, bottom]" in caplog.text
    caplog.clear()
    make_dataset(coco_content(annotation(1, 0, 7, (12, 8, 10, 10))))
    make_dataset(coco_content(annotation(1, 0, 7, (12, 8, 10, 10), segmentation=[])))
    assert "probably wrong" not in caplog.text


def test_most_objects_being_crowds_is_said(make_dataset, caplog):
    segmentation = {"size": [HEIGHT, WIDTH], "counts": box_run_lengths(*BOX)}
    crowds = [annotation(i, 0, 7, BOX, iscrowd="1", segmentation=segmentation) for i in (2, 3)]
    make_dataset(coco_content(annotation(1, 0, 7, BOX), *crowds))
    assert "2 of 3 objects are crowds (iscrowd=1), which are not trained on" in caplog.text
