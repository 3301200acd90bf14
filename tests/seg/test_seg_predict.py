"""`addp seg predict`: the class maps of images, and the errors in images."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from toy_segmentation import user_error

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from addp_core.recipes.cli import main
from seg.scenes import find_pairs


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
