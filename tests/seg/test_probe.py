"""`addp seg probe`: linear and k-NN probes of patch features of a frozen encoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_segmentation import CLASSES, user_error

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from addp_core.recipes.cli import main
from seg.probing.evaluation import enlarged_argmax, patch_miou
from seg.probing.features import patch_labels
from seg.scenes import find_pairs


def probe_command(scenes: Path, model: Path, out: Path, *settings: str) -> list[str]:
    """Return the arguments of a probe of the last block, with few steps; `settings` come last and win."""
    data = [f"data={scenes}", "data.size=32", "data.workers=0", "shard=8"]
    training = ["blocks=[-1]", "train.epochs=2", "train.batch=64", "k=3"]
    return ["seg", "probe", *data, f"model={model}", f"out={out}", *training, *settings]


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def probed(scenes, encoder_file, tmp_path_factory) -> Path:
    """The folder of a finished run of all blocks, with class maps."""
    out = tmp_path_factory.mktemp("probe") / "run"
    assert main(probe_command(scenes, encoder_file, out, "blocks=[]", "maps=true")) == 0
    return out


def test_results_of_each_block_and_probe(probed, capsys):
    results = results_of(probed)
    rows = [(row["block"], row["probe"]) for row in results["rows"]]
    assert rows == [(block, probe) for block in (1, 2, 3, 4) for probe in ("linear", "knn")]
    assert results["classes"] == CLASSES
    for probe, best in results["best"].items():
        assert best["held_out"] == max(row["held_out"] for row in results["rows"] if row["probe"] == probe)
    lines = (probed / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["mIoU"] for line in lines] == [row["mIoU"] for row in results["rows"]]
    assert all((probed / "images" / name).exists() for name in ("predictions.png", "blocks.png"))


def test_miou_is_that_of_seg_test(probed, scenes, tmp_path):
    """Of the class maps that the probe wrote, which have the annotations' own sizes."""
    for probe in ("linear", "knn"):
        out, row = tmp_path / probe, results_of(probed)["best"][probe]
        maps = probed / "maps" / f"block{row['block']}-{probe}"
        assert main(["seg", "test", f"predictions={maps}", f"data={scenes}", f"out={out}", "data.workers=0"]) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert all(metrics[name] == row[name] for name in ("mIoU", "mAcc", "aAcc"))
        assert metrics["constant_mIoU"] == results_of(probed)["constant_mIoU"]


def test_the_same_command_continues_and_computes_nothing_again(probed, scenes, encoder_file, tmp_path, capsys):
    out = Path(shutil.copytree(probed, tmp_path / "run"))
    for name in ("finished.json", "results.json", "probes/block2-linear.safetensors"):
        (out / name).unlink()
    shard = next(out.glob("features/train-*/00001.safetensors"))
    shard.unlink()
    others = {path: path.stat().st_mtime_ns for path in [*out.glob("features/*/*"), *out.glob("probes/*")]}
    command = probe_command(scenes, encoder_file, out, "blocks=[]", "maps=true")
    assert main(command) == 0
    assert shard.exists()
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())
    assert results_of(out) == results_of(probed)
    capsys.readouterr()
    assert main(command) == 0  # a finished run prints its table again
    assert "k-NN" in capsys.readouterr().out


def test_corrected_class_maps_are_noticed(scenes_copy, encoder_file, tmp_path, capsys):
    """Although their files are as large as before."""
    pairs = [pair for split in ("train", "val") for pair in find_pairs(scenes_copy, split)]
    labels = [np.array(Image.open(pair.class_map)) for pair in pairs]

    def write(swap: bool) -> None:
        for pair, each in zip(pairs, labels, strict=True):
            swapped = np.where(np.isin(each, [1, 2]), 3 - each, each) if swap else each
            Image.fromarray(swapped).save(pair.class_map, compress_level=0)

    write(swap=False)
    sizes = [pair.class_map.stat().st_size for pair in pairs]
    out, cache = tmp_path / "run", f"cache={tmp_path / 'cache'}"
    command = probe_command(scenes_copy, encoder_file, out, "mode=knn", cache)
    assert main(command) == 0
    before = results_of(out)
    write(swap=True)
    assert [pair.class_map.stat().st_size for pair in pairs] == sizes
    capsys.readouterr()
    assert main(command) == 0  # a finished run stays what it is, and says so
    assert "class maps of train: 12 images as before, but others, or with other labels" in capsys.readouterr().err
    assert results_of(out) == before
    assert main(probe_command(scenes_copy, encoder_file, tmp_path / "fresh", "mode=knn")) == 0
    expected = results_of(tmp_path / "fresh")["iou"]
    assert expected != before["iou"]
    for run in (out, tmp_path / "other"):
        (run / "finished.json").unlink(missing_ok=True)
        assert main(probe_command(scenes_copy, encoder_file, run, "mode=knn", cache)) == 0
        assert results_of(run)["iou"] == expected


def test_a_run_from_before_class_maps_were_recorded_continues(probed, scenes_copy, encoder_file, tmp_path, capsys):
    """Also if the dataset has moved: what is not recorded is not compared."""
    out = Path(shutil.copytree(probed, tmp_path / "run"))
    (out / "finished.json").unlink()
    inputs = json.loads((out / "inputs.json").read_text())
    inputs["datasets"] = {split: inputs["datasets"][split] for split in ("train", "val")}
    (out / "inputs.json").write_text(json.dumps(inputs))
    assert main(probe_command(scenes_copy, encoder_file, out, "blocks=[]", "maps=true")) == 0
    assert "changed" not in capsys.readouterr().err
    assert results_of(out)["rows"] == results_of(probed)["rows"]
    assert json.loads((out / "inputs.json").read_text())["datasets"].keys() > {"train", "val"}


def test_runs_with_another_seed_share_the_features(probed, scenes, encoder_file, tmp_path):
    cache = probed / "features"
    before = sorted(cache.glob("*/*"))
    settings = ["blocks=[]", "train.seed=1", "mode=linear", f"cache={cache}"]
    assert main(probe_command(scenes, encoder_file, tmp_path / "run", *settings)) == 0
    assert sorted(cache.glob("*/*")) == before
    assert set(results_of(tmp_path / "run")["best"]) == {"linear"}


@pytest.fixture
def colored_scenes(scenes_copy) -> Path:
    """Scenes in which the color of a pixel is that of its class, in blocks as large as patches."""
    colors = np.random.default_rng(0).integers(0, 256, (CLASSES + 1, 3), dtype=np.uint8)
    for number, pair in enumerate([*find_pairs(scenes_copy, "train"), *find_pairs(scenes_copy, "val")]):
        blocks = np.random.default_rng(number).integers(1, 5, (4, 4), dtype=np.uint8)
        labels = np.kron(blocks, np.ones((8, 8), np.uint8))
        Image.fromarray(labels).save(pair.class_map)
        Image.fromarray(colors[labels]).save(pair.image.with_suffix(".png"))
        pair.image.unlink()
    return scenes_copy


def test_probes_learn_what_the_features_tell(colored_scenes, encoder_file, tmp_path):
    """Even of random weights, the first block tells the color of a patch."""
    settings = ["blocks=[1]", "train.epochs=40", "train.batch=32", "train.held_out=0.2"]
    assert main(probe_command(colored_scenes, encoder_file, tmp_path / "run", *settings)) == 0
    results = results_of(tmp_path / "run")
    assert results["constant_mIoU"] < 10
    assert all(best["mIoU"] > 60 for best in results["best"].values())


def test_without_held_out_images_the_validation_images_choose(scenes, encoder_file, tmp_path):
    settings = ["train.held_out=0", "data.patches=5", "bank=20", "norm=layer", "store=float32"]
    assert main(probe_command(scenes, encoder_file, tmp_path / "run", *settings)) == 0
    results = results_of(tmp_path / "run")
    assert results["picked_by"] == "the validation images"
    assert results["trained_on"] <= 5 * 12
    assert "held_out" not in results["rows"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["blocks=[5]"], "blocks: found 5, expected 1 to 4"),
        (["blocks=[1,1]"], "blocks: found [1, 1], expected each value once"),
        (["data.size=36"], "data.size"),
        (["norm=pretrained"], "has no trained final norm"),
        (["train.held_out=0.999"], "train.held_out=0.999: leaves none of the"),
        (["k=0"], "k"),
    ],
)
def test_wrong_settings_are_one_line(scenes, encoder_file, tmp_path, capsys, settings, message):
    assert message in user_error(capsys, *probe_command(scenes, encoder_file, tmp_path / "run", *settings))
    assert not [*tmp_path.rglob("*.safetensors")]  # before any feature is computed


def test_an_unreadable_image_is_named(scenes_copy, encoder_file, tmp_path, capsys):
    path = find_pairs(scenes_copy, "train")[3].class_map
    path.write_bytes(path.read_bytes()[:60])
    for workers in (0, 1):
        command = probe_command(scenes_copy, encoder_file, tmp_path / "run", "data.check=0", f"data.workers={workers}")
        assert str(path) in user_error(capsys, *command)


def test_patches_have_the_class_of_most_of_their_pixels():
    class_map = np.array([[1, 1, 255, 255], [1, 3, 255, 0], [2, 2, 4, 4], [0, 2, 4, 4]], np.uint8)
    assert patch_labels(class_map, (2, 2)).tolist() == [1, 255, 2, 4]


def test_classes_are_enlarged_in_parts_as_at_once():
    scores = torch.randn(37, 3, 5)
    at_once = torch.nn.functional.interpolate(scores[None], (17, 31), mode="bilinear")[0].argmax(0)
    assert torch.equal(enlarged_argmax(scores, (17, 31)), at_once)


def test_miou_of_patches():
    predicted, labels = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 255])
    assert patch_miou(predicted, labels, 4) == pytest.approx(50)
