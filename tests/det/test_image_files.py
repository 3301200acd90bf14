"""Finding image files whose file_name is no path below the image folder."""

import pytest
from coco_files import annotation, coco_content

from addp_core.base.errors import UserError
from det.image_files import find_image_files

FOUND = {
    "0.png": "0.png",
    "./0.png": "./0.png",
    "images\\0.png": "0.png",
    "C:\\photos\\sub\\1.png": "sub/1.png",
    "http://images.cocodataset.org/train2017/0.png": "0.png",
    "https://host/a%20b.png?size=3": "a b.png",
    "folder/sub/1.png": "sub/1.png",
    "/home/somebody/0.png": "0.png",
    "../sub/1.png": "sub/1.png",
    "sub/0.png": "0.png",
    "../nowhere.png": None,
    "": None,
}


@pytest.mark.parametrize("name", FOUND)
def test_a_file_is_found_by_the_last_parts_of_its_name(tmp_path, name):
    (tmp_path / "sub").mkdir()
    for file in ("0.png", "sub/1.png", "a b.png"):
        (tmp_path / file).write_bytes(b"")
    (tmp_path.parent / "nowhere.png").write_bytes(b"")  # outside the folder
    assert find_image_files(tmp_path, [name]) == [FOUND[name]]


def test_two_names_that_end_alike_are_not_one_image(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    assert find_image_files(tmp_path, ["a/0.png", "b/0.png"]) == [None, None]
    assert find_image_files(tmp_path, ["0.png", "b/0.png"]) == ["0.png", None]


def test_it_is_said_once_that_images_were_found_by_their_last_part(make_dataset, caplog):
    content = coco_content(annotation(1, 0, 7, (5, 5, 8, 8)))
    for entry in content["images"]:
        entry["file_name"] = f"train2017\\{entry['file_name']}"
    dataset = make_dataset(content)
    assert dataset.open_image(0)[0].objects
    assert caplog.text.count("by the last part of their file_name (train2017\\0.png as 0.png") == 1
    content["images"][0]["file_name"] = "/somewhere/else.png"
    with pytest.raises(UserError, match=r"lies outside the image folder \('/somewhere/else.png'\)"):
        make_dataset(content)
