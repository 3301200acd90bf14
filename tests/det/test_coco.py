"""COCO files as people have them, whole and broken; average precision against cases worked out by hand; large-scale
jitter and the boxes it draws anew."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError
from det.augment import ScaleJitter, collate, extent
from det.coco import CocoSet, ScenePicture, encode, evaluate, open_coco
from det.config import CocoConfig, CocoFiles

HEIGHT, WIDTH = 20, 30
ONE = pytest.approx(1, abs=1e-9)  # COCOeval adds the smallest number to its divisors


def rectangle(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def thing(number: int, image: int, category: int, box: tuple, **changes) -> dict:
    whole = {"id": number, "image_id": image, "category_id": category, "bbox": list(map(float, box)), "iscrowd": 0}
    return whole | {"area": float(box[2] * box[3]), "segmentation": rectangle(*map(float, box))} | changes


def run_lengths(x: int, y: int, w: int, h: int) -> list[int]:
    """Of a rectangle in the image, down the columns."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=int)
    mask[y : y + h, x : x + w] = 1
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *edges, flat.size]).tolist()


def content(*annotations: dict, images: int = 2) -> dict:
    named = [{"id": 10 * i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(images)]
    categories = [{"id": 7, "name": "seven"}, {"id": 2, "name": "two"}]  # unsorted, with gaps
    return {"images": named, "annotations": list(annotations), "categories": categories}


@pytest.fixture
def write(tmp_path):
    """content -> the set at tmp_path, whose images are there; keywords go to CocoSet."""

    def write(what, **options) -> CocoSet:
        for i in range(2):
            Image.new("RGB", (WIDTH, HEIGHT), (i, 100, 200)).save(tmp_path / f"{i}.png")
        path = tmp_path / "a.json"
        path.write_text(what if isinstance(what, str) else json.dumps(what))
        return CocoSet(path, tmp_path, **options)

    return write


def as_results(truth: dict, score=lambda i: 1.0) -> list[dict]:
    """The truth as a detector would report it, crowds left out."""
    found = []
    for i, annotation in enumerate(truth["annotations"]):
        code = encode(annotation["segmentation"], HEIGHT, WIDTH)
        code = {"size": code["size"], "counts": code["counts"].decode()}
        same = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        if not annotation["iscrowd"]:
            found.append({**same, "segmentation": code, "score": score(i)})
    return found


# -------------------- reading


def test_labels_count_the_categories_by_id_and_objects_keep_to_the_image(write):
    coco = write(content(thing(1, 0, 7, (5, 5, 8, 8)), thing(2, 10, 2, (25, 15, 20, 20))))
    assert coco.classes == ("two", "seven")
    assert [category.id for category in coco.categories] == [2, 7]
    assert [o["label"] for i in range(2) for o in coco.objects(i)] == [1, 0]
    assert coco.objects(1)[0]["bbox"] == [25, 15, 5, 5]
    picture, label = coco.open_image(1)
    assert (picture.width, picture.height, label) == (WIDTH, HEIGHT, -1)
    assert picture.objects == coco.objects(1)


BROKEN = {
    "with an empty mask": [
        {"segmentation": []},
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}},
        {"segmentation": [[5, 5, 5, 5, 5, 5]], "area": 0},
    ],
    "with a box of zero size": [{"bbox": [5, 5, 0, 4]}, {"bbox": [5, 5, 4, -1]}],
    "with a box outside the image": [{"bbox": [WIDTH, 2, 4, 4]}, {"bbox": [-9, 2, 4, 4]}],
    "without a box of four numbers": [{"bbox": None}, {"bbox": [1, 2, float("nan"), 4]}, {"bbox": [1, 2, 3]}],
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


@pytest.mark.parametrize("why", BROKEN)
def test_annotations_that_cannot_be_used_are_left_out_and_named(write, why, caplog):
    bad = [thing(100 + i, 0, 7, (5, 5, 8, 8), **changes) for i, changes in enumerate(BROKEN[why])]
    coco = write(content(thing(1, 0, 7, (5, 5, 8, 8)), *bad))
    assert coco.left_out == {why: [annotation["id"] for annotation in bad]}
    assert len(coco.objects(0)) == 1
    assert f"{len(bad)} of {1 + len(bad)} annotations left out: {len(bad)} {why} (100" in caplog.text
    truth = coco.dataset()
    assert evaluate(truth, as_results(truth))["box_AP"] == ONE


def test_all_three_kinds_of_masks_mean_the_same(write):
    box = (4, 3, 9, 7)
    counts = run_lengths(*box)
    size = [HEIGHT, WIDTH]
    compressed = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)["counts"].decode()
    kinds = [rectangle(*box), {"size": size, "counts": counts}, {"size": size, "counts": compressed}]
    coco = write(content(*(thing(i + 1, 0, 7, box, segmentation=kind) for i, kind in enumerate(kinds))))
    masks = [coco_mask.decode(encode(o["segmentation"], *size)) for o in coco.objects(0)]
    assert len(masks) == 3
    assert all(extent(mask) == (4, 3, 13, 10) and mask.sum() == 63 for mask in masks)


FILES = {
    "not JSON": "{'images': []",
    "holds a list (detections are such a list": [],
    "has no list 'annotations'": {"images": [{}], "categories": [{}]},
    "list 'images' is empty": content(images=0),
    "two of its images have the id 0": {**content(), "images": [content()["images"][0]] * 2},
    "two of its categories have the id 2": {**content(), "categories": [{"id": 2, "name": "a"}] * 2},
    "lies outside its folder": {**content(), "images": [{"id": 1, "file_name": "../x.png", "height": 1, "width": 1}]},
    "has no height and width": {**content(), "images": [{"id": 1, "file_name": "x.png"}]},
    "without id or file_name": {**content(), "images": [{"id": "1", "file_name": "x.png"}]},
    "a category without a whole number as id": {**content(), "categories": [{"name": "a"}]},
}


@pytest.mark.parametrize("message", FILES)
def test_a_file_that_is_not_cocos_is_refused_in_one_line(write, message):
    with pytest.raises(UserError) as caught:
        write(FILES[message])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "a.json" in str(caught.value)


def test_missing_images_are_named_and_counted_up_to_a_limit(write, tmp_path, caplog):
    many = content(thing(1, 0, 7, (5, 5, 8, 8)), images=6)
    with pytest.raises(UserError, match=r"4 of 6 image files are missing .*\(2.png, 3.png, 4.png and 1 more\), 1 tol"):
        write(many, max_errors=0.01)
    coco = write(many, max_errors=4)
    assert coco.missing == ["2.png", "3.png", "4.png", "5.png"]
    assert "4 of 6 image files are missing" in caplog.text
    with pytest.raises(ImageError, match="No such file"):
        coco.open_image(2)


def test_an_image_of_another_size_than_listed_is_an_error_of_that_image(write, tmp_path):
    coco = write(content())
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    with pytest.raises(ImageError, match="9 x 9 pixels, but 30 x 20 in the annotations"):
        coco.open_image(1)


def test_images_without_objects_stay_or_go(write):
    crowd = thing(2, 10, 7, (5, 5, 8, 8), iscrowd=1)
    assert len(write(content(thing(1, 0, 7, (5, 5, 8, 8)), crowd))) == 2
    assert write(content(thing(1, 0, 7, (5, 5, 8, 8)), crowd), empty=False).ids == [0]
    with pytest.raises(UserError, match="no image has an object"):
        write(content(crowd), empty=False)


def test_files_are_found_under_the_root_or_where_they_are_named(write, tmp_path):
    write(content())
    for names in (("instances_val2017.json", "val2017"), ("instances_val.json", "images")):
        root = tmp_path / names[1]
        (root / "annotations").mkdir(parents=True)
        (root / names[1]).mkdir()
        for i in range(2):
            (root / names[1] / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
        (root / "annotations" / names[0]).write_bytes((tmp_path / "a.json").read_bytes())
        assert len(open_coco(CocoFiles(root=str(root)), "val")) == 2
    named = CocoFiles(val_annotations=str(tmp_path / "a.json"), val_images=str(tmp_path))
    assert len(open_coco(named, "val")) == 2
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


def test_an_impossible_jitter_is_refused():
    with pytest.raises(ValueError, match=r"scale: \[2.0, 1.0\], expected 0 < low <= high"):
        CocoConfig(scale=(2.0, 1.0))


# -------------------- average precision


def test_the_truth_fed_back_is_perfect_and_nothing_found_is_nothing(write):
    crowd = thing(
        0, 10, 7, (0, 0, 15, 15), iscrowd=1, segmentation={"size": [20, 30], "counts": run_lengths(1, 1, 9, 9)}
    )
    coco = write(
        content(crowd, thing(1, 0, 7, (5, 5, 8, 8)), thing(1, 0, 2, (1, 1, 9, 9)), thing(3, 10, 2, (20, 8, 6, 9)))
    )
    truth = coco.dataset()
    figures = evaluate(truth, as_results(truth), per_class=True)
    for name in ("box_AP", "box_AP50", "box_AP75", "box_APs", "box_AR", "mask_AP", "box_AP/two", "mask_AP/seven"):
        assert figures[name] == ONE, name
    assert figures["box_APl"] is None  # there is nothing that large
    nothing = evaluate(truth, [])
    assert nothing["box_AP"] == nothing["mask_AP"] == nothing["box_AR"] == 0
    assert truth == coco.dataset()  # evaluation leaves it alone


def test_average_precision_by_hand(write):
    """Two objects; a hit, a miss, a hit: precision 1 up to recall 1/2, then 2/3, at the 101 recalls 0, 0.01, ..., 1."""
    truth = write(content(thing(1, 0, 7, (2, 2, 10, 10)), thing(2, 10, 7, (5, 5, 8, 8)))).dataset()
    first, second = as_results(truth)
    code = coco_mask.frPyObjects(rectangle(20, 10, 6, 6), HEIGHT, WIDTH)[0]
    code = {"size": code["size"], "counts": code["counts"].decode()}
    miss = {**first, "bbox": [20.0, 10.0, 6.0, 6.0], "segmentation": code}
    results = [{**first, "score": 0.9}, {**miss, "score": 0.8}, {**second, "score": 0.7}]
    figures = evaluate(truth, results)
    expected = (51 + 50 * 2 / 3) / 101
    assert figures["box_AP"] == pytest.approx(expected, abs=1e-9)
    assert figures["mask_AP"] == pytest.approx(expected, abs=1e-9)
    # a box that covers 7 of 10 columns has IoU 0.7: it counts for the thresholds .5 to .7, five of ten
    narrow = {**first, "bbox": [2.0, 2.0, 7.0, 10.0], "score": 0.9}
    figures = evaluate(truth, [narrow, {**second, "score": 0.8}])
    assert figures["box_AP50"] == ONE
    # where the first misses, the second is a hit at precision 1/2 and recall 1/2
    assert figures["box_AP"] == pytest.approx((5 * 1 + 5 * 51 / 101 * 0.5) / 10, abs=1e-9)
    assert figures["mask_AP"] == ONE


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong(write):
    mask = {"size": [HEIGHT, WIDTH], "counts": run_lengths(15, 2, 14, 16)}
    crowd = thing(1, 0, 7, (15, 2, 14, 16), iscrowd=1, segmentation=mask)
    truth = write(content(crowd, thing(2, 0, 7, (2, 2, 8, 8)))).dataset()
    (hit,) = as_results(truth)
    code = coco_mask.frPyObjects(rectangle(17, 4, 6, 6), HEIGHT, WIDTH)[0]
    code = {"size": code["size"], "counts": code["counts"].decode()}
    inside = {**hit, "bbox": [17.0, 4.0, 6.0, 6.0], "segmentation": code, "score": 1.0}
    figures = evaluate(truth, [{**hit, "score": 0.5}, inside])
    assert figures["box_AP"] == ONE
    assert figures["mask_AP"] == ONE
    outside = {**inside, "bbox": [2.0, 12.0, 6.0, 6.0]}
    assert evaluate(truth, [{**hit, "score": 0.5}, outside])["box_AP"] == pytest.approx(0.5)


# -------------------- large-scale jitter


def scene_of(picture: ScenePicture, seed: int, **options):
    random.seed(seed)
    return ScaleJitter(32, **options).pixels(picture)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_are_drawn_anew_around_what_is_left_of_the_masks(write, seed):
    size = [HEIGHT, WIDTH]
    triangle = [[4.0, 3.0, 24.0, 3.0, 4.0, 17.0]]
    whole = coco_mask.decode(encode(triangle, *size))
    flat = whole.T.ravel()
    counts = np.diff([0, *(np.flatnonzero(np.diff(flat.astype(int))) + 1), flat.size]).tolist()
    twice = [thing(1, 0, 7, (4, 3, 20, 14), segmentation=triangle)]
    twice.append(thing(2, 0, 2, (4, 3, 20, 14), segmentation={"size": size, "counts": counts}))
    crowd = thing(3, 0, 2, (4, 3, 20, 14), iscrowd=1)
    coco = write(content(*twice, crowd))
    scene = scene_of(coco.open_image(0)[0], seed, scale=(0.3, 3.0))
    assert scene.image.shape == (3, 32, 32)
    assert scene.image.dtype == torch.uint8
    assert len(scene.labels) in (0, 1, 2)  # a crop may miss it; the crowd never counts
    for box, mask in zip(scene.boxes, scene.masks, strict=True):
        assert tuple(box.tolist()) == extent(mask.numpy())
        assert (box[2:] > box[:2]).all()
    if len(scene.labels) == 2:  # moved and filled, or filled and resized: the same but for a pixel at the edges
        a, b = scene.masks.bool()
        assert (a & b).sum() > 0.8 * (a | b).sum() or (a | b).sum() < 40
        assert scene.labels.tolist() == [1, 0]
    again = scene_of(coco.open_image(0)[0], seed, scale=(0.3, 3.0))
    assert torch.equal(scene.image, again.image)
    assert torch.equal(scene.masks, again.masks)


def test_the_picture_and_its_masks_move_together(tmp_path):
    """An object painted white, the rest black: where the mask is, there is white, in every crop."""
    box, pixels = (6, 4, 12, 9), np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[4:13, 6:18] = 255
    Image.fromarray(pixels).save(tmp_path / "0.png")
    one = {**content(thing(1, 0, 7, box)), "images": content()["images"][:1]}
    (tmp_path / "a.json").write_text(json.dumps(one))
    coco, seen = CocoSet(tmp_path / "a.json", tmp_path), 0
    for seed in range(10):
        scene = scene_of(coco.open_image(0)[0], seed, scale=(0.8, 2.0))
        if len(scene.labels):
            white = scene.image.float().mean(0) > 127
            mask = scene.masks[0].bool()
            assert (white & mask).sum() >= 0.8 * (white | mask).sum()
            seen += 1
    assert seen > 5


def test_small_pictures_are_padded_on_the_right_and_below_and_mirrored_half_of_the_time(write):
    coco = write(content(thing(1, 0, 7, (0, 0, 10, 20))))
    lefts = []
    for seed in range(20):
        scene = scene_of(coco.open_image(0)[0], seed, scale=(0.5, 0.5))  # 16 x 11
        assert (scene.image[:, 11:] == scene.image[:, 31:, 31:]).all()
        assert (scene.image[:, :, 16:] == scene.image[:, 31:, 31:]).all()
        lefts.append(int(scene.boxes[0, 0]))
    assert set(lefts) == {0, 11} or set(lefts) == {0, 10}
    straight = [scene_of(coco.open_image(0)[0], seed, scale=(0.5, 0.5), flip=False) for seed in range(8)]
    assert {int(scene.boxes[0, 0]) for scene in straight} == {0}


def test_a_batch_gives_each_image_its_objects(write):
    coco = write(content(thing(1, 0, 7, (2, 2, 20, 15)), thing(2, 0, 2, (5, 5, 12, 12))))
    scenes = [scene_of(coco.open_image(i)[0], 1, scale=(1.0, 1.0)) for i in (1, 0, 1)]
    batch = collate(scenes, torch.full((3,), -1), torch.tensor([1, 0, 1]), [])
    assert len(batch) == 3
    assert batch.counts == [0, 2, 0]
    parted = batch.scenes()
    assert [len(scene.labels) for scene in parted] == [0, 2, 0]
    assert torch.equal(parted[1].masks, scenes[1].masks)


def test_a_broken_file_of_a_real_name_is_named(tmp_path: Path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"instances_train.json: not JSON"):
        open_coco(CocoFiles(root=str(tmp_path)), "train")
