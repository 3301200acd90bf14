"""`addp robustness`: metrics match hand-computed ones, and nothing is evaluated twice."""

import csv
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import timm.data
import torch
from other_process import at_work_in
from PIL import Image
from ranks import run_ranks
from safetensors.torch import save_file

from addp_core.data.corruptions import CORRUPTIONS, SEVERITIES
from addp_core.data.images import LazyImage, eval_transform
from addp_core.data.sources import ImageSource, open_source
from addp_core.networks.classifier import Classifier, normalize
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main
from addp_core.recipes.config import dump
from addp_core.weights.saving import save_model
from cls.recipe import FinetuneRecipe
from cls.variants import datasets, evaluation, report
from cls.variants.classes import published_classes
from cls.variants.classifiers import open_classifier
from cls.variants.mce import corruption_errors
from cls.variants.recipe import Recipe
from tools.toy import toy

DIGITS = tuple("0123456789")
# AlexNet's mean errors, in the order of CORRUPTIONS
ALEXNET = [0.886428, 0.894468, 0.92264, 0.81988, 0.826268, 0.785948, 0.79836, 0.866816, 0.826572, 0.819324]
ALEXNET += [0.564592, 0.853204, 0.646056, 0.71784, 0.6065]


def classifier(classes: int = 10, names: tuple[str, ...] = DIGITS, bias: dict[int, float] | None = None) -> Classifier:
    """Return a randomly initialized classifier; with `bias`, one whose logits are these for every image."""
    torch.manual_seed(0)
    model = Classifier(Encoder(EncoderConfig(16, 2, 2), (24, 24), 8), classes, class_names=names).eval()
    head = cast(torch.nn.Linear, model.head)
    torch.nn.init.normal_(head.weight, std=0.0 if bias else 0.5)
    for logit, value in (bias or {}).items():
        head.bias.data[logit] = value
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Toy datasets, a classifier of digits, and one that always ranks 1 first and 0 second."""
    root = tmp_path_factory.mktemp("files")
    recipe = toy.Recipe(
        str(root),
        only=["imagenet", "imagenet-a", "imagenet-r", "sketch", "imagenet-c"],
        size=32,
        imagenet_train=10,
        imagenet_val=20,
        variants=12,
        corrupted=2,
    )
    toy.run(recipe)
    save_model(classifier(), root / "model.safetensors")
    save_model(classifier(bias={1: 2.0, 0: 1.0}), root / "constant.safetensors")
    return root


def command(files: Path, out: Path, *sets: str, **more: object) -> list[str]:
    folders = {"val": "imagenet", "imagenet_a": "imagenet-a", "imagenet_r": "imagenet-r", "imagenet_c": "imagenet-c"}
    keys = {"model": files / "model.safetensors", "out": out, "workers": 0}
    keys |= {key: files / folders.get(key, key) for key in sets} | more
    return ["robustness", *(f"{key}={value}" for key, value in keys.items())]


def results(out: Path) -> dict[str, dict]:
    report = json.loads((out / "results.json").read_text())
    return {row["key"]: row for row in report["rows"]} | {"average": report["average"]}


def assert_refused(capsys, arguments: list[str], *parts: str) -> None:
    """Check that the exit code is 2 and that the message contains all `parts`."""
    capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in line for part in parts), line


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), "teal").save(path)


# -------------------- metrics


def test_all_datasets_and_their_average(files, tmp_path, capsys):
    out = tmp_path / "out"
    sets = ("val", "imagenet_a", "imagenet_r", "sketch", "imagenet_c")
    assert main(command(files, out, *sets)) == 0
    table = capsys.readouterr().out
    found = results(out)
    assert [(found[key]["images"], found[key]["classes"]) for key in sets] == [
        (20, 10),
        (12, 6),
        (12, 6),
        (12, 10),
        (150, 10),
    ]
    scores = [found[key]["top1"] for key in sets[1:4]] + [100 - found["imagenet_c"]["mce"]]
    assert found["average"] == pytest.approx(np.mean(scores))
    assert (out / "robustness.md").read_text() == table
    assert f"{found['average']:.1f}" in table
    assert "generated" not in table
    with (out / "robustness.csv").open() as file:
        rows = {row["set"]: row for row in csv.DictReader(file)}
    assert float(rows["ImageNet-A"]["top1"]) == pytest.approx(scores[0])

    model, source = classifier(), open_source(str(files / "imagenet"), "val")
    pixels = torch.stack([eval_transform(24, 0.875)(source.open_image(i)[0]) for i in range(20)])
    predictions = model(normalize(pixels, model.mean, model.std)).argmax(1)
    correct = sum(int(label) == source.read(i)[1] for i, label in enumerate(predictions))
    assert found["val"]["top1"] == pytest.approx(100 * correct / 20)


def test_only_the_classes_of_imagenet_a_and_r_compete(files, tmp_path):
    """The classifier prefers 1, which is not a class of imagenet-a: there it predicts 0, correctly for the zeros."""
    keys = {"model": files / "constant.safetensors"}
    assert main(command(files, tmp_path, "val", "imagenet_a", "imagenet_r", "sketch", **keys)) == 0
    found = results(tmp_path)
    zeros, ones = (len(list((files / name).glob("*"))) for name in ("imagenet-a/0", "imagenet-r/1"))
    assert found["imagenet_a"]["top1"] == pytest.approx(100 * zeros / 12) != 0
    assert found["imagenet_r"]["top1"] == pytest.approx(100 * ones / 12)
    assert found["val"]["top1"] == pytest.approx(10)
    assert found["average"] is None


def test_mce_of_given_errors(files, tmp_path, capsys):
    """A classifier that always predicts 1, on images of which the given number are of class 0.

    The corruptions are in the folders that the published archives unpack to.
    """
    groups = ["noise"] * 3 + ["blur"] * 4 + ["weather"] * 4 + ["digital"] * 4
    table = np.random.default_rng(0).integers(1, 3, (15, 5))  # both classes have images in each part
    for row, name in enumerate(CORRUPTIONS):
        for severity in SEVERITIES:
            for i in range(3):
                label = "0" if i < table[row, severity - 1] else "1"
                write_image(tmp_path / "c" / groups[row] / name / str(severity) / label / f"{i}.png")
            for label in ("0", "1", ".ipynb_checkpoints", "@eaDir"):  # the last two are no classes
                (tmp_path / "c" / groups[row] / name / str(severity) / label).mkdir(exist_ok=True)
    keys = {"model": files / "constant.safetensors", "imagenet_c": tmp_path / "c"}
    assert main(command(files, tmp_path / "out", **keys)) == 0
    found = results(tmp_path / "out")["imagenet_c"]
    expected_mce = np.mean([sum(errors / 3) / (5 * alexnet) for errors, alexnet in zip(table, ALEXNET, strict=True)])
    assert found["mce"] == pytest.approx(100 * expected_mce)
    assert found["score"] == pytest.approx(100 - 100 * expected_mce)
    assert list(found["corruptions"]) == list(CORRUPTIONS)
    snow = found["corruptions"]["snow"]
    assert [snow["errors"][str(s)] for s in SEVERITIES] == pytest.approx([100 * e / 3 for e in table[7]])
    assert snow["ce"] == pytest.approx(100 * sum(table[7] / 3) / (5 * 0.866816))
    assert f"{found['mce']:.1f}" in capsys.readouterr().out


def test_alexnet_has_an_mce_of_one():
    errors = {name: dict.fromkeys(SEVERITIES, error) for name, error in zip(CORRUPTIONS, ALEXNET, strict=True)}
    assert [row["ce"] for row in corruption_errors(errors).values()] == pytest.approx([100] * 15)


# -------------------- classes


def test_classes_in_another_order_are_matched_by_name(files, tmp_path):
    model = classifier()
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    other = classifier(names=tuple(str(i) for i in order))
    other.head.weight.data, other.head.bias.data = model.head.weight[order].data, model.head.bias[order].data
    save_model(other, tmp_path / "other.safetensors")
    sets = ("val", "imagenet_a", "sketch")
    assert main(command(files, tmp_path / "a", *sets)) == 0
    assert main(command(files, tmp_path / "b", *sets, model=tmp_path / "other.safetensors")) == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")


def test_numbered_labels_are_the_models_classes(files, tmp_path, capsys):
    """ImageNet-A as `meta/val.txt` and images without class folders, numbered like the model's logits."""
    indices = (Path(timm.data.__file__).parent / "_info" / "imagenet_a_indices.txt").read_text().split()
    labels = sorted(map(int, indices))[:2]
    other_class = next(label for label in range(1000) if str(label) not in indices)
    root = tmp_path / "a"
    for name in "xy":
        write_image(root / "val" / f"{name}.png")
    (root / "meta").mkdir()
    (root / "meta" / "val.txt").write_text(f"x.png {labels[0]}\ny.png {labels[1]}\n")
    save_model(classifier(1000, (), bias={other_class: 2.0, labels[1]: 1.0}), tmp_path / "model.safetensors")
    keys = {"model": tmp_path / "model.safetensors", "imagenet_a": root}
    assert main(command(files, tmp_path / "out", **keys)) == 0
    found = results(tmp_path / "out")["imagenet_a"]
    assert (found["images"], found["classes"], found["top1"]) == (2, 200, 50)
    (root / "meta" / "val.txt").write_text(f"x.png {labels[0]}\ny.png {other_class}\n")
    assert_refused(
        capsys, command(files, tmp_path / "out", **keys), "imagenet_a", "not among the 200 classes of ImageNet-A"
    )


def test_numbers_are_labels_only_in_lists_and_for_a_model_without_names(files, tmp_path, capsys):
    """Folders 0 and 1 of a dataset are no classes of a model whose classes have other names."""
    for name in ("0", "1"):
        write_image(tmp_path / "sketch" / name / "x.png")
    save_model(classifier(3, ("tench", "goldfish", "shark")), tmp_path / "fish.safetensors")
    save_model(classifier(3, ()), tmp_path / "nameless.safetensors")
    arguments = command(files, tmp_path / "out", sketch=tmp_path / "sketch")
    named, nameless = ([*arguments, f"model={tmp_path / name}.safetensors"] for name in ("fish", "nameless"))
    assert_refused(capsys, named, "sketch: class '0' (and 1 more)", "among the model's 3 classes, such as 'tench'")
    assert main(nameless) == 0
    (tmp_path / "names.txt").write_text("tench\ngoldfish\nshark\n")
    assert_refused(capsys, [*nameless, f"classes={tmp_path / 'names.txt'}"], "sketch: class '0' (and 1 more)")
    for corruption in CORRUPTIONS:
        for severity in SEVERITIES:
            write_image(tmp_path / "c" / corruption / str(severity) / "0" / "x.png")
    keys = {"imagenet_c": tmp_path / "c", "model": tmp_path / "fish.safetensors"}
    assert_refused(capsys, command(files, tmp_path / "out", **keys), "imagenet_c: class '0' of")

    root = tmp_path / "listed"  # the published list of labels, with images in folders of these names or in none
    for folder in ("0", "1", ""):
        write_image(root / "val" / folder / "x.png")
    (root / "meta").mkdir()
    for lines in ("0/x.png 0\n1/x.png 1\n", "x.png 0\nx.png 1\n"):
        (root / "meta" / "val.txt").write_text(lines)
        assert main([*named, f"sketch={root}"]) == 0
    for folder, labels in (("cls", "01"), ("folders", "")):
        with tarfile.open(tmp_path / f"{folder}.tar", "w") as tar:
            for name in ("0", "1"):
                tar.add(root / "val" / "x.png", f"image{name}.png" if labels else f"{name}/x.png")
                if labels:
                    (tmp_path / "label").write_text(name)
                    tar.add(tmp_path / "label", f"image{name}.cls")
    assert main([*named, f"sketch={tmp_path / 'cls.tar'}"]) == 0
    assert_refused(capsys, [*named, f"sketch={tmp_path / 'folders.tar'}"], "sketch: class '0' (and 1 more)")


# -------------------- resuming


def test_an_interrupted_run_repeats_nothing(files, tmp_path, monkeypatch):
    evaluated, compute_outputs = [], evaluation.compute_outputs

    def record(*args, title, **options):
        if len(evaluated) == stop:
            raise KeyboardInterrupt
        evaluated.append(title)
        return compute_outputs(*args, title=title, **options)

    monkeypatch.setattr(evaluation, "compute_outputs", record)
    for name in ("fog", "frost"):
        shutil.copytree(files / "imagenet-c" / name, tmp_path / "c" / name)
    keys = {"imagenet_c": tmp_path / "c", "allow_missing": "true"}
    arguments = command(files, tmp_path / "out", "sketch", **keys)
    stop = 4
    assert main(arguments) == 1
    assert len(evaluated) == 4
    assert not (tmp_path / "out" / "results.json").exists()
    stop = 1000
    assert main(arguments) == 0
    assert len(evaluated) == len(set(evaluated)) == 11
    assert main(command(files, tmp_path / "once", "sketch", **keys)) == 0
    assert results(tmp_path / "once") == results(tmp_path / "out")
    before = len(evaluated)
    assert main(arguments) == 0
    assert len(evaluated) == before
    other = {"model": files / "constant.safetensors"}
    assert main(command(files, tmp_path / "out", "sketch", **other)) == 0  # a different model is evaluated anew
    assert main(command(files, tmp_path / "out", "sketch", crop=0.5)) == 0
    assert len(evaluated) == before + 2


def test_images_that_have_moved_to_another_class_are_evaluated_again(files, tmp_path):
    digits = tmp_path / "digits"
    shutil.copytree(files / "imagenet" / "val", digits / "val")
    arguments = command(files, tmp_path / "out", val=digits, model=files / "constant.safetensors")  # says 1
    assert main(arguments) == 0
    assert results(tmp_path / "out")["val"]["top1"] == 10
    for path in (digits / "val" / "0").iterdir():
        path.rename(digits / "val" / "1" / f"0-{path.name}")
    write_image(digits / "val" / "0" / "other.png")
    (digits / "val" / "9").joinpath(min(os.listdir(digits / "val" / "9"))).unlink()  # as many images as before
    assert main(arguments) == 0
    assert results(tmp_path / "out")["val"]["top1"] == 20


def test_another_number_of_heads_is_evaluated_anew(files, tmp_path):
    model = classifier()
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    state = {name: value for name, value in state.items() if not name.startswith("norm.")}  # as in MAE's files
    save_file(state, tmp_path / "foreign.safetensors")  # does not store its heads
    digests = []
    for heads in (2, 4):
        recipe = Recipe(str(tmp_path / "foreign.safetensors"), str(tmp_path), encoder_heads=heads)
        digests.append(evaluation.Evaluator(recipe, open_classifier(recipe)).digest)
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_two_processes_share_the_images(files, tmp_path):
    ended = run_ranks(command(files, tmp_path / "two", "val", "imagenet_a"), tmp_path / "job")
    assert ended.codes == [0, 0], ended.text
    assert main(command(files, tmp_path / "one", "val", "imagenet_a")) == 0
    assert results(tmp_path / "two") == results(tmp_path / "one")


# -------------------- incomplete datasets and wrong input


def test_missing_severities_are_listed(files, tmp_path, capsys):
    root = tmp_path / "c"
    shutil.copytree(files / "imagenet-c", root)
    shutil.rmtree(root / "frost" / "3")
    (root / "snow").rename(root / "snwo")
    keys = {"imagenet_c": root}
    assert_refused(
        capsys, command(files, tmp_path / "out", **keys), "imagenet_c", "frost 3", "snow (all severities)", "'snwo'"
    )
    assert not (tmp_path / "out").exists()
    for name in set(CORRUPTIONS) - {"frost", "fog", "snow"}:
        shutil.rmtree(root / name)
    assert main(command(files, tmp_path / "out", **keys, allow_missing="true")) == 0
    table = capsys.readouterr().out
    assert "9 of 75" in table
    assert "snow (all severities)" in table
    assert "; frost 3" in table
    found = results(tmp_path / "out")["imagenet_c"]
    assert list(found["corruptions"]["frost"]["errors"]) == ["1", "2", "4", "5"]
    assert found["mce"] == pytest.approx(np.mean([row["ce"] for row in found["corruptions"].values()]))
    shutil.rmtree(root)
    assert_refused(capsys, command(files, tmp_path / "out", **keys), str(root), "does not exist")
    root.mkdir()
    assert_refused(capsys, command(files, tmp_path / "out", **keys, allow_missing="true"), "lacks")


def test_a_severity_without_some_classes_is_reported(files, tmp_path, capsys, caplog):
    root, keys = tmp_path / "c", {"imagenet_c": tmp_path / "c"}
    shutil.copytree(files / "imagenet-c", root)
    removed = root / "fog" / "4" / "1"
    shutil.rmtree(removed)
    assert_refused(
        capsys,
        command(files, tmp_path / "out", **keys),
        *(str(removed.parent), "lacks images of class '1'", "allow_missing"),
    )
    for name in set(CORRUPTIONS) - {"fog"}:
        shutil.rmtree(root / name)
    assert main(command(files, tmp_path / "out", **keys, allow_missing="true")) == 0
    assert f"{removed.parent} lacks images of class '1'" in caplog.text


def test_images_that_a_part_lacks_are_found_at_the_start(files, tmp_path, capsys, monkeypatch):
    """One image, or all; accepted, they mark the result."""
    root, keys = tmp_path / "c", {"imagenet_c": tmp_path / "c"}
    for name in ("fog", "frost"):
        shutil.copytree(files / "imagenet-c" / name, root / name)
    monkeypatch.setattr(datasets, "CORRUPTIONS", ("fog", "frost"))
    monkeypatch.setattr(report, "CORRUPTIONS", ("fog", "frost"))
    arguments = command(files, tmp_path / "out", **keys)
    for path in (root / "fog" / "4").glob("*/*"):
        path.unlink()
    assert_refused(capsys, arguments, str(root / "fog" / "4"), "holds no image, and other parts have 2; add them")
    image = next((root / "frost" / "2").glob("*/*"))
    write_image(image.parent / "second.png")
    assert_refused(
        capsys, arguments, "fog/1 has 2 images, and other parts have 3 (9 parts are incomplete)", "allow_missing=true"
    )
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "allow_missing=true"]) == 0
    assert "9 of 75" not in (table := capsys.readouterr().out)
    assert "9 of 10 parts. Missing: fog 4; fog 1 (2 of 3 images); fog 2 (2 of 3 images)" in table
    assert results(tmp_path / "out")["imagenet_c"]["images"] == 19
    (image.parent / "second.png").rename(root / "frost" / "2" / "loose.png")
    assert_refused(capsys, [*arguments, "allow_missing=true"], "loose.png lies in no class folder")


def test_unreadable_images_are_counted_and_tried_again(files, tmp_path, capsys, monkeypatch):
    read, compute_outputs = [], evaluation.compute_outputs

    def record(*args, indices, **options):
        read.extend(indices)
        return compute_outputs(*args, indices=indices, **options)

    monkeypatch.setattr(evaluation, "compute_outputs", record)
    shutil.copytree(files / "imagenet" / "val", tmp_path / "digits" / "val")
    whole = command(files, tmp_path / "whole", val=tmp_path / "digits")
    assert main(whole) == 0
    path = next((tmp_path / "digits" / "val" / "3").iterdir())
    content = path.read_bytes()
    path.write_bytes(b"-" * len(content))  # as many bytes: the listing is the same
    arguments = command(files, tmp_path / "out", val=tmp_path / "digits", max_errors=1)
    read.clear()
    for tries, images in ((1, 20), (2, 1)):
        capsys.readouterr()
        assert main(arguments) == 0
        assert "1 images of clean validation cannot be read and are not counted" in capsys.readouterr().out
        assert (results(tmp_path / "out")["val"]["images"], len(read)) == (19, 20 + tries - 1)
        assert read[-images:] == read[20:] or images == 20
    assert_refused(capsys, [*arguments, "max_errors=0"], "max_errors: more than 0 of 20 images", path.name)
    path.write_bytes(content)
    assert main(arguments) == 0
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    read.clear()
    assert main(arguments) == 0
    assert read == []


def test_the_folder_of_another_verb_is_left_as_it_is(files, tmp_path, capsys):
    recipe = dump(FinetuneRecipe(model="model.safetensors", out=str(tmp_path / "run")))
    for name, content in (("recipe.yaml", recipe), ("results.json", "of the training")):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(content)
    arguments = command(files, tmp_path / "run", "sketch")
    assert_refused(
        capsys, arguments, f"out={tmp_path / 'run'}: holds a run of another verb", "'augment'", "another out"
    )
    (tmp_path / "run" / "recipe.yaml").unlink()
    assert_refused(capsys, arguments, "holds results.json, and no recipe.yaml")
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["of the training"]

    assert main(command(files, tmp_path / "out", "sketch")) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for verb in ("finetune", "linprobe"):
        training = [verb, f"model={files / 'model.safetensors'}", f"data={files / 'imagenet'}"]
        assert_refused(capsys, [*training, f"out={tmp_path / 'out'}"], "holds a run of another verb")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_in_which_another_process_works_is_refused(files, tmp_path, capsys):
    arguments = command(files, tmp_path / "out", "sketch")
    with at_work_in(tmp_path / "out"):
        assert_refused(capsys, arguments, "process 1 on a-machine works in this folder")
    assert not (tmp_path / "out" / "cells.json").exists()
    assert main(arguments) == 0


def test_labels_out_of_range(files, tmp_path, capsys, monkeypatch):
    """Reported before the evaluation if the labels are known at once, otherwise with the image."""

    class ThreeImages(ImageSource):
        """The last image has no label."""

        classes = DIGITS

        def __init__(self, labels=None):
            self.labels = labels

        def __len__(self):
            return 3

        def name(self, index):
            return f"set[{index}]"

        def open_image(self, index):
            return LazyImage(Image.new("RGB", (24, 24), "teal")), 1 - index

    for labels, message in ((None, "set[2]: found label -1, expected 0 to 9"), ([1, 0, -1], "has label -1")):
        source = ThreeImages(labels if labels is None else np.array(labels))
        monkeypatch.setattr(evaluation, "open_source", lambda *_, source=source: source)
        for key in ("val", "imagenet_a"):
            assert_refused(capsys, command(files, tmp_path / "out", key), message)


def test_the_default_crop_is_that_of_the_models_validation(files, tmp_path):
    model = classifier()
    model.crop = 0.5
    save_model(model, tmp_path / "model.safetensors")
    own = {"model": tmp_path / "model.safetensors"}
    assert main(command(files, tmp_path / "own", "val", **own)) == 0
    assert main(command(files, tmp_path / "explicit", "val", crop=0.5)) == 0
    assert main(command(files, tmp_path / "uncropped", "val", **own, crop=1)) == 0
    cells = [set(json.loads((tmp_path / name / "cells.json").read_text())) for name in ("own", "explicit", "uncropped")]
    assert cells[0] == cells[1] != cells[2]


def test_wrong_input_is_refused_at_once(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert_refused(capsys, command(files, out), "no dataset given", "imagenet_a=")
    assert_refused(capsys, command(files, out, "imagenet_c", corrupt=files / "imagenet"), "imagenet_c, corrupt", "both")
    save_model(classifier().encoder, tmp_path / "encoder.safetensors")
    assert_refused(capsys, command(files, out, "sketch", model=tmp_path / "encoder.safetensors"), "encoder", "finetune")
    assert_refused(capsys, command(files, out, sketch=tmp_path / "nowhere"), "sketch:", "does not exist")

    save_model(classifier(3, ("tench", "goldfish", "shark")), tmp_path / "fish.safetensors")
    write_image(tmp_path / "sketch" / "goldfisch" / "0.png")
    keys = {"model": tmp_path / "fish.safetensors"}
    assert_refused(
        capsys, command(files, out, **keys, sketch=tmp_path / "sketch"), "'goldfisch'", "did you mean 'goldfish'"
    )
    shutil.copytree(files / "imagenet-c", tmp_path / "c")
    write_image(tmp_path / "c" / "fog" / "4" / "goldfish" / "0.png")
    assert_refused(capsys, command(files, out, imagenet_c=tmp_path / "c"), "'goldfish'", os.sep.join(["fog", "4"]))

    write_image(tmp_path / "flat" / "0.png")
    assert_refused(capsys, command(files, out, sketch=tmp_path / "flat"), "sketch:", "no class folders")
    for name in "ab":
        write_image(tmp_path / "listed" / "val" / f"{name}.png")
    (tmp_path / "listed" / "meta").mkdir()
    (tmp_path / "listed" / "meta" / "val.txt").write_text("a.png 12\nb.png 3\n")
    assert_refused(capsys, command(files, out, val=tmp_path / "listed"), "val:", "label 12", "0 to 9")

    only_r = sorted(set(published_classes("imagenet_r")) - set(published_classes("imagenet_a")))
    for name in (only_r[0], published_classes("imagenet_a")[0]):
        write_image(tmp_path / "mixed" / name / "0.png")
    save_model(classifier(1000, ()), tmp_path / "imagenet.safetensors")
    keys = {"model": tmp_path / "imagenet.safetensors", "imagenet_a": tmp_path / "mixed"}
    assert_refused(capsys, command(files, out, **keys), "imagenet_a", only_r[0], "not among the 200 classes")
    assert not out.exists()

    (tmp_path / "sketch" / "goldfisch" / "1.png").write_text("not an image")
    (tmp_path / "sketch" / "goldfisch").rename(tmp_path / "sketch" / "goldfish")
    keys = {"model": tmp_path / "fish.safetensors", "sketch": tmp_path / "sketch", "max_errors": 0}
    assert_refused(capsys, command(files, out, **keys), "1.png", "raise max_errors")
    out.joinpath("cells.json").write_text("{")
    assert_refused(capsys, command(files, out, "sketch"), "cells.json", "damaged")


def test_results_that_say_nothing_are_refused(files, tmp_path, capsys):
    """One class competes, so that every prediction is right; or no image can be read."""
    write_image(tmp_path / "a" / "3" / "0.png")
    keys = {"imagenet_a": tmp_path / "a"}
    assert_refused(capsys, command(files, tmp_path / "out", **keys), "imagenet_a:", "it has one, '3'", "at least two")
    (tmp_path / "a" / "3" / "0.png").write_text("not an image")
    keys = {"sketch": tmp_path / "a"}
    assert_refused(capsys, command(files, tmp_path / "out", **keys), "0.png", "more than 0 of 1 images")


# -------------------- generated corruptions


def test_generated_corruptions_are_labeled_as_such(files, tmp_path, capsys):
    keys = {"corrupt": files / "imagenet", "corrupt_n": 2}
    assert main(command(files, tmp_path / "out", "imagenet_a", "imagenet_r", "sketch", **keys)) == 0
    table = capsys.readouterr().out
    assert "ImageNet-C (generated)" in table
    assert "do not compare" in table
    found = results(tmp_path / "out")
    assert found["corrupt"]["images"] == 150
    assert "imagenet_c" not in found
    assert found["average"] is not None


def test_results_on_corruptions_of_another_version_are_not_taken_over(files, tmp_path, monkeypatch):
    arguments = command(files, tmp_path / "out", corrupt=files / "imagenet", corrupt_n=1)
    cells = tmp_path / "out" / "cells.json"
    for version, expected in ((1, 75), (1, 75), (2, 150)):
        monkeypatch.setattr(evaluation, "VERSION", version)
        assert main(arguments) == 0
        assert len(json.loads(cells.read_text())) == expected
