"""COCO's average precision against cases worked out by hand."""

import pytest
from coco_files import HEIGHT, WIDTH, annotation, box_run_lengths, coco_content, compressed, perfect_results, rectangle
from pycocotools import mask as coco_mask

from det.average_precision import coco_metrics

ONE = pytest.approx(1, abs=1e-9)  # COCOeval adds the smallest number to its divisors


def test_perfect_detections_score_one_and_no_detections_score_zero(make_dataset):
    segmentation = {"size": [HEIGHT, WIDTH], "counts": box_run_lengths(1, 1, 9, 9)}
    dataset = make_dataset(
        coco_content(
            annotation(0, 10, 7, (0, 0, 15, 15), iscrowd=1, segmentation=segmentation),
            annotation(1, 0, 7, (5, 5, 8, 8)),
            annotation(1, 0, 2, (1, 1, 9, 9)),
            annotation(3, 10, 2, (20, 8, 6, 9)),
        )
    )
    ground_truth = dataset.to_coco()
    metrics = coco_metrics(ground_truth, perfect_results(ground_truth), per_class=True)
    for name in ("box_AP", "box_AP50", "box_AP75", "box_APs", "box_AR", "mask_AP", "box_AP/two", "mask_AP/seven"):
        assert metrics[name] == ONE, name
    assert metrics["box_APl"] is None  # no object is that large
    metrics = coco_metrics(ground_truth, [])
    assert metrics["box_AP"] == metrics["mask_AP"] == metrics["box_AR"] == 0
    assert ground_truth == dataset.to_coco()  # the evaluation does not change it


def test_average_precision_by_hand(make_dataset):
    """Two objects; a hit, a miss, a hit: precision 1 up to recall 1/2, then 2/3, at the 101 recalls 0, 0.01, ..., 1."""
    ground_truth = make_dataset(
        coco_content(annotation(1, 0, 7, (2, 2, 10, 10)), annotation(2, 10, 7, (5, 5, 8, 8)))
    ).to_coco()
    first, second = perfect_results(ground_truth)
    code = compressed(coco_mask.frPyObjects(rectangle(20, 10, 6, 6), HEIGHT, WIDTH)[0])
    miss = {**first, "bbox": [20.0, 10.0, 6.0, 6.0], "segmentation": code}
    results = [{**first, "score": 0.9}, {**miss, "score": 0.8}, {**second, "score": 0.7}]
    metrics = coco_metrics(ground_truth, results)
    expected = (51 + 50 * 2 / 3) / 101
    assert metrics["box_AP"] == pytest.approx(expected, abs=1e-9)
    assert metrics["mask_AP"] == pytest.approx(expected, abs=1e-9)
    # a box that covers 7 of 10 columns has IoU 0.7: it is a hit at the thresholds 0.5 to 0.7, five of ten
    narrow = {**first, "bbox": [2.0, 2.0, 7.0, 10.0], "score": 0.9}
    metrics = coco_metrics(ground_truth, [narrow, {**second, "score": 0.8}])
    assert metrics["box_AP50"] == ONE
    # at the other thresholds the first is a miss, so the second is a hit at precision 1/2 and recall 1/2
    assert metrics["box_AP"] == pytest.approx((5 * 1 + 5 * 51 / 101 * 0.5) / 10, abs=1e-9)
    assert metrics["mask_AP"] == ONE


def test_detections_in_a_crowd_are_ignored(make_dataset):
    segmentation = {"size": [HEIGHT, WIDTH], "counts": box_run_lengths(15, 2, 14, 16)}
    crowd = annotation(1, 0, 7, (15, 2, 14, 16), iscrowd=1, segmentation=segmentation)
    ground_truth = make_dataset(coco_content(crowd, annotation(2, 0, 7, (2, 2, 8, 8)))).to_coco()
    (hit,) = perfect_results(ground_truth)
    code = compressed(coco_mask.frPyObjects(rectangle(17, 4, 6, 6), HEIGHT, WIDTH)[0])
    inside = {**hit, "bbox": [17.0, 4.0, 6.0, 6.0], "segmentation": code, "score": 1.0}
    metrics = coco_metrics(ground_truth, [{**hit, "score": 0.5}, inside])
    assert metrics["box_AP"] == ONE
    assert metrics["mask_AP"] == ONE
    outside = {**inside, "bbox": [2.0, 12.0, 6.0, 6.0]}
    assert coco_metrics(ground_truth, [{**hit, "score": 0.5}, outside])["box_AP"] == pytest.approx(0.5)


def test_categories_of_one_name_have_metrics_of_their_own(make_dataset, caplog):
    content = coco_content(annotation(1, 0, 7, (2, 2, 10, 10)), annotation(2, 10, 2, (5, 5, 8, 8)))
    for category in content["categories"]:
        category["name"] = "digit"
    dataset = make_dataset(content)
    assert dataset.classes == ("digit (id 2)", "digit (id 7)")
    assert "several categories have one name; they are shown as digit (id 2), digit (id 7)" in caplog.text
    ground_truth = dataset.to_coco()
    metrics = coco_metrics(ground_truth, perfect_results(ground_truth)[:1], per_class=True)
    assert metrics["box_AP/digit (id 7)"] == ONE
    assert metrics["box_AP/digit (id 2)"] == 0


def test_boxes_alone_have_box_metrics_only(make_dataset):
    ground_truth = make_dataset(coco_content(annotation(1, 0, 7, (2, 2, 10, 10))), masks=False).to_coco()
    result = {"image_id": 0, "category_id": 7, "bbox": [2, 2, 10, 10], "score": 1.0}
    metrics = coco_metrics(ground_truth, [result], per_class=True, masks=False)
    assert metrics["box_AP"] == ONE
    assert all(name.startswith("box_") for name in metrics)
