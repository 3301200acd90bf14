"""`addp evaluate`: the metrics equal torch-fidelity's, errors name their cause."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation import evaluate_command, noise, photographs, report_rows, write_images
from other_process import at_work_in
from PIL import Image
from ranks import run_ranks

from addp_core import sample
from addp_core.recipes.cli import main

fidelity = pytest.importorskip("torch_fidelity", reason="needs torch-fidelity: pip install 'addp[gen]'")
pytestmark = pytest.mark.usefixtures("offline")


# -------------------- metrics


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """Random weights in Inception's layout, initialized such that features differ between images."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class WithoutWeights(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    model = WithoutWeights("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_metrics_equal_torch_fidelity(sets, inception, tmp_path, capsys):
    keys = {"images": sets / "a", "inception": inception, "kid_subset": 6, "extractor": "-"}
    assert main(evaluate_command(sets, tmp_path / "out", *(f"{k}={v}" for k, v in keys.items()))) == 0
    (row,) = report_rows(tmp_path / "out")
    images = {
        "input1": str(sets / "a"),
        "input2": str(sets / "b"),
        "feature_extractor": "inception-v3-compat",
    }
    metrics = dict.fromkeys(("fid", "isc", "kid", "prc"), True)
    options = {"isc_splits": 2, "kid_subset_size": 6, "batch_size": 10, "save_cpu_ram": True}
    expected = fidelity.calculate_metrics(
        **images, **metrics, **options, feature_extractor_weights_path=inception, cuda=False, cache=False, verbose=False
    )
    names = {
        "fid": "frechet_inception_distance",
        "is_mean": "inception_score_mean",
        "is_std": "inception_score_std",
        "kid_mean": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    for name, fidelity_name in names.items():
        assert row[name] == pytest.approx(expected[fidelity_name], rel=1e-4, abs=1e-4), name
    output = capsys.readouterr().out
    assert "FID" in output
    assert "Inception-v3" in output
    assert "precision and recall: Inception-v3's pool3 features, as in ADM's evaluator, k = 3" in output


class SmallVGG16(torch.nn.Module):
    """A network with the parts of torchvision's VGG16, whose weights would take half a gigabyte."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 7, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(3))
        parts = [torch.nn.Linear(36, 16), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(16, 16)]
        self.classifier = torch.nn.Sequential(*parts, torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(16, 10))

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))


def test_precision_and_recall_of_vgg16_equal_torch_fidelity(sets, tmp_path, monkeypatch, capsys, expect_user_error):
    torch.manual_seed(0)
    weights = tmp_path / "vgg16.pth"
    torch.save(SmallVGG16().state_dict(), weights)
    monkeypatch.setattr("torchvision.models.vgg16", lambda **_: SmallVGG16())
    line = evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", "prc_features=vgg16")
    assert main([*line, f"vgg16={weights}"]) == 0
    (row,) = report_rows(tmp_path / "out")
    expected = fidelity.calculate_metrics(
        input1=str(sets / "a"),
        input2=str(sets / "b"),
        prc=True,
        feature_extractor_weights_path=str(weights),
        **{"save_cpu_ram": True, "cuda": False, "cache": False, "verbose": False},
    )
    assert (row["precision"], row["recall"]) == pytest.approx((expected["precision"], expected["recall"]))
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())["precision_recall"]
    assert (report["neighbors"], report["features"].startswith("VGG16")) == (3, True)
    assert "precision and recall: VGG16's second fully connected layer" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob(".tmp*"))
    with monkeypatch.context() as patch:
        patch.setattr("gen.evaluate.load_reference", lambda *_: pytest.fail("the reference was read"))
        expect_user_error(line, "vgg16: ", "no network", "prc_features=extractor")
        torch.save({"fc.weight": torch.zeros(10, 3)}, tmp_path / "other.pth")
        expect_user_error([*line, f"vgg16={tmp_path / 'other.pth'}"], "another layout than torchvision's VGG16")
        expect_user_error([*line, f"vgg16={tmp_path / 'none.pth'}"], "none.pth")
    # by default, the features are those of the distance
    assert main(line[:-1]) == 0
    about = json.loads((tmp_path / "out" / "evaluation.json").read_text())["precision_recall"]
    assert about["features"] == f"the pooled features of the classifier {sets / 'classifier.safetensors'}"


def test_classifier_metrics_equal_torch_fidelity_and_are_not_called_fid(sets, tmp_path, capsys):
    assert main(evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", "kid_subset=6")) == 0
    (row,) = report_rows(tmp_path / "out")
    expected = fidelity.calculate_metrics(
        input1=str(sets / "a"),
        input2=str(sets / "b"),
        feature_extractor="addp-classifier",
        feature_extractor_weights_path=str(sets / "classifier.safetensors"),
        **dict.fromkeys(("fid", "isc", "kid", "prc"), True),
        **{"isc_splits": 2, "kid_subset_size": 6, "save_cpu_ram": True, "cuda": False, "cache": False},
        verbose=False,
    )
    names = {"fd": "frechet_inception_distance", "cs_mean": "inception_score_mean", "precision": "precision"}
    names |= {"recall": "recall", "kd_mean": "kernel_inception_distance_mean"}
    for name, fidelity_name in names.items():
        assert row[name] == pytest.approx(expected[fidelity_name], rel=1e-4, abs=1e-4), name
    output = capsys.readouterr().out
    assert "not Inception" in output
    table = output.split("\n\n")[1]
    assert not {"FID", "IS", "KID"} & set(table.split())
    assert not {"fid", "is_mean", "kid_mean"} & row.keys()


def test_evaluating_the_reference_itself_gives_distance_zero_and_a_warning(sets, tmp_path, capsys):
    assert main(evaluate_command(sets, tmp_path / "out", f"images={sets / 'b'}")) == 0
    (row,) = report_rows(tmp_path / "out")
    assert abs(row["fd"]) < 1e-3
    assert row["precision"] == row["recall"] == 1
    assert "holds the same images as those evaluated" in capsys.readouterr().err
    (cached,) = (tmp_path / "cache").iterdir()
    assert main(evaluate_command(sets, tmp_path / "out", f"images={sets / 'b'}", f"reference={cached}")) == 0
    assert "holds the same images as those evaluated" in capsys.readouterr().err
    assert main(evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", f"reference={cached}")) == 0
    assert "holds the same images" not in capsys.readouterr().err


def test_a_generated_reference_excludes_its_grid(sets, tmp_path, capsys):
    folder = write_images(tmp_path / "generated", photographs(6, 7))
    (folder / "weights.txt").write_text("as addp generate leaves it")
    Image.fromarray(noise(1)[0]).save(folder / "grid.png")
    assert main(evaluate_command(sets, tmp_path / "out", f"images={folder}", f"reference={folder}")) == 0
    assert "holds the same images as those evaluated" in capsys.readouterr().err
    assert abs(report_rows(tmp_path / "out")[0]["fd"]) < 1e-3


@pytest.mark.slow
def test_noise_has_no_precision_and_no_recall(sets, inception, tmp_path):
    keys = [f"images={sets / 'noise'}", f"inception={inception}", "extractor=-"]
    assert main(evaluate_command(sets, tmp_path / "out", *keys)) == 0
    (row,) = report_rows(tmp_path / "out")
    assert row["precision"] == row["recall"] == 0
    assert row["fid"] > 1


def test_metrics_do_not_depend_on_the_chunk_size(sets, tmp_path, monkeypatch):
    """Chunks bound the memory, whatever the number of images."""
    assert main(evaluate_command(sets, tmp_path / "one", f"images={sets / 'a'}")) == 0
    monkeypatch.setattr("addp_core.training.image_metrics.ROWS_IN_MEMORY", 3)
    monkeypatch.setattr("gen.features.ROWS_IN_MEMORY", 3)
    monkeypatch.setattr("gen.features.EXTRACTOR_BATCH", 5)
    monkeypatch.setattr("addp_core.training.image_metrics.DISTANCES_IN_MEMORY", 30)
    again = evaluate_command(sets, tmp_path / "two", f"images={sets / 'a'}", f"cache={tmp_path / 'other'}")
    assert main(again) == 0
    one, two = report_rows(tmp_path / "one")[0], report_rows(tmp_path / "two")[0]
    assert [two[key] for key in one if key != "name"] == pytest.approx([one[key] for key in one if key != "name"])


def test_two_processes_give_the_metrics_of_one_and_do_not_write_to_the_same_file(sets, tmp_path):
    assert main(evaluate_command(sets, tmp_path / "one", f"images={sets / 'a'}")) == 0
    again = evaluate_command(sets, tmp_path / "two", f"images={sets / 'a'}", f"cache={tmp_path / 'other'}")
    ended = run_ranks(again, tmp_path / "job", before=refuse_to_write_to_mapped_files)
    assert ended.codes == [0, 0], ended.text
    assert "precision" in ended.outputs[0]
    (two,), (one,) = report_rows(tmp_path / "two"), report_rows(tmp_path / "one")
    assert two.pop("name") == one.pop("name")
    assert two == pytest.approx(one)  # batches of other sizes round otherwise


def refuse_to_write_to_mapped_files() -> None:
    load = np.load

    def load_without_writing(*args, mmap_mode: str | None = None, **kwargs):
        assert mmap_mode != "r+", "another machine may have mapped this file"
        return load(*args, mmap_mode=mmap_mode, **kwargs)

    np.load = load_without_writing


# -------------------- generation


def test_a_sweep_has_one_row_for_each_combination(sets, tmp_path, capsys):
    sweep = ["sweep.steps=[1,3]", "sweep.order=[confidence,halton]", "sampling.top_k=5", "n=6", "batch=2"]
    arguments = evaluate_command(sets, tmp_path / "out", f"model={sets / 'model.safetensors'}", *sweep)
    assert main(arguments) == 0
    rows = report_rows(tmp_path / "out")
    names = ["cosine-1-t6-k5", "cosine-1-halton-k5", "cosine-3-t6-k5", "cosine-3-halton-k5"]
    assert [row["name"] for row in rows] == names
    assert [row["sampling"]["order"] for row in rows] == ["confidence", "halton"] * 2
    assert rows[2]["fd"] != rows[3]["fd"]
    output = capsys.readouterr().out
    assert [line.split()[:2] for line in output.splitlines()[-4:]] == [[name, "6"] for name in names]
    image = tmp_path / "out" / names[2] / "000003.png"
    before = image.stat().st_mtime_ns
    (tmp_path / "out" / names[2] / "000004.png").unlink()
    assert main(arguments) == 0  # images that exist are kept
    assert image.stat().st_mtime_ns == before
    assert report_rows(tmp_path / "out") == rows
    # a row's folder is one of `addp generate`, and evaluating it gives the same metrics
    assert main(evaluate_command(sets, tmp_path / "again", f"images={image.parent}")) == 0
    assert report_rows(tmp_path / "again")[0]["fd"] == rows[2]["fd"]


def test_a_pairwise_sweep_has_one_row_for_each_pair(sets, tmp_path, expect_user_error):
    model = f"model={sets / 'model.safetensors'}"
    sweep = ["sweep.steps=[1,3]", "sweep.schedule=[cosine,linear]", "sweep.pairwise=true", "n=4", "batch=2"]
    assert main(evaluate_command(sets, tmp_path / "out", model, *sweep)) == 0
    assert [row["name"] for row in report_rows(tmp_path / "out")] == ["cosine-1-t6", "linear-3-t6"]
    expect_user_error(
        evaluate_command(sets, tmp_path / "out", model, *sweep, "sweep.order=[halton]"),
        "sweep.pairwise: found 2 of steps, 2 of schedule, 1 of order",
    )


def test_a_report_is_replaced_by_a_complete_one_alone(sets, tmp_path, monkeypatch, expect_user_error):
    """An evaluation that fails or is killed between two rows leaves the report before, and its own rows beside it."""
    out, model = tmp_path / "out", f"model={sets / 'model.safetensors'}"
    line = evaluate_command(sets, out, model, "n=4", "batch=2")
    assert main([*line, "sweep.steps=[1,2]"]) == 0
    before = (out / "evaluation.json").read_bytes()
    # images of other settings in the folder of the last row are found before the first
    assert main(["generate", model, f"out={out / 'cosine-4-t6'}", "n=1", "sampling.steps=4", "seed=5"]) == 0
    monkeypatch.setattr("gen.evaluate.load_reference", lambda *_: pytest.fail("the reference was read"))
    expect_user_error([*line, "sweep.steps=[3,4]"], "cosine-4-t6: holds images made with seed=5;")
    monkeypatch.undo()
    monkeypatch.setattr("gen.generate.sample", fail_at(3, sample))
    assert main([*line, "sweep.steps=[3,5]", "batch=4"]) == 1
    assert (out / "evaluation.json").read_bytes() == before
    monkeypatch.undo()
    assert main([*line, "sweep.steps=[3,5]", "batch=4"]) == 0
    assert [row["name"] for row in report_rows(out)] == ["cosine-3-t6", "cosine-5-t6"]
    assert not (out / "evaluation-unfinished.json").exists()


def fail_at(steps: int, function):
    """Return the function, which is interrupted when it is called with more than this many steps."""

    def call(*arguments, **options):
        if options["steps"] > steps:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


def test_a_folder_in_which_another_process_works_is_refused(sets, tmp_path, expect_user_error):
    line = evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}")
    with at_work_in(tmp_path / "out"):
        expect_user_error(line, "process 1 on a-machine works in this folder")
    assert main(line) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_in_float32_are_generated_without_tf32(sets, tmp_path, monkeypatch, precision):
    """TF32, which GPUs use in convolutions by default, would round the products of "fp32" to ten bits of mantissa."""
    allowed = []

    def sample_and_record(*arguments, **options):
        allowed.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return sample(*arguments, **options)

    monkeypatch.setattr("gen.generate.sample", sample_and_record)
    model = f"model={sets / 'model.safetensors'}"
    assert main(evaluate_command(sets, tmp_path / "out", model, "n=4", f"precision={precision}")) == 0
    assert set(allowed) == {(precision == "bf16", False)}


# -------------------- errors


def test_errors_name_the_key(sets, tmp_path, expect_user_error):
    images, out = f"images={sets / 'a'}", tmp_path / "out"
    model = f"model={sets / 'model.safetensors'}"
    expect_user_error(evaluate_command(sets, out, model, "n=0"), "n", "expected a whole number >= 1")
    expect_user_error(
        evaluate_command(sets, out, model, "n=6", "is_splits=10"), "is_splits: found 10 parts of 6 images"
    )
    expect_user_error(evaluate_command(sets, out, images, "is_splits=50"), "is_splits: found 50 parts of 10 images")
    expect_user_error(evaluate_command(sets, out, model, "n=3"), "found 3 images", "more than 3")
    expect_user_error(evaluate_command(sets, out), "images, model", "expected one of them")
    expect_user_error(evaluate_command(sets, out, images, "sweep.steps=[1]"), "sweep: needs model=")
    expect_user_error(evaluate_command(sets, out, f"images={tmp_path / 'nowhere'}"), "addp: images: ", "does not exist")
    expect_user_error(
        evaluate_command(sets, out, images, f"extractor={sets / 'model.safetensors'}"),
        "expected a classifier",
    )
    few = write_images(tmp_path / "few", photographs(3, 4))
    expect_user_error(evaluate_command(sets, out, images, f"reference={few}"), "reference: found 3 images")
    nowhere = f"reference={tmp_path / 'nowhere'}"
    expect_user_error(evaluate_command(sets, out, images, nowhere), "addp: reference: ", "does not exist")
    (tmp_path / "file").write_text("")
    expect_user_error(
        evaluate_command(sets, out, images, f"cache={tmp_path / 'file'}"), "addp: cache: ", "cannot be written"
    )
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "weights.txt").write_text("no image yet")
    expect_user_error(
        evaluate_command(sets, out, f"images={tmp_path / 'unfinished'}"), "addp: images: ", "unfinished is empty"
    )


def test_a_missing_inception_file_names_the_alternatives(sets, tmp_path, expect_user_error):
    without = evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", "extractor=-")
    expect_user_error(without, "no network", "inception=<that file>", "addp finetune")
    torch.save({"fc.weight": torch.zeros(10, 3)}, tmp_path / "other.pth")
    expect_user_error([*without, f"inception={tmp_path / 'other.pth'}"], "another layout than torch-fidelity's")
    expect_user_error([*without, f"inception={tmp_path / 'none.pth'}"], "none.pth")


def test_errors_name_unreadable_images_and_those_of_other_sizes(sets, tmp_path, expect_user_error, monkeypatch):
    folder = write_images(tmp_path / "images", photographs(6, 5))
    with monkeypatch.context() as patch:
        patch.setattr("gen.evaluate.load_reference", lambda *_: pytest.fail("the reference was read"))
        Image.new("RGB", (40, 24)).save(folder / "003.png")
        expect_user_error(evaluate_command(sets, tmp_path / "out", f"images={folder}"), "003.png", "40 x 24")
        (folder / "003.png").write_bytes(b"no image")
        expect_user_error(evaluate_command(sets, tmp_path / "out", f"images={folder}"), "003.png", "repair or remove")
    Image.new("RGB", (40, 24)).save(folder / "003.png")
    expect_user_error(
        evaluate_command(sets, tmp_path / "out", f"images={folder}"), "003.png", "40 x 24", "others have 32 x 24"
    )
    (folder / "003.png").write_bytes(b"no image")
    expect_user_error(evaluate_command(sets, tmp_path / "out", f"images={folder}"), "003.png", "repair or remove it")
    expect_user_error(
        evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", f"reference={folder}"), "003.png"
    )
