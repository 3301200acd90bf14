"""`addp det train`, `eval` and `predict` as a user of a plain install runs them, with the mistakes users make."""

import json
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from image_data import write_folders_named_after_splits
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_detectors import tiny_encoder
from toy_stage import TIMING

from addp_core.recipes.cli import main
from addp_core.weights.saving import save_model
from det import train as det_train
from det.average_precision import METRICS
from det.config import Category
from det.model import load_detector
from det.stage import DetStage
from tools.export import detectron2_folder

RECIPE = """
engine: torchvision
data: {size: 48, scale: [0.5, 1.5], workers: 0}
drop_path: 0.1
attention: {window: 5, global_blocks: 1, relative: decomposed, class_token: false}
detector: {channels: 16, scales: [1, 0.5], convs: 8, fc: 16, proposals: 20, samples: 8, score: 0.001, detections: 5}
train: {steps: 4, batch: 2, lr: 1.0e-3, layer_decay: 0.8, log_every: 1, checkpoint_every: 2, keep: 9}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a folder with a toy COCO dataset, a recipe, an encoder checkpoint and a finished run."""
    root = tmp_path_factory.mktemp("det")
    toy = ["toy", f"out={root / 'toy'}", "only=[coco]", "scene=48", "coco_train=10", "coco_val=5"]
    assert main(toy) == 0
    save_model(tiny_encoder(), root / "encoder.safetensors")
    (root / "recipe.yaml").write_text(RECIPE)
    assert main(train_command(root, root / "run")) == 0
    return root


def train_command(root: Path, out: Path, *settings: str) -> list[str]:
    data, model = f"data={root / 'toy' / 'coco'}", f"model={root / 'encoder.safetensors'}"
    return ["det", "train", str(root / "recipe.yaml"), data, model, f"out={out}", *settings]


def last_error_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def read_metrics(out: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without timing."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def test_training_writes_metrics_previews_and_the_model(trained):
    run = trained / "run"
    lines = read_metrics(run)
    losses = {"loss", "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert losses <= lines[0].keys()
    assert lines[-1]["box_AP"] < 0.05  # four steps from random weights
    assert lines[-1]["mask_AP"] < 0.05
    assert (run / "images" / "detections-4.png").exists()
    model = load_detector(run)
    assert model.architecture.categories[0] == Category(1, "0")
    assert model.architecture.size == 48


def test_a_stopped_det_run_continues_bit_for_bit(trained, tmp_path, monkeypatch):
    original_loss = DetStage.loss

    def loss_with_signal(self, model, batch, micro_step):
        if micro_step.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original_loss(self, model, batch, micro_step)

    monkeypatch.setattr(DetStage, "loss", loss_with_signal)
    with pytest.raises(SystemExit) as caught:
        main(train_command(trained, tmp_path / "run"))
    assert caught.value.code == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()
    monkeypatch.setattr(DetStage, "loss", original_loss)
    assert main(train_command(trained, tmp_path / "run", "data.workers=1")) == 0
    continued, uninterrupted = (load_file(root / "run" / "model.safetensors") for root in (tmp_path, trained))
    assert continued.keys() == uninterrupted.keys()
    assert all(torch.equal(continued[key], uninterrupted[key]) for key in continued)
    assert read_metrics(tmp_path / "run")[-1] == read_metrics(trained / "run")[-1]


def test_eval_reproduces_the_last_metrics_of_training(trained, tmp_path, capsys):
    arguments = ["det", "eval", f"model={trained / 'run'}", f"data={trained / 'toy' / 'coco'}"]
    assert main([*arguments, f"out={tmp_path}", "json=true", "per_class=true"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == json.loads((tmp_path / "figures.json").read_text())
    last = read_metrics(trained / "run")[-1]
    last = {name: value for name, value in last.items() if name.startswith(("box", "mask"))}
    assert {name: metrics[name] for name in last} == pytest.approx(last)
    assert "box_AP/7" in metrics
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == results[0].keys()
    assert {result["category_id"] for result in results} <= {1, 2, 3, 4, 5, 7, 8, 9, 10, 11}
    assert main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["box", "mask"]
    assert table[1].split()[0] == "AP"


def test_predict_draws_on_every_readable_image(trained, tmp_path, capsys):
    (tmp_path / "in" / "nested").mkdir(parents=True)
    Image.new("RGB", (70, 40), (200, 30, 30)).save(tmp_path / "in" / "a.jpg")
    Image.new("L", (33, 80)).save(tmp_path / "in" / "nested" / "b.png")
    (tmp_path / "in" / "c.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert (
        main(["det", "predict", f"model={trained / 'run'}", f"images={tmp_path / 'in'}", f"out={out}", "score=0"]) == 0
    )
    assert "c.png: not an image of a known format; skipped" in capsys.readouterr().err
    assert Image.open(out / "a.jpg.png").size == (70, 40)
    assert Image.open(out / "nested" / "b.png.png").size == (33, 80)
    listed = json.loads((out / "images.json").read_text())
    assert {image["file_name"] for image in listed["images"]} == {"a.jpg", "nested/b.png"}
    found = json.loads((out / "detections.json").read_text())
    assert {result["file_name"] for result in found} <= {"a.jpg", "nested/b.png"}
    drawn = {result["file_name"] for result in found}
    assert drawn  # with a minimum score of 0 there are always detections
    for name in drawn:
        before = Image.open(tmp_path / "in" / name).convert("RGB")
        assert Image.open(out / f"{name}.png").tobytes() != before.tobytes()


MISTAKES = {
    ("train", "data.size=50"): "data.size=50: image size 50 x 50: expected multiples of the patch size 4",
    ("train", "detector.scales=[8]"): "detector.scales: found [8.0], expected some of [4, 2, 1, 0.5]",
    ("train", "attention.class_token=true"): "attention.class_token: found true, expected false where window > 0",
    ("train", "model=nowhere"): "nowhere: no such file",
    ("train", "model=base"): "expected init=random with it",
    ("train", "data=nowhere"): "data.root: nowhere is not a folder",
    ("train", "data.scale=[2,1]"): "data.scale: [2.0, 1.0], expected 0 < low <= high",
    (
        "train",
        "train.keep_best=mask_APl",
    ): "has no object of 9,216 to 10,000,000,000 pixels, and without one this metric",
    ("train", "data.sizes=3"): "unknown key 'data.sizes'; did you mean 'data.size'?",
    ("train", "tokenizer_norm=true"): "tokenizer_norm: ",
    (
        "train",
        "train.compile=true",
    ): "train.compile: found true, expected false: a detector breaks into dozens of small",
    ("eval", "model={root}/encoder.safetensors"): "is not a detector; expected a run of `addp det train`",
    ("eval", "model={root}/other.safetensors"): "1 tensors do not match its stored architecture: extra",
    ("eval", "data.val_annotations={root}/renamed.json"): "(only in the file: 1 zero; only in the detector: 1 0)",
    ("eval", "data.val_annotations={root}/recipe.yaml"): "recipe.yaml: not JSON",
    ("predict", "images={root}/nowhere"): "addp: images: {root}/nowhere does not exist",
    ("predict", "images={root}/photos"): "addp: images: {root}/photos holds no files; expected images",
    ("predict", "out={root}/toy/coco/val2017"): "addp: out: results would be written to {root}/toy/coco/val2017, among",
    ("predict", "out={root}/toy/coco/val2017/drawn"): "expected a folder outside of it",
    ("predict", "out={root}/recipe.yaml"): "recipe.yaml cannot be written",
}


@pytest.mark.parametrize(("action", "setting"), MISTAKES)
def test_det_mistakes_end_in_one_line(trained, tmp_path, capsys, action, setting):
    (trained / "photos" / "val").mkdir(parents=True, exist_ok=True)
    if "renamed" in setting:
        annotations = json.loads((trained / "toy" / "coco" / "annotations" / "instances_val2017.json").read_text())
        annotations["categories"][0]["name"] = "zero"
        (trained / "renamed.json").write_text(json.dumps(annotations))
    if "other" in setting:
        with safe_open(trained / "run" / "model.safetensors", "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            save_file(state | {"extra": torch.zeros(1)}, trained / "other.safetensors", file.metadata())
    model, data = f"model={trained / 'run'}", f"data={trained / 'toy' / 'coco'}"
    arguments = {
        "train": train_command(trained, tmp_path / "run"),
        "eval": ["det", "eval", model, data],
        "predict": ["det", "predict", model, f"images={trained / 'toy' / 'coco' / 'val2017'}", f"out={tmp_path}"],
    }[action]
    message, setting = (text.format(root=trained, run=trained / "run") for text in (MISTAKES[action, setting], setting))
    arguments = [a for a in arguments if a.partition("=")[0] != setting.partition("=")[0]]
    assert main([*arguments, setting]) == 2
    assert message in last_error_line(capsys)


def test_both_splits_must_have_the_same_categories(trained, tmp_path, capsys):
    source = trained / "toy" / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(source.read_text())
    content["categories"].append({"id": 90, "name": "more"})
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert main(train_command(trained, tmp_path / "run", f"data.val_annotations={tmp_path / 'val.json'}")) == 2
    assert "its categories differ from those of" in last_error_line(capsys)


def test_a_run_keeps_its_engine_if_detectron2_is_installed_or_removed_later(trained, tmp_path, monkeypatch):
    arguments = train_command(trained, tmp_path, "engine=auto", "normalisation=half", "train.steps=2")
    monkeypatch.setattr(det_train, "find_spec", lambda name: None)
    assert main(arguments) == 0
    recipe = tmp_path / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["engine"] == "torchvision"
    before = (tmp_path / "model.safetensors").read_bytes()

    monkeypatch.setattr(det_train, "find_spec", lambda name: object())
    for name in ("finished.json", "model.safetensors"):  # as if killed before the end
        (tmp_path / name).unlink()
    assert main(arguments) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
    architecture = load_detector(tmp_path).architecture
    assert (architecture.engine, architecture.normalisation) == ("torchvision", "half")

    monkeypatch.setattr(det_train, "find_spec", lambda name: None)
    recipe.write_text(recipe.read_text().replace("engine: torchvision", "engine: auto"))  # as older versions wrote it
    (tmp_path / "finished.json").unlink()
    assert main(arguments) == 0


def write_dataset(source: Path, target: Path, change) -> Path:
    """Copy a toy COCO dataset, with `change` applied to the content of both annotation files."""
    shutil.copytree(source, target)
    for path in (target / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return target


def remove_masks(content: dict) -> None:
    for entry in content["annotations"]:
        del entry["segmentation"]


def test_boxes_without_masks_are_trained_evaluated_and_predicted(trained, tmp_path, capsys):
    data, run = write_dataset(trained / "toy" / "coco", tmp_path / "coco", remove_masks), tmp_path / "run"
    assert main(train_command(trained, run, f"data={data}", "train.steps=2")) == 0
    assert "boxes alone (Faster R-CNN)" in capsys.readouterr().err
    assert not any("mask" in name for line in read_metrics(run) for name in line)
    assert load_detector(run).architecture.detector.masks is False
    assert yaml.safe_load((run / "recipe.yaml").read_text())["detector"]["masks"] == "auto"
    for dataset in (data, trained / "toy" / "coco"):  # whose masks are not looked at
        assert main(["det", "eval", f"model={run}", f"data={dataset}"]) == 0
        assert capsys.readouterr().out.splitlines()[0].split() == ["box"]
    out = tmp_path / "out"
    assert main(["det", "predict", f"model={run}", f"images={data / 'val2017'}", f"out={out}", "score=0"]) == 0
    results = json.loads((out / "detections.json").read_text())
    assert results
    assert not any("segmentation" in result for result in results)
    assert main(train_command(trained, tmp_path / "masks", f"data={data}", "detector.masks=true")) == 2
    assert "; detector.masks=false trains on boxes alone" in last_error_line(capsys)


def test_a_detector_of_masks_is_evaluated_on_boxes_alone_if_there_are_no_masks(trained, tmp_path, capsys):
    data = write_dataset(trained / "toy" / "coco", tmp_path / "coco", remove_masks)
    assert main(["det", "eval", f"model={trained / 'run'}", f"data={data}", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {f"box_{n}" for n in (*METRICS, "AR")}


def test_detectors_saved_before_the_key_existed_have_masks_and_bicubic_images(trained, tmp_path):
    with safe_open(trained / "run" / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    (key,) = (key for key, value in metadata.items() if "interpolation" in value)
    description = json.loads(metadata[key])
    del description["architecture"]["interpolation"], description["architecture"]["detector"]["masks"]
    save_file(state, tmp_path / "old.safetensors", {**metadata, key: json.dumps(description)})
    architecture = load_detector(tmp_path / "old.safetensors").architecture
    assert (architecture.masks, architecture.interpolation) == (True, "bicubic")


def test_a_run_begun_before_the_key_interpolation_existed_continues(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    del values["data"]["interpolation"], values["detector"]["masks"]
    recipe.write_text(yaml.safe_dump(values))
    (tmp_path / "run" / "finished.json").unlink()
    # as the paper's recipes, which have set it to bilinear since
    assert main(train_command(trained, tmp_path / "run", "data.interpolation=bilinear")) == 0
    assert "goes on with data.interpolation=bicubic, as it began" in capsys.readouterr().err
    assert read_metrics(tmp_path / "run")[-1] == read_metrics(trained / "run")[-1]


def empty_images(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")


def test_evaluation_of_more_unreadable_images_than_tolerated_fails(trained, tmp_path, capsys):
    data = write_dataset(trained / "toy" / "coco", tmp_path / "coco", lambda content: None)
    empty_images(data / "val2017")
    assert main(["det", "eval", f"model={trained / 'run'}", f"data={data}"]) == 2
    message = "images of {data}/annotations/instances_val2017.json are unreadable, 1 tolerated: "
    assert message.format(data=data) in last_error_line(capsys)
    assert main(["det", "eval", f"model={trained / 'run'}", f"data={data}", "data.max_errors=5"]) == 0
    assert main(train_command(trained, tmp_path / "run", f"data={data}")) == 2  # before the first step
    assert "the file is empty" in last_error_line(capsys)
    shutil.rmtree(data / "val2017")
    shutil.copytree(trained / "toy" / "coco" / "val2017", data / "val2017")
    first = min((data / "val2017").iterdir())
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])  # its header is intact
    assert main(train_command(trained, tmp_path / "run", f"data={data}", "data.max_errors=0")) == 2
    assert f"{first} (image file is truncated" in last_error_line(capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_evaluation_during_training_fails_if_images_have_become_unreadable(trained, tmp_path, capsys, monkeypatch):
    data = write_dataset(trained / "toy" / "coco", tmp_path / "coco", lambda content: None)
    evaluate = DetStage.evaluate

    def evaluate_after_loss_of_images(self, model, step):
        empty_images(data / "val2017")
        return evaluate(self, model, step)

    monkeypatch.setattr(DetStage, "evaluate", evaluate_after_loss_of_images)
    assert main(train_command(trained, tmp_path / "run", f"data={data}")) == 2
    assert "data.max_errors: at least 2 of 5 images of" in last_error_line(capsys)
    assert not (tmp_path / "run" / "finished.json").exists()


def test_sides_that_are_swapped_name_the_exif_orientation(trained, tmp_path, capsys):
    def set_sizes(content: dict) -> None:
        for image in content["images"]:
            image.update(height=50, width=40)

    data = write_dataset(trained / "toy" / "coco", tmp_path / "coco", set_sizes)
    for path in (data / "val2017").iterdir():
        Image.new("RGB", (50, 40)).save(path)
    assert main(["det", "eval", f"model={trained / 'run'}", f"data={data}"]) == 2
    assert "EXIF orientation" in last_error_line(capsys)


def test_what_needs_detectron2_says_so_where_it_is_missing(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    for name in [*sys.modules]:  # of tests before this one, where detectron2 is installed
        if name.startswith("detectron2."):
            monkeypatch.setitem(sys.modules, name, None)
        if name.startswith("det.native."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(detectron2_folder, "find_spec", lambda name: None)
    (tmp_path / "config.yaml").write_text("MODEL: {}\n")
    torch.save({"model": {"backbone.net.encoder.norm.weight": torch.zeros(1)}}, tmp_path / "model_final.pth")
    assert main(["det", "eval", f"model={tmp_path}", f"data={trained / 'toy' / 'coco'}"]) == 2
    assert "model: was trained with detectron2, which is not installed" in last_error_line(capsys)
    export = ["export", f"model={trained / 'run'}", f"out={tmp_path / 'd2'}", "layout=detectron2"]
    assert main(export) == 2
    assert "layout=detectron2: it is not installed; `addp doctor` shows" in last_error_line(capsys)


def test_predictions_are_of_all_images_whatever_their_folders_are_called(trained, tmp_path):
    write_folders_named_after_splits(tmp_path, (40, 30))
    for images, expected in {"in": {"train/a.jpg", "test/a.jpg", "other/a.jpg"}, "test.tar": {"test/a.jpg"}}.items():
        out = tmp_path / "out" / images
        assert main(["det", "predict", f"model={trained / 'run'}", f"images={tmp_path / images}", f"out={out}"]) == 0
        listed = json.loads((out / "images.json").read_text())
        assert {image["file_name"] for image in listed["images"]} == expected
        assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == {f"{name}.png" for name in expected}


def test_predictions_are_not_written_among_the_images(trained, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in").mkdir()
    for folder in ("in", "elsewhere"):
        Image.new("RGB", (40, 30)).save(tmp_path / folder / "a.jpg")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    command = ["det", "predict", f"model={trained / 'run'}", f"images={tmp_path / 'in'}"]
    for out in ("in", "link", "link/new", "elsewhere/new"):
        assert main([*command, f"out={tmp_path / out}"]) == 2
        assert "addp: out: results would be written to" in last_error_line(capsys)
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("new")]


def test_predictions_stay_in_their_folder(trained, tmp_path):
    """Names in a tar come from elsewhere: none may choose a file outside of `out`."""
    (tmp_path / "in").mkdir()
    Image.new("RGB", (70, 40), (200, 30, 30)).save(tmp_path / "1.png")
    with tarfile.open(tmp_path / "in" / "x.tar", "w") as tar:
        for name in ("../../x.png", "cat/1.png"):
            tar.add(tmp_path / "1.png", name)
    out = tmp_path / "a" / "b" / "out"
    model, images = f"model={trained / 'run'}", f"images={tmp_path / 'in' / 'x.tar'}"
    assert main(["det", "predict", model, images, f"out={out}"]) == 0
    assert [str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*.png")] == [
        "b/out/cat/1.png.png"
    ]
