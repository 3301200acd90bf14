"""`addp evaluate`: the numbers are torch-fidelity's, a reference is looked at once, and every mistake is named."""

import json
import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_addp

from addp_core import load_encoder, save_model
from addp_core.networks.classifier import Classifier
from addp_core.recipes.cli import main

fidelity = pytest.importorskip("torch_fidelity", reason="needs torch-fidelity: pip install 'addp[gen]'")
HW = (24, 32)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)


def write(folder: Path, images: list[np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def photographs(n: int, seed: int) -> list[np.ndarray]:
    """Smooth pictures."""
    rng = np.random.default_rng(seed)
    small = (Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)) for _ in range(n))
    return [np.array(image.resize(HW[::-1], Image.Resampling.BICUBIC)) for image in small]


def noise(n: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, *HW, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Folders of pictures, a small generator in `model` and a small classifier in `classifier`."""
    root = tmp_path_factory.mktemp("room")
    write(root / "a", photographs(10, 1))
    write(root / "b", photographs(8, 2))
    write(root / "noise", noise(6))
    save_model(tiny_addp(HW), root / "model.safetensors")
    torch.manual_seed(0)
    classifier = Classifier(load_encoder("tiny", HW, init="random", patch_size=8), classes=3)
    torch.nn.init.normal_(classifier.head.weight, std=0.5)
    save_model(classifier, root / "classifier.safetensors")
    return root


def evaluate(room: Path, out: Path, *more: str) -> list[str]:
    """Arguments; with the classifier, which costs little."""
    keys = {"reference": room / "b", "extractor": room / "classifier.safetensors", "cache": out.parent / "cache"}
    keys |= {"out": out, "is_splits": 2, "workers": 0}
    keys |= dict(setting.split("=", 1) for setting in more)
    return ["evaluate", *(f"{key}={value}" for key, value in keys.items() if value != "-")]


def rows(out: Path) -> list[dict]:
    return json.loads((out / "evaluation.json").read_text())["rows"]


def wrong(capsys, arguments: list[str], *words: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


# -------------------- the numbers


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """Weights of the right layout, drawn so that features differ between pictures."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    model = Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_numbers_equal_torch_fidelity(room, inception, tmp_path, capsys):
    keys = {"images": room / "a", "inception": inception, "kid_subset": 6, "extractor": "-"}
    assert main(evaluate(room, tmp_path / "out", *(f"{k}={v}" for k, v in keys.items()))) == 0
    (ours,) = rows(tmp_path / "out")
    sets = {"input1": str(room / "a"), "input2": str(room / "b"), "feature_extractor": "inception-v3-compat"}
    metrics = dict.fromkeys(("fid", "isc", "kid", "prc"), True)
    options = {"isc_splits": 2, "kid_subset_size": 6, "batch_size": 10, "save_cpu_ram": True}
    theirs = fidelity.calculate_metrics(
        **sets, **metrics, **options, feature_extractor_weights_path=inception, cuda=False, cache=False, verbose=False
    )
    pairs = {
        "fid": "frechet_inception_distance",
        "is_mean": "inception_score_mean",
        "is_std": "inception_score_std",
        "kid_mean": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    for mine, their in pairs.items():
        assert ours[mine] == pytest.approx(theirs[their], rel=1e-4, abs=1e-4), mine
    said = capsys.readouterr().out
    assert "FID" in said
    assert "Inception-v3" in said


def test_classifier_numbers_equal_torch_fidelity_and_are_not_called_fid(room, tmp_path, capsys):
    assert main(evaluate(room, tmp_path / "out", f"images={room / 'a'}", "kid_subset=6")) == 0
    (ours,) = rows(tmp_path / "out")
    theirs = fidelity.calculate_metrics(
        input1=str(room / "a"),
        input2=str(room / "b"),
        feature_extractor="addp-classifier",
        feature_extractor_weights_path=str(room / "classifier.safetensors"),
        **dict.fromkeys(("fid", "isc", "kid", "prc"), True),
        **{"isc_splits": 2, "kid_subset_size": 6, "save_cpu_ram": True, "cuda": False, "cache": False},
        verbose=False,
    )
    pairs = {"fd": "frechet_inception_distance", "cs_mean": "inception_score_mean", "precision": "precision"}
    pairs |= {"recall": "recall", "kd_mean": "kernel_inception_distance_mean"}
    for mine, their in pairs.items():
        assert ours[mine] == pytest.approx(theirs[their], rel=1e-4, abs=1e-4), mine
    said = capsys.readouterr().out
    assert "not Inception" in said
    table = said.split("\n\n")[1]
    assert not {"FID", "IS", "KID"} & set(table.split())
    assert not {"fid", "is_mean", "kid_mean"} & ours.keys()


def test_the_same_images_are_at_no_distance_and_it_is_said(room, tmp_path, capsys):
    assert main(evaluate(room, tmp_path / "out", f"images={room / 'b'}")) == 0
    (row,) = rows(tmp_path / "out")
    assert abs(row["fd"]) < 1e-3
    assert row["precision"] == row["recall"] == 1
    assert "holds the very images that are measured" in capsys.readouterr().err
    (kept,) = (tmp_path / "cache").iterdir()
    assert main(evaluate(room, tmp_path / "out", f"images={room / 'b'}", f"reference={kept}")) == 0
    assert "holds the very images that are measured" in capsys.readouterr().err
    assert main(evaluate(room, tmp_path / "out", f"images={room / 'a'}", f"reference={kept}")) == 0
    assert "holds the very images" not in capsys.readouterr().err


def test_a_reference_that_was_generated_is_its_images_alone(room, tmp_path, capsys):
    folder = write(tmp_path / "generated", photographs(6, 7))
    (folder / "weights.txt").write_text("as addp generate leaves it")
    Image.fromarray(noise(1)[0]).save(folder / "grid.png")
    assert main(evaluate(room, tmp_path / "out", f"images={folder}", f"reference={folder}")) == 0
    assert "holds the very images that are measured" in capsys.readouterr().err
    assert abs(rows(tmp_path / "out")[0]["fd"]) < 1e-3


@pytest.mark.slow
def test_noise_and_photographs_share_nothing(room, inception, tmp_path):
    keys = [f"images={room / 'noise'}", f"inception={inception}", "extractor=-"]
    assert main(evaluate(room, tmp_path / "out", *keys)) == 0
    (row,) = rows(tmp_path / "out")
    assert row["precision"] == row["recall"] == 0
    assert row["fid"] > 1


def test_statistics_do_not_depend_on_the_chunk(room, tmp_path, monkeypatch):
    """What is in memory at a time changes nothing: more images need no more of it."""
    assert main(evaluate(room, tmp_path / "one", f"images={room / 'a'}")) == 0
    monkeypatch.setattr("gen.features.ROWS", 3)
    monkeypatch.setattr("gen.features.AT_ONCE", 5)
    monkeypatch.setattr("gen.metrics.DISTANCES", 30)
    again = evaluate(room, tmp_path / "two", f"images={room / 'a'}", f"cache={tmp_path / 'other'}")
    assert main(again) == 0
    one, two = rows(tmp_path / "one")[0], rows(tmp_path / "two")[0]
    assert [two[key] for key in one if key != "name"] == pytest.approx([one[key] for key in one if key != "name"])


# -------------------- the reference


def test_a_reference_is_looked_at_once_and_again_when_it_changes(room, tmp_path, capsys):
    reference = write(tmp_path / "reference", photographs(8, 3))
    arguments = evaluate(room, tmp_path / "out", f"images={room / 'a'}", f"reference={reference}")
    assert main(arguments) == 0
    before = rows(tmp_path / "out")
    assert "features kept in" in capsys.readouterr().err
    reference = reference.rename(tmp_path / "moved")  # what counts is what is in it
    arguments = evaluate(room, tmp_path / "out", f"images={room / 'a'}", f"reference={reference}")
    assert main(arguments) == 0
    assert "features found in" in capsys.readouterr().err
    assert rows(tmp_path / "out") == before
    (kept,) = (path for path in (tmp_path / "cache").iterdir())
    assert main([f"reference={kept}" if a.startswith("reference") else a for a in arguments]) == 0
    assert rows(tmp_path / "out") == before
    Image.fromarray(noise(1)[0]).save(reference / "000.png")
    assert main(arguments) == 0
    assert "features kept in" in capsys.readouterr().err
    assert rows(tmp_path / "out") != before


def test_two_starts_fill_the_cache_at_once(room, tmp_path, monkeypatch):
    """The second one comes while the first extracts, and is done before it."""
    from gen import features

    arguments = evaluate(room, tmp_path / "one", f"images={room / 'a'}")
    extract, second = features.extract, [[f"out={tmp_path / 'two'}" if a.startswith("out=") else a for a in arguments]]

    def meanwhile(*arguments):
        found = extract(*arguments)
        if second:
            assert main(second.pop()) == 0
        return found

    monkeypatch.setattr(features, "extract", meanwhile)
    cache = tmp_path / "cache"
    for name in (".tmp-left", ".tmp-now"):
        (cache / name).mkdir(parents=True)
    os.utime(cache / ".tmp-left", (0, 0))  # by a start that was killed, long ago
    assert main(arguments) == 0
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    (kept,) = (path for path in cache.iterdir() if path.name != ".tmp-now")
    assert {path.name for path in kept.iterdir()} >= {"about.json", "features.npy"}


def test_a_reference_of_other_sizes_is_cropped_to_that_of_the_images(room, tmp_path):
    rng = np.random.default_rng(0)
    big = [rng.integers(0, 256, (60 + i, 70, 3), dtype=np.uint8) for i in range(6)]
    imagenet = tmp_path / "imagenet"
    write(imagenet / "val" / "cat", big[:3])
    write(imagenet / "val" / "dog", big[3:])
    write(imagenet / "train" / "cat", big[:1])
    assert main(evaluate(room, tmp_path / "out", f"images={room / 'a'}", f"reference={imagenet}")) == 0
    (kept,) = (tmp_path / "cache").iterdir()
    about = json.loads((kept / "about.json").read_text())
    assert about["images"] == 6
    assert about["size"] == list(HW)


def test_statistics_of_others_give_the_distance_alone(room, tmp_path, capsys):
    assert main(evaluate(room, tmp_path / "out", f"images={room / 'a'}")) == 0
    (kept,) = (tmp_path / "cache").iterdir()
    file = tmp_path / "theirs.npz"
    np.savez(file, mu=np.load(kept / "mean.npy"), sigma=np.load(kept / "covariance.npy"))
    distance = rows(tmp_path / "out")[0]["fd"]
    assert main(evaluate(room, tmp_path / "out", f"images={room / 'a'}", f"reference={file}")) == 0
    (row,) = rows(tmp_path / "out")
    assert row["fd"] == pytest.approx(distance)
    assert "precision" not in row
    np.savez(file, mu=np.zeros(7), sigma=np.eye(7))
    wrong(capsys, evaluate(room, tmp_path / "out", f"images={room / 'a'}", f"reference={file}"), "mu (7,)")
    file.write_bytes(b"nothing")
    wrong(
        capsys, evaluate(room, tmp_path / "out", f"images={room / 'a'}", f"reference={file}"), "expected mu and sigma"
    )


# -------------------- generating


def test_sampling_settings_in_one_table(room, tmp_path, capsys):
    sweep = ["sweep.steps=[1,3]", "sweep.order=[confidence,halton]", "sampling.top_k=5", "n=6", "batch=2"]
    arguments = evaluate(room, tmp_path / "out", f"model={room / 'model.safetensors'}", *sweep)
    assert main(arguments) == 0
    found = rows(tmp_path / "out")
    names = ["cosine-1-t6-k5", "cosine-1-halton-k5", "cosine-3-t6-k5", "cosine-3-halton-k5"]
    assert [row["name"] for row in found] == names
    assert [row["sampling"]["order"] for row in found] == ["confidence", "halton"] * 2
    assert found[2]["fd"] != found[3]["fd"]
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.out.splitlines()[-4:]] == [[name, "6"] for name in names]
    image = tmp_path / "out" / names[2] / "000003.png"
    before = image.stat().st_mtime_ns
    (tmp_path / "out" / names[2] / "000004.png").unlink()
    assert main(arguments) == 0  # what is there stays
    assert image.stat().st_mtime_ns == before
    assert rows(tmp_path / "out") == found
    # the folder of a row is one of `addp generate`, and is measured alike
    assert main(evaluate(room, tmp_path / "again", f"images={image.parent}")) == 0
    assert rows(tmp_path / "again")[0]["fd"] == found[2]["fd"]


# -------------------- mistakes


def test_mistakes_are_named(room, tmp_path, capsys):
    images, out = f"images={room / 'a'}", tmp_path / "out"
    model = f"model={room / 'model.safetensors'}"
    wrong(capsys, evaluate(room, out, model, "n=0"), "n", "expected a whole number >= 1")
    wrong(capsys, evaluate(room, out, model, "n=6", "is_splits=10"), "is_splits: 10 parts of 6 images")
    wrong(capsys, evaluate(room, out, images, "is_splits=50"), "is_splits: 50 parts of 10 images")
    wrong(capsys, evaluate(room, out, model, "n=3"), "3 of them", "more than 3")
    wrong(capsys, evaluate(room, out), "images, model", "expected one of them")
    wrong(capsys, evaluate(room, out, images, "sweep.steps=[1]"), "sweep: needs model=")
    wrong(capsys, evaluate(room, out, f"images={tmp_path / 'nowhere'}"), "addp: images: ", "does not exist")
    wrong(capsys, evaluate(room, out, images, f"extractor={room / 'model.safetensors'}"), "expected a classifier")
    few = write(tmp_path / "few", photographs(3, 4))
    wrong(capsys, evaluate(room, out, images, f"reference={few}"), "reference: 3 of them")
    nowhere = f"reference={tmp_path / 'nowhere'}"
    wrong(capsys, evaluate(room, out, images, nowhere), "addp: reference: ", "does not exist")
    (tmp_path / "file").write_text("")
    wrong(capsys, evaluate(room, out, images, f"cache={tmp_path / 'file'}"), "addp: cache: ", "cannot be written")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "weights.txt").write_text("no image yet")
    wrong(capsys, evaluate(room, out, f"images={tmp_path / 'begun'}"), "addp: images: ", "begun is empty")


def test_without_inception_the_way_out_is_said(room, tmp_path, capsys):
    without = evaluate(room, tmp_path / "out", f"images={room / 'a'}", "extractor=-")
    wrong(capsys, without, "no network", "inception=<that file>", "addp finetune")
    torch.save({"fc.weight": torch.zeros(10, 3)}, tmp_path / "other.pth")
    wrong(capsys, [*without, f"inception={tmp_path / 'other.pth'}"], "another layout than torch-fidelity's")
    wrong(capsys, [*without, f"inception={tmp_path / 'none.pth'}"], "none.pth")


def test_broken_and_odd_images_are_named(room, tmp_path, capsys):
    folder = write(tmp_path / "images", photographs(6, 5))
    Image.new("RGB", (40, 24)).save(folder / "003.png")
    wrong(capsys, evaluate(room, tmp_path / "out", f"images={folder}"), "003.png", "40 x 24", "others have 32 x 24")
    (folder / "003.png").write_bytes(b"no image")
    wrong(capsys, evaluate(room, tmp_path / "out", f"images={folder}"), "003.png", "repair or remove it")
    wrong(capsys, evaluate(room, tmp_path / "out", f"images={room / 'a'}", f"reference={folder}"), "003.png")
