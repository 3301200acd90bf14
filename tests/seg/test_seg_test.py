"""`addp seg test`: the metrics of a trained segmentor and of class maps in files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from toy_segmentation import CLASSES, user_error

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from addp_core.recipes.cli import main
from seg.evaluation import ClassIoU
from seg.scenes import find_pairs, read_class_names


def test_metrics_of_a_model(trained_run, scenes, tmp_path, capsys):
    arguments = ["seg", "test", f"model={trained_run}", f"data={scenes}", "data.workers=0"]
    assert main([*arguments, f"out={tmp_path}/slide", "maps=true"]) == 0
    assert "grass" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "slide" / "metrics.json").read_text())
    last = json.loads((trained_run / "metrics.jsonl").read_text().splitlines()[-1])
    keys = ("mIoU", "aAcc", "mAcc", "constant_mIoU")
    assert all(metrics[key] == pytest.approx(last[key], abs=0.011) for key in keys)

    augmented = ["test.mode=whole", "test.flip=true", "test.scales=[0.75,1]"]  # one of the images has odd sides
    assert main([*arguments, f"out={tmp_path}/augmented", *augmented]) == 0
    content = json.loads((tmp_path / "augmented" / "metrics.json").read_text())
    assert content["classes"] == list(read_class_names(scenes))

    # the class maps that `maps` wrote have the same metrics
    from_files = ["seg", "test", f"predictions={tmp_path}/slide/maps", f"data={scenes}", "data.workers=0"]
    assert main([*from_files, f"out={tmp_path}/from-files"]) == 0
    again = json.loads((tmp_path / "from-files" / "metrics.json").read_text())
    assert all(again[key] == metrics[key] for key in ("mIoU", "aAcc", "mAcc"))


def metrics_from_confusion(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[dict[str, float], np.ndarray]:
    """Compute mIoU, mAcc and aAcc in percent, and IoU by class, from pairs of annotation and prediction; label 0 does
    not count.
    """
    confusion = np.zeros((CLASSES + 1, CLASSES + 1), dtype=np.int64)  # [label, prediction]
    for label, prediction in pairs:
        np.add.at(confusion, (label[label > 0], prediction[label > 0]), 1)
    correct = np.diag(confusion)[1:].astype(float)
    labeled, predicted = confusion.sum(1)[1:], confusion.sum(0)[1:]
    with np.errstate(invalid="ignore"):
        iou, accuracy = correct / (labeled + predicted - correct), correct / labeled
    means = {"mIoU": np.nanmean(iou), "mAcc": np.nanmean(accuracy), "aAcc": correct.sum() / labeled.sum()}
    return {key: 100 * value for key, value in means.items()}, 100 * iou


@pytest.mark.parametrize("shift", [0, 3])
def test_metrics_equal_those_of_the_confusion_matrix(scenes, tmp_path, shift):
    """The ground truth scores 100."""
    maps, pairs = tmp_path / "maps", []
    maps.mkdir()
    for pair in find_pairs(scenes, "val"):
        label = np.array(Image.open(pair.class_map))
        pairs.append((label, np.roll(label, shift, axis=1)))
        Image.fromarray(pairs[-1][1]).save(maps / pair.class_map.name)
    arguments = ["seg", "test", f"predictions={maps}", f"data={scenes}", f"out={tmp_path}", "data.workers=0"]
    assert main(arguments) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    means, iou = metrics_from_confusion(pairs)
    if not shift:
        assert means["mIoU"] == metrics["mIoU"] == metrics["aAcc"] == 100
    assert all(metrics[key] == pytest.approx(value, abs=0.006) for key, value in means.items())
    iou_in_file = [np.nan if value is None else value for value in metrics["per_class"]["IoU"]]
    assert np.allclose(iou_in_file, iou, atol=1e-3, equal_nan=True)


def test_chance_level_is_that_of_the_most_frequent_class(scenes, tmp_path):
    labels = [np.array(Image.open(pair.class_map)) for pair in find_pairs(scenes, "val")]
    counts = np.bincount(np.concatenate([label.flatten() for label in labels]), minlength=CLASSES + 1)
    most_frequent = int(counts[1:].argmax()) + 1
    (tmp_path / "maps").mkdir()
    for pair, label in zip(find_pairs(scenes, "val"), labels, strict=True):
        Image.fromarray(np.full_like(label, most_frequent)).save(tmp_path / "maps" / pair.class_map.name)
    arguments = ["seg", "test", f"predictions={tmp_path}/maps", f"data={scenes}", f"out={tmp_path}", "data.workers=0"]
    assert main(arguments) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["mIoU"] == pytest.approx(metrics["constant_mIoU"], abs=0.011)


def test_windows_may_have_another_size_than_the_crops_of_training(trained_run, scenes, tmp_path):
    arguments = ["seg", "test", f"model={trained_run}", f"data={scenes}", "data.workers=0"]
    metrics = {}
    for side in (32, 48):
        assert main([*arguments, f"data.crop={side}", f"out={tmp_path}/{side}"]) == 0
        metrics[side] = json.loads((tmp_path / str(side) / "metrics.json").read_text())
    assert main([*arguments, f"out={tmp_path}/default"]) == 0
    assert metrics[32] == json.loads((tmp_path / "default" / "metrics.json").read_text()) != metrics[48]


def test_pixels_are_counted_beyond_what_single_precision_holds():
    pixels = torch.zeros(4097 * 4096, dtype=torch.uint8)
    pixels[0] = 1
    areas = ClassIoU.intersect_and_union(pixels, torch.zeros_like(pixels), 3, 255)
    count = len(pixels)
    assert [area.tolist() for area in areas] == [[count - 1, 0, 0], [count, 1, 0], [count - 1, 1, 0], [count, 0, 0]]


def test_class_maps_of_a_nested_dataset_keep_their_folders(trained_run, scenes_copy, tmp_path):
    """Images of the same name in different folders, of different sizes."""
    for number, pair in enumerate(find_pairs(scenes_copy, "val")):
        for path in (pair.image, pair.class_map):
            folder = path.parent / f"part{number}"
            folder.mkdir()
            path.rename(folder / f"same{path.suffix}")
    arguments = ["seg", "test", f"data={scenes_copy}", "data.workers=0"]
    assert main([*arguments, f"model={trained_run}", f"out={tmp_path}/first", "maps=true"]) == 0
    assert main([*arguments, f"predictions={tmp_path}/first/maps", f"out={tmp_path}/again"]) == 0
    first, again = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("first", "again"))
    assert first == again
    (tmp_path / "first" / "maps" / "part2" / "same.png").unlink()
    assert main([*arguments, f"predictions={tmp_path}/first/maps", f"out={tmp_path}/again"]) == 2


@pytest.mark.parametrize("part", ["image", "class_map"])
def test_an_unreadable_file_ends_the_evaluation(trained_run, scenes_copy, tmp_path, capsys, part):
    """There is no mIoU of the rest."""
    path = getattr(find_pairs(scenes_copy, "val")[2], part)
    path.write_bytes(path.read_bytes()[:100])
    arguments = ["seg", "test", f"model={trained_run}", f"data={scenes_copy}", f"out={tmp_path}/out", "data.workers=0"]
    for check in (1000, 0):
        assert str(path) in user_error(capsys, *arguments, f"data.check={check}")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_errors_name_what_does_not_fit_the_dataset(trained_run, scenes, encoder_file, tmp_path, capsys):
    arguments = ["seg", "test", f"data={scenes}", f"out={tmp_path}"]
    assert "expected either" in user_error(capsys, *arguments)
    assert "not a segmentor" in user_error(capsys, *arguments, f"model={encoder_file}")
    assert "is missing" in user_error(capsys, *arguments, f"predictions={tmp_path}")
    class_table = tmp_path / "table.txt"
    class_table.write_text("Idx\tName\n" + "".join(f"{i}\tthing {i}\n" for i in range(1, 20)))
    arguments.append(f"model={trained_run}")
    error = user_error(capsys, *arguments, f"data.classes={class_table}")
    assert "19 classes, expected the model's 13: class 1 is 'thing 1' in the dataset and '0' in the model" in error
    expected = "data.crop: found 100, expected a multiple of the model's patch size 8"
    assert expected in user_error(capsys, *arguments, "data.crop=100")
