"""`addp throughput data=...`: the report on loading is complete. Nothing here asserts a speed."""

import json

import pytest
from image_data import noise_image

from addp_core.base.errors import UserError
from addp_core.recipes.cli import run as cli
from tools.speed import loading


@pytest.fixture
def few_images(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "BATCH", 4)
    (tmp_path / "images").mkdir()
    for i in range(9):
        noise_image(40, 30, seed=i).save(tmp_path / f"images/{i}.{'png' if i == 3 else 'jpg'}")
    return tmp_path / "images"


def test_loading_alone(capsys, tmp_path, few_images):
    path = tmp_path / "report.json"
    settings = ["train=false", "sample=false", f"data={few_images}", "size=16", "repeats=2", "warmup=0"]
    assert cli(["throughput", *settings, f"json={path}"]) == 0
    text, report = capsys.readouterr().out, json.loads(path.read_text())
    found = report["loading"]
    assert (found["images"], found["batch"], found["size"]) == (8, 4, [16, 16])
    for key in ("one_core", "all_cores"):
        assert list(found[key]) == ["addp", "timm", "torchvision"]
        for side, metrics in found[key].items():
            assert 0 < metrics["images_per_s"]["low"] <= metrics["images_per_s"]["high"]
            assert ("cpu_ms_per_image" in metrics) == (key == "one_core")
            assert ("addp_times_this" in metrics) == (side != "addp")
    for word in ("loading, 8 images, 16 x 16 px", "one core, images/s", "cores, images/s", "CPU ms/image"):
        assert word in text
    assert "matrix product" not in text


def test_the_pipelines_give_batches_of_bytes(few_images):
    source, config = loading.open_source(str(few_images)), loading.DataConfig(str(few_images), size=(16, 24))
    batches = {name: next(start()) for name, start in loading.pipelines(source, config, workers=0).items()}
    for images in (batches["addp"].pixels, batches["timm"][0], batches["torchvision"][0]):
        assert (tuple(images.shape), str(images.dtype)) == ((4, 3, 16, 24), "torch.uint8")


def test_too_few_images(few_images, monkeypatch):
    monkeypatch.setattr(loading, "BATCH", 5)
    with pytest.raises(UserError, match="has 9 images; expected at least 10"):
        loading.measure_loading(str(few_images), (16, 16), repeats=1, warmup=0)
