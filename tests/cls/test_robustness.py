"""`addp robustness`: metrics match hand-computed ones, and nothing is evaluated twice."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from addp_core.data.corruptions import CORRUPTIONS, SEVERITIES, apply_corruption
from addp_core.data.images import LazyImage, eval_transform
from addp_core.data.sources import ImageSource, open_source
from addp_core.networks.classifier import Classifier, normalize
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main
from addp_core.weights.saving import save_model
from cls.variants import classes, evaluation
from cls.variants.generated import CorruptedImages
from cls.variants.mce import corruption_errors
from tools.toy import toy

DIGITS = tuple("0123456789")
# AlexNet's mean errors, in the order of CORRUPTIONS
ALEXNET = [0.886428, 0.894468, 0.92264, 0.81988, 0.826268, 0.785948, 0.79836, 0.866816, 0.826572, 0.819324]
ALEXNET += [0.564592, 0.853204, 0.646056, 0.71784, 0.6065]


def classifier(classes: int = 10, names: tuple[str, ...] = DIGITS, bias: dict[int, float] | None = None) -> Classifier:
    """Of random weights; with `bias` it says the same of every image."""
    torch.manual_seed(0)
    model = Classifier(Encoder(EncoderConfig(16, 2, 2), (24, 24), 8), classes, class_names=names).eval()
    torch.nn.init.normal_(model.head.weight, std=0.0 if bias else 0.5)
    for logit, value in (bias or {}).items():
        model.head.bias.data[logit] = value
    return model


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Toy sets, a classifier of digits, and one that always prefers 1 to 0 to the rest."""
    root = tmp_path_factory.mktemp("room")
    sets = ["imagenet", "imagenet-a", "imagenet-r", "sketch", "imagenet-c"]
    toy.run(toy.Recipe(str(root), only=sets, size=32, imagenet_train=10, imagenet_val=20, variants=12, corrupted=2))
    save_model(classifier(), root / "model.safetensors")
    save_model(classifier(bias={1: 2.0, 0: 1.0}), root / "constant.safetensors")
    return root


def command(room: Path, out: Path, *sets: str, **more: object) -> list[str]:
    folders = {"val": "imagenet", "imagenet_a": "imagenet-a", "imagenet_r": "imagenet-r", "imagenet_c": "imagenet-c"}
    keys = {"model": room / "model.safetensors", "out": out, "workers": 0}
    keys |= {key: room / folders.get(key, key) for key in sets} | more
    return ["robustness", *(f"{key}={value}" for key, value in keys.items())]


def results(out: Path) -> dict[str, dict]:
    report = json.loads((out / "results.json").read_text())
    return {row["key"]: row for row in report["rows"]} | {"average": report["average"]}


def wrong(capsys, arguments: list[str], *words: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), "teal").save(path)


# -------------------- figures


def test_all_sets_and_their_average(room, tmp_path, capsys):
    out = tmp_path / "out"
    sets = ("val", "imagenet_a", "imagenet_r", "sketch", "imagenet_c")
    assert main(command(room, out, *sets)) == 0
    table = capsys.readouterr().out
    found = results(out)
    assert [(found[key]["images"], found[key]["classes"]) for key in sets] == [
        (20, 10),
        (12, 6),
        (12, 6),
        (12, 10),
        (150, 10),
    ]
    four = [found[key]["top1"] for key in sets[1:4]] + [100 - found["imagenet_c"]["mce"]]
    assert found["average"] == pytest.approx(np.mean(four))
    assert (out / "robustness.md").read_text() == table
    assert f"{found['average']:.1f}" in table
    assert "generated" not in table
    with (out / "robustness.csv").open() as file:
        rows = {row["set"]: row for row in csv.DictReader(file)}
    assert float(rows["ImageNet-A"]["top1"]) == pytest.approx(four[0])

    model, source = classifier(), open_source(str(room / "imagenet"), "val")
    pixels = torch.stack([eval_transform(24, 0.875)(source.open_image(i)[0]) for i in range(20)])
    answers = model(normalize(pixels, model.mean, model.std)).argmax(1)
    right = sum(int(answer) == source.read(i)[1] for i, answer in enumerate(answers))
    assert found["val"]["top1"] == pytest.approx(100 * right / 20)


def test_only_the_classes_of_imagenet_a_and_r_compete(room, tmp_path):
    """The classifier prefers 1, which imagenet-a does not hold: there it says 0, and is right on the zeros."""
    keys = {"model": room / "constant.safetensors"}
    assert main(command(room, tmp_path, "val", "imagenet_a", "imagenet_r", "sketch", **keys)) == 0
    found = results(tmp_path)
    zeros, ones = (len(list((room / name).glob("*"))) for name in ("imagenet-a/0", "imagenet-r/1"))
    assert found["imagenet_a"]["top1"] == pytest.approx(100 * zeros / 12) != 0
    assert found["imagenet_r"]["top1"] == pytest.approx(100 * ones / 12)
    assert found["val"]["top1"] == pytest.approx(10)
    assert found["average"] is None


def test_mce_of_a_made_up_error_table(room, tmp_path, capsys):
    """A classifier that always says 1, on pictures of which as many are 0 as there shall be errors.

    The corruptions lie in groups, as the published archives unpack.
    """
    groups = ["noise"] * 3 + ["blur"] * 4 + ["weather"] * 4 + ["digital"] * 4
    table = np.random.default_rng(0).integers(0, 4, (15, 5))
    for row, name in enumerate(CORRUPTIONS):
        for severity in SEVERITIES:
            for i in range(3):
                label = "0" if i < table[row, severity - 1] else "1"
                picture(tmp_path / "c" / groups[row] / name / str(severity) / label / f"{i}.png")
            for label in "01":
                (tmp_path / "c" / groups[row] / name / str(severity) / label).mkdir(exist_ok=True)
    keys = {"model": room / "constant.safetensors", "imagenet_c": tmp_path / "c"}
    assert main(command(room, tmp_path / "out", **keys)) == 0
    found = results(tmp_path / "out")["imagenet_c"]
    by_hand = np.mean([sum(errors / 3) / (5 * alexnet) for errors, alexnet in zip(table, ALEXNET, strict=True)])
    assert found["mce"] == pytest.approx(100 * by_hand)
    assert found["score"] == pytest.approx(100 - 100 * by_hand)
    assert list(found["corruptions"]) == list(CORRUPTIONS)
    snow = found["corruptions"]["snow"]
    assert [snow["errors"][str(s)] for s in SEVERITIES] == pytest.approx([100 * e / 3 for e in table[7]])
    assert snow["ce"] == pytest.approx(100 * sum(table[7] / 3) / (5 * 0.866816))
    assert f"{found['mce']:.1f}" in capsys.readouterr().out


def test_alexnet_itself_has_an_mce_of_one():
    errors = {name: dict.fromkeys(SEVERITIES, error) for name, error in zip(CORRUPTIONS, ALEXNET, strict=True)}
    assert [row["ce"] for row in corruption_errors(errors).values()] == pytest.approx([100] * 15)


# -------------------- classes


@pytest.mark.parametrize(("key", "letter"), [("imagenet_a", "a"), ("imagenet_r", "r")])
@pytest.mark.parametrize("numbered", [False, True])
def test_a_model_that_names_no_classes_has_imagenets(key, letter, numbered):
    names = classes.logit_names(classifier(1000, tuple(map(str, range(1000))) if numbered else ()))
    lists = Path(timm.data.__file__).parent / "_info"
    wanted = sorted(map(int, (lists / f"imagenet_{letter}_indices.txt").read_text().split()))
    folders = sorted((lists / f"imagenet_{letter}_synsets.txt").read_text().split())
    assert classes.competing_logits(key, "folder", folders, names) == wanted
    assert sorted(classes.match_classes(key, "folder", folders, names)) == wanted
    assert classes.competing_logits(key, "folder", folders[:3], names) == wanted  # a part of the set is no easier
    assert classes.competing_logits("sketch", "folder", folders, names) == list(range(1000))


def test_classes_in_another_order_are_matched_by_name(room, tmp_path):
    model = classifier()
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    other = classifier(names=tuple(str(i) for i in order))
    other.head.weight.data, other.head.bias.data = model.head.weight[order].data, model.head.bias[order].data
    save_model(other, tmp_path / "other.safetensors")
    sets = ("val", "imagenet_a", "sketch")
    assert main(command(room, tmp_path / "a", *sets)) == 0
    assert main(command(room, tmp_path / "b", *sets, model=tmp_path / "other.safetensors")) == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")


def test_a_list_of_numbers_is_of_the_models_classes(room, tmp_path, capsys):
    """ImageNet-A as `meta/val.txt` and flat images, numbered as the model's logits: the published 200 compete."""
    indices = (Path(timm.data.__file__).parent / "_info" / "imagenet_a_indices.txt").read_text().split()
    labels = sorted(map(int, indices))[:2]
    strange = next(label for label in range(1000) if str(label) not in indices)
    root = tmp_path / "a"
    for name in "xy":
        picture(root / "val" / f"{name}.png")
    (root / "meta").mkdir()
    (root / "meta" / "val.txt").write_text(f"x.png {labels[0]}\ny.png {labels[1]}\n")
    save_model(classifier(1000, (), bias={strange: 2.0, labels[1]: 1.0}), tmp_path / "model.safetensors")
    keys = {"model": tmp_path / "model.safetensors", "imagenet_a": root}
    assert main(command(room, tmp_path / "out", **keys)) == 0
    found = results(tmp_path / "out")["imagenet_a"]
    assert (found["images"], found["classes"], found["top1"]) == (2, 200, 50)
    (root / "meta" / "val.txt").write_text(f"x.png {labels[0]}\ny.png {strange}\n")
    wrong(capsys, command(room, tmp_path / "out", **keys), "imagenet_a", "not among the 200 classes of ImageNet-A")


# -------------------- continuing


def test_a_killed_run_repeats_nothing(room, tmp_path, monkeypatch):
    measured, compute_outputs = [], evaluation.compute_outputs

    def counted(*args, title, **options):
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append(title)
        return compute_outputs(*args, title=title, **options)

    monkeypatch.setattr(evaluation, "compute_outputs", counted)
    for name in ("fog", "frost"):
        shutil.copytree(room / "imagenet-c" / name, tmp_path / "c" / name)
    keys = {"imagenet_c": tmp_path / "c", "allow_missing": "true"}
    arguments = command(room, tmp_path / "out", "sketch", **keys)
    stop = 4
    assert main(arguments) == 1
    assert len(measured) == 4
    assert not (tmp_path / "out" / "results.json").exists()
    stop = 1000
    assert main(arguments) == 0
    assert len(measured) == len(set(measured)) == 11
    assert main(command(room, tmp_path / "once", "sketch", **keys)) == 0
    assert results(tmp_path / "once") == results(tmp_path / "out")
    before = len(measured)
    assert main(arguments) == 0
    assert len(measured) == before
    other = {"model": room / "constant.safetensors"}
    assert main(command(room, tmp_path / "out", "sketch", **other)) == 0  # other weights are another result
    assert main(command(room, tmp_path / "out", "sketch", crop=0.5)) == 0
    assert len(measured) == before + 2


@pytest.mark.slow
def test_two_processes_share_the_images(room, tmp_path):
    arguments = command(room, tmp_path / "two", "val", "imagenet_a")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*torchrun, "-m", "addp_core", *arguments], check=True, env=environment, capture_output=True)
    assert main(command(room, tmp_path / "one", "val", "imagenet_a")) == 0
    assert results(tmp_path / "two") == results(tmp_path / "one")


# -------------------- what is missing


def test_a_missing_severity_is_named(room, tmp_path, capsys):
    root = tmp_path / "c"
    shutil.copytree(room / "imagenet-c", root)
    shutil.rmtree(root / "frost" / "3")
    (root / "snow").rename(root / "snwo")
    keys = {"imagenet_c": root}
    wrong(capsys, command(room, tmp_path / "out", **keys), "imagenet_c", "frost 3", "snow (all severities)", "'snwo'")
    assert not (tmp_path / "out").exists()
    for name in set(CORRUPTIONS) - {"frost", "fog", "snow"}:
        shutil.rmtree(root / name)
    assert main(command(room, tmp_path / "out", **keys, allow_missing="true")) == 0
    table = capsys.readouterr().out
    assert "9 of 75" in table
    assert "snow (all severities)" in table
    assert "; frost 3" in table
    found = results(tmp_path / "out")["imagenet_c"]
    assert list(found["corruptions"]["frost"]["errors"]) == ["1", "2", "4", "5"]
    assert found["mce"] == pytest.approx(np.mean([row["ce"] for row in found["corruptions"].values()]))
    shutil.rmtree(root)
    wrong(capsys, command(room, tmp_path / "out", **keys), str(root), "does not exist")
    root.mkdir()
    wrong(capsys, command(room, tmp_path / "out", **keys, allow_missing="true"), "lacks")


def test_a_severity_without_some_classes_is_named(room, tmp_path, capsys, caplog):
    root, keys = tmp_path / "c", {"imagenet_c": tmp_path / "c"}
    shutil.copytree(room / "imagenet-c", root)
    gone = root / "fog" / "4" / "1"
    shutil.rmtree(gone)
    wrong(capsys, command(room, tmp_path / "out", **keys), str(gone.parent), "lacks class folder '1'", "allow_missing")
    for name in set(CORRUPTIONS) - {"fog"}:
        shutil.rmtree(root / name)
    assert main(command(room, tmp_path / "out", **keys, allow_missing="true")) == 0
    assert f"{gone.parent} lacks class folder '1'" in caplog.text


def test_labels_without_a_class(room, tmp_path, capsys, monkeypatch):
    """Told at the start by a set that knows its labels, else with the image that has one."""

    class Late(ImageSource):
        """Says its labels with its images alone, the last of which has none."""

        classes = DIGITS

        def __init__(self, labels=None):
            self.labels = labels

        def __len__(self):
            return 3

        def name(self, index):
            return f"set[{index}]"

        def open_image(self, index):
            return LazyImage(Image.new("RGB", (24, 24), "teal")), 1 - index

    for labels, said in ((None, "set[2]: found label -1, expected 0 to 9"), ([1, 0, -1], "has label -1")):
        source = Late(labels if labels is None else np.array(labels))
        monkeypatch.setattr(evaluation, "open_source", lambda *_, source=source: source)
        for key in ("val", "imagenet_a"):
            wrong(capsys, command(room, tmp_path / "out", key), said)


def test_a_model_brings_the_crop_that_it_was_validated_with(room, tmp_path):
    model = classifier()
    model.crop = 0.5
    save_model(model, tmp_path / "model.safetensors")
    own = {"model": tmp_path / "model.safetensors"}
    assert main(command(room, tmp_path / "own", "val", **own)) == 0
    assert main(command(room, tmp_path / "stated", "val", crop=0.5)) == 0
    assert main(command(room, tmp_path / "whole", "val", **own, crop=1)) == 0
    cells = [set(json.loads((tmp_path / name / "cells.json").read_text())) for name in ("own", "stated", "whole")]
    assert cells[0] == cells[1] != cells[2]


def test_what_cannot_be_measured_is_said_at_once(room, tmp_path, capsys):
    out = tmp_path / "out"
    wrong(capsys, command(room, out), "no dataset given", "imagenet_a=")
    wrong(capsys, command(room, out, "imagenet_c", corrupt=room / "imagenet"), "imagenet_c, corrupt", "both")
    save_model(classifier().encoder, tmp_path / "encoder.safetensors")
    wrong(capsys, command(room, out, "sketch", model=tmp_path / "encoder.safetensors"), "encoder", "finetune")
    wrong(capsys, command(room, out, sketch=tmp_path / "nowhere"), "sketch:", "does not exist")

    save_model(classifier(3, ("tench", "goldfish", "shark")), tmp_path / "fish.safetensors")
    picture(tmp_path / "sketch" / "goldfisch" / "0.png")
    keys = {"model": tmp_path / "fish.safetensors"}
    wrong(capsys, command(room, out, **keys, sketch=tmp_path / "sketch"), "'goldfisch'", "did you mean 'goldfish'")
    shutil.copytree(room / "imagenet-c", tmp_path / "c")
    picture(tmp_path / "c" / "fog" / "4" / "goldfish" / "0.png")
    wrong(capsys, command(room, out, imagenet_c=tmp_path / "c"), "'goldfish'", os.sep.join(["fog", "4"]))

    picture(tmp_path / "flat" / "0.png")
    wrong(capsys, command(room, out, sketch=tmp_path / "flat"), "sketch:", "no class folders")
    for name in "ab":
        picture(tmp_path / "listed" / "val" / f"{name}.png")
    (tmp_path / "listed" / "meta").mkdir()
    (tmp_path / "listed" / "meta" / "val.txt").write_text("a.png 12\nb.png 3\n")
    wrong(capsys, command(room, out, val=tmp_path / "listed"), "val:", "label 12", "0 to 9")

    only_r = sorted(set(classes.published_classes("imagenet_r")) - set(classes.published_classes("imagenet_a")))
    for name in (only_r[0], classes.published_classes("imagenet_a")[0]):
        picture(tmp_path / "mixed" / name / "0.png")
    save_model(classifier(1000, ()), tmp_path / "imagenet.safetensors")
    keys = {"model": tmp_path / "imagenet.safetensors", "imagenet_a": tmp_path / "mixed"}
    wrong(capsys, command(room, out, **keys), "imagenet_a", only_r[0], "not among the 200 classes")
    assert not out.exists()

    (tmp_path / "sketch" / "goldfisch" / "1.png").write_text("no picture")
    (tmp_path / "sketch" / "goldfisch").rename(tmp_path / "sketch" / "goldfish")
    keys = {"model": tmp_path / "fish.safetensors", "sketch": tmp_path / "sketch", "max_errors": 0}
    wrong(capsys, command(room, out, **keys), "1.png", "raise max_errors")
    out.joinpath("cells.json").write_text("{")
    wrong(capsys, command(room, out, "sketch"), "cells.json", "damaged")


# -------------------- corruptions made here


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """float[112,112,3] in [0,1]"""
    whole = Image.fromarray(load_sample_image("china.jpg"))
    return np.asarray(whole.resize((112, 112), Image.Resampling.BICUBIC, box=(100, 0, 527, 427))) / 255


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_repeat_and_grow(name, photograph):
    clean, away = photograph, []
    for severity in SEVERITIES:
        found, again = (apply_corruption(clean, name, severity, np.random.default_rng(0)) for _ in range(2))
        assert found.shape == clean.shape
        assert 0 <= found.min() <= found.max() <= 1
        assert (found == again).all()
        away.append(np.abs(found - clean).mean())
    assert away[0] > 0.01
    if name == "elastic_transform":  # as published: two warps, then three of ripples
        assert away[0] < away[1]
        assert away[2] < away[3] < away[4]
    else:
        assert away[0] < away[2] < away[4]


def test_lengths_scale_with_the_picture(photograph):
    """A picture of half the size looks like the corrupted one, halved."""
    clean = np.repeat(np.repeat(photograph, 2, 0), 2, 1)
    for name in ("defocus_blur", "motion_blur", "zoom_blur"):
        large = apply_corruption(clean, name, 4, np.random.default_rng(0))
        small = apply_corruption(clean.reshape(112, 2, 112, 2, 3).mean((1, 3)), name, 4, np.random.default_rng(0))
        assert np.abs(large.reshape(112, 2, 112, 2, 3).mean((1, 3)) - small).mean() < 0.01, name


def test_an_image_is_corrupted_by_seed_and_index_alone(room):
    source = open_source(str(room / "imagenet"), "val")

    def pixels(index: int, seed: int = 0, severity: int = 3, hw: tuple[int, int] = (24, 24)) -> np.ndarray:
        made = CorruptedImages(source, hw, "gaussian_noise", severity, seed)
        return np.asarray(made.open_image(index)[0].decode()).astype(int)

    assert (pixels(5) == pixels(5)).all()
    different = [pixels(5, seed=1), pixels(6), pixels(5, severity=4)]
    assert all(np.abs(pixels(5) - other).mean() > 5 for other in different)
    assert pixels(0, hw=(448, 672)).shape == (224, 336, 3)  # as ImageNet-C holds pictures, whatever the model sees


@pytest.mark.parametrize("side", [224, 384])
def test_generated_pictures_are_cropped_as_imagenet_c(side, tmp_path):
    """Resized to 256 and cropped to 224, also where the model's own images are whole squares: no frame is left."""
    framed = Image.new("RGB", (200, 200), "red")
    framed.paste("teal", (8, 8, 192, 192))
    (tmp_path / "0").mkdir()
    framed.save(tmp_path / "0" / "0.png")
    made = CorruptedImages(open_source(str(tmp_path)), (side, side), "brightness", 1, 0).open_image(0)[0]
    pixels = np.asarray(made.decode()).astype(int)
    assert pixels.shape == (224, 224, 3)
    assert np.abs(pixels - pixels[0, 0]).max() < 10


def test_generated_corruptions_are_called_so(room, tmp_path, capsys):
    keys = {"corrupt": room / "imagenet", "corrupt_n": 2}
    assert main(command(room, tmp_path / "out", "imagenet_a", "imagenet_r", "sketch", **keys)) == 0
    table = capsys.readouterr().out
    assert "ImageNet-C (generated)" in table
    assert "do not compare" in table
    found = results(tmp_path / "out")
    assert found["corrupt"]["images"] == 150
    assert "imagenet_c" not in found
    assert found["average"] is not None
