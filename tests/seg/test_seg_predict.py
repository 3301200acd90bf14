"""`addp seg predict`: the class maps of images, and the errors in images."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_data import write_folders_named_after_splits
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from toy_segmentation import train_command, user_error

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from addp_core.recipes.cli import main
from seg.scenes import find_pairs
from seg.segmentor import load_segmentor


def test_class_maps_equal_those_of_seg_test(trained_run, scenes, tmp_path):
    arguments = [f"model={trained_run}", f"data={scenes}", f"out={tmp_path}/test", "data.workers=0", "maps=true"]
    assert main(["seg", "test", *arguments]) == 0
    # in a process of its own, in which nothing else has set mmengine's default scope
    arguments = [f"model={trained_run}", f"images={scenes}/images/validation", f"out={tmp_path}/predict"]
    command_line = [sys.executable, "-m", "addp_core", "seg", "predict", *arguments]
    subprocess.run(command_line, check=True, capture_output=True)
    for pair in find_pairs(scenes, "val"):
        name = pair.class_map.name
        predicted = np.array(Image.open(tmp_path / "predict" / "maps" / name))
        assert np.array_equal(predicted, np.array(Image.open(tmp_path / "test" / "maps" / name)))
        with Image.open(tmp_path / "predict" / name) as sheet, Image.open(pair.image) as image:
            assert sheet.width > 2 * image.width


def test_a_file_with_a_single_class_is_refused(trained_run, scenes, tmp_path, capsys):
    """Earlier versions wrote such files."""
    with safe_open(trained_run / "model.safetensors", "pt") as file:
        description = json.loads(file.metadata()["addp"])
    description["architecture"]["classes"] = ["thing"]
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", {"addp": json.dumps(description)})
    arguments = ["seg", "predict", f"model={tmp_path}/model.safetensors", f"images={scenes}", f"out={tmp_path}/out"]
    assert "classes: found only thing; a segmentor needs at least two" in user_error(capsys, *arguments)


def test_unreadable_images_are_skipped(trained_run, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "nested").mkdir(parents=True)
    for name, size in {"a.jpg": (70, 40), "a.png": (33, 80), "nested/a.webp": (48, 48)}.items():
        Image.new("RGB", size, (200, 30, 30)).save(folder / name)
    (folder / "._a.jpg").write_bytes(b"metadata that macOS writes")
    (folder / "c.png").write_bytes(b"no image")
    arguments = ["seg", "predict", f"model={trained_run}", f"out={out}", "test.flip=true"]
    assert main([*arguments, f"images={folder}"]) == 0
    assert "c.png: not an image of a known format; skipped" in capsys.readouterr().err
    maps = {str(path.relative_to(out / "maps")): Image.open(path).size for path in (out / "maps").rglob("*.png")}
    assert maps == {"a.jpg.png": (70, 40), "a.png.png": (33, 80), "nested/a.png": (48, 48)}
    assert main([*arguments, f"images={folder / 'a.png'}"]) == 0
    assert (out / "a.png").exists()
    assert "none of the 1 images" in user_error(capsys, *arguments, f"images={folder / 'c.png'}")
    assert "addp: images: nowhere does not exist" in user_error(capsys, *arguments, "images=nowhere")


@pytest.mark.parametrize("rescales", [(4, 2, 1, 0.5), (2, 1, 0.5, 0.25)])
def test_images_that_are_much_longer_than_wide(trained_run, scenes, encoder_file, tmp_path, rescales):
    """Down to a single patch, and to less than a pixel after the resize, in training, evaluation and prediction."""
    sizes = {"a": (400, 3), "b": (3, 400), "c": (4000, 4), "d": (3000, 1), "e": (1, 1), "f": (8, 200)}
    for folder in ("images", "annotations"):
        for split in ("training", "validation"):
            (tmp_path / folder / split).mkdir(parents=True)
            for name, size in sizes.items():
                picture = (
                    Image.new("RGB", size) if folder == "images" else Image.new("L", size, 1 + "abcdef".index(name))
                )
                picture.save(tmp_path / folder / split / f"{name}.png")
    (tmp_path / "objectInfo.txt").write_text("Idx\tName\n" + "".join(f"{i}\tthing {i}\n" for i in range(1, 7)))
    run = tmp_path / "run"
    config = "upernet_addp-tiny_500_ade20k-512x512" if 4 in rescales else "upernet_addp-tiny-wide_1k_ade20k-512x512"
    assert main(train_command(tmp_path, encoder_file, run, "train.steps=2", f"config={config}")) == 0
    assert load_segmentor(run)[0].rescales == rescales
    images = f"images={tmp_path / 'images' / 'validation'}"
    for mode in ("slide", "whole"):
        out = tmp_path / mode
        settings = [f"test.mode={mode}", "test.scales=[0.5,1]", "test.flip=true"]
        assert main(["seg", "predict", f"model={run}", images, f"out={out}", *settings]) == 0
        assert {path.stem: Image.open(path).size for path in (out / "maps").iterdir()} == sizes


def test_all_images_are_painted_whatever_their_folders_are_called(trained_run, tmp_path):
    write_folders_named_after_splits(tmp_path, (40, 40))
    for images, expected in {"in": {"train", "test", "other"}, "test.tar": {"test"}}.items():
        out = tmp_path / "out" / images
        assert main(["seg", "predict", f"model={trained_run}", f"images={tmp_path / images}", f"out={out}"]) == 0
        assert {path.parent.name for path in (out / "maps").rglob("*.png")} == expected


def test_results_are_not_written_among_the_images(trained_run, tmp_path, capsys):
    (tmp_path / "maps").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "maps" / "a.png")
    before = (tmp_path / "maps" / "a.png").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "maps")
    command = ["seg", "predict", f"model={trained_run}"]
    for out in ("maps", "maps/painted", "link", ""):  # the last one has the class maps in maps/
        for images in ("maps", "maps/a.png")[: 2 if out != "maps/painted" else 1]:
            error = user_error(capsys, *command, f"images={tmp_path / images}", f"out={tmp_path / out}")
            assert f"among the images of {tmp_path / images}, and replace some" in error
    assert [*tmp_path.rglob("*.png")] == [tmp_path / "maps" / "a.png"]
    assert (tmp_path / "maps" / "a.png").read_bytes() == before
