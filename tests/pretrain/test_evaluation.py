"""Evaluation while pretraining: what the three stages measure, that it changes no number of training and is neither
repeated nor lost, on one process and on two, and the mistakes that users make."""

import io
import json
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import tiny_addp
from toy_stage import TIMING

from addp_core import load_addp, load_encoder, load_predictor, load_tokenizer
from addp_core.data.config import DataConfig
from addp_core.data.sources import open_source
from addp_core.networks.pooled_features import PooledFeatures
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.recipes.cli import main
from pretrain import addp
from pretrain.evaluation import Evaluation, choose_images, split_classes
from pretrain.recipe import EvaluationConfig

TOKENIZER = """
model: {width: 32, multipliers: [1, 1, 1], blocks: 1, codebook: 32, dim: 8}
train: {steps: 2, batch: 4, lr: 1.0e-3, log_every: 2}
"""
PREDICTOR = """
model: {width: 16, depth: 1, heads: 2, decoder_depth: 1, decoder_heads: 2, dropout: 0.1}
train: {steps: 2, batch: 4, lr: 1.0e-3, log_every: 2}
"""
PRETRAIN = """
data: {size: [16, 24], workers: 0}
model:
  encoder: {width: 16, depth: 2, heads: 2, dropout: 0.1, input_dropout: 0.1, tokenizer_norm: true}
  decoder: {depth: 1, heads: 2, dropout: 0.1}
evaluation: {images: 24, samples: 8, knn: 3}
train: {steps: 6, batch: 4, lr: 1.0e-3, log_every: 1, checkpoint_every: 4, ema: 0.9}
"""
COLORS = ((1, 0.2, 0.2), (0.2, 1, 0.2), (0.2, 0.2, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images of three classes, recipes, and in `run` all three stages, evaluated."""
    root = tmp_path_factory.mktemp("evaluated")
    for split, count in (("train", 8), ("val", 10)):
        for label, color in enumerate(COLORS):
            folder = root / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([label, i, count])
                ramp = np.linspace(rng.random(3) * color, rng.random(3) * color, 40)[None]
                pixels = ramp * np.linspace(0.5, 1, 30)[:, None, None] * 255
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (root / "stages").mkdir()
    (root / "stages" / "tokenizer.yaml").write_text(TOKENIZER)
    (root / "stages" / "predictor.yaml").write_text(PREDICTOR)
    (root / "pretrain.yaml").write_text(PRETRAIN)
    settings = [f"stages={root / 'stages'}", f"out={root / 'run'}", f"evaluation={root / 'images'}"]
    assert main([*verb(root), *settings, "train.evaluate_every=2", "train.keep_best=knn"]) == 0
    return root


def verb(root: Path) -> list[str]:
    return ["pretrain", str(root / "pretrain.yaml"), f"data={root / 'images'}"]


def pretrain(root: Path, out: Path, *settings: str) -> list[str]:
    """Arguments of the third stage on the two that `root` has."""
    parts = [f"tokenizer={root / 'run' / 'tokenizer'}", f"predictor={root / 'run' / 'predictor'}"]
    return [*verb(root), *parts, f"out={out}", *settings]


def evaluated(root: Path, out: Path, *settings: str) -> list[str]:
    return pretrain(root, out, f"evaluation={root / 'images'}", "train.evaluate_every=2", *settings)


def lines(out: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without timing."""
    read = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMING} for line in read]


def evaluations(out: Path) -> list[dict]:
    return [line for line in lines(out) if "loss" not in line]


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def evaluation_of(root: Path, **settings) -> Evaluation:
    config = EvaluationConfig(**{"images": 24, "samples": 8, "knn": 3, **settings})
    source = open_source(str(root / "images"), "val")
    return Evaluation(config, source, DataConfig(size=(16, 24)), addp.PretrainStage.measured, "images")


# -------------------- what is measured


def test_each_stage_measures_what_tells_whether_to_go_on(root):
    compared = {"fd", "precision", "recall"}
    expected = {
        "run": {"val_loss", "knn", "probe", *compared},
        "run/predictor": {"val_loss", "val_accuracy", "val_context", "knn", "probe"},
        "run/tokenizer": {"val_psnr", "val_usage", "val_perplexity", *compared},
    }
    for folder, metrics in expected.items():
        for line in evaluations(root / folder):
            assert line.keys() == {"step", *metrics}
            assert all(np.isfinite(value) for value in line.values())
        assert (root / folder / "images" / "curves.png").stat().st_size > 10_000
    assert [line["step"] for line in evaluations(root / "run")] == [2, 4, 6]
    assert [line["step"] for line in evaluations(root / "run/tokenizer")] == [2]
    best = json.loads((root / "run" / "best.json").read_text())
    assert best["knn"] == max(line["knn"] for line in evaluations(root / "run"))
    assert load_addp(root / "run" / "model-best.safetensors").config.image_size == (16, 24)


def test_features_are_those_of_linear_probing(root):
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    predictor, tokenizer = load_predictor(root / "run/predictor", (4, 6)), load_tokenizer(root / "run/tokenizer")
    here = [
        addp.transfer_encoder(load_addp(root / "run").denoiser.encoder),
        TokenEncoder.of_predictor(predictor, tokenizer, (16, 24)),
    ]
    for encoder, file in zip(here, ("run", "run/predictor"), strict=True):
        expected = PooledFeatures(load_encoder(root / file, (16, 24)), [encoder.depth], ["avg"])(images)
        found = PooledFeatures(encoder.eval(), [encoder.depth], ["avg"])(images)
        torch.testing.assert_close(found, expected)


def test_an_encoder_that_sees_the_color_of_the_classes_is_told_from_one_that_does_not(root):
    class Blind(torch.nn.Module):
        """The mean color of an image, or nothing, as the feature of its only token."""

        def __init__(self, sees: bool):
            super().__init__()
            self.depth, self.width, self.num_prefix_tokens, self.sees = 1, 3, 0, sees
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward_tokens(self, images, blocks):
            return [images.mean((2, 3))[:, None] if self.sees else torch.ones(len(images), 1, 3)]

    assert evaluation_of(root).probe(Blind(True)) == {"knn": 100, "probe": 100}
    assert evaluation_of(root).probe(Blind(False))["probe"] < 50


def test_metrics_do_not_depend_on_how_images_are_batched(root):
    model = load_addp(root / "run")
    stage = addp.PretrainStage(model)
    with torch.no_grad():
        one, other = (stage.measure(model.denoiser, evaluation_of(root, batch=batch)) for batch in (5, 64))
    assert one == pytest.approx(other, rel=1e-4)


def test_distance_is_zero_for_the_real_images_and_grows_with_noise(root):
    evaluation, distances = evaluation_of(root), []
    for noise in (0.0, 0.1, 0.5):
        rng = torch.Generator().manual_seed(0)
        metrics = evaluation.compare_reconstructed(lambda x, s=noise, r=rng: x + s * torch.randn(x.shape, generator=r))
        distances.append(metrics["fd"])
    assert distances[0] == pytest.approx(0, abs=1e-4)
    assert distances[0] < distances[1] < distances[2]


def test_images_are_chosen_evenly_among_few_classes_and_split(root):
    source = open_source(str(root / "images"), "val")
    chosen = choose_images(source, 12, 2)
    labels = torch.from_numpy(source.labels[chosen])
    assert sorted(labels.bincount(minlength=3).tolist()) == [0, 6, 6]
    assert np.array_equal(chosen, choose_images(source, 12, 2))
    voting, scored, renumbered = split_classes(labels)
    assert (int(voting.sum()), int(scored.sum())) == (8, 4)
    assert not (voting & scored).any()
    assert renumbered.unique().tolist() == [0, 1]
    assert split_classes(torch.tensor([4, 4, 7]))[0].tolist() == [True, False, False]


# -------------------- the run


def test_evaluation_changes_no_number_of_training(root, tmp_path):
    assert main(pretrain(root, tmp_path / "plain")) == 0
    for name in ("model", "model-ema"):
        plain, seen = (load_file(out / f"{name}.safetensors") for out in (tmp_path / "plain", root / "run"))
        assert all(torch.equal(plain[key], value) for key, value in seen.items())
    assert lines(tmp_path / "plain") == [line for line in lines(root / "run") if "loss" in line]


@pytest.mark.parametrize("stop_in", ["loss", "measure"])
def test_a_stopped_run_neither_repeats_nor_loses_an_evaluation(root, tmp_path, monkeypatch, stop_in):
    """The signal comes in the step that is evaluated, or in its evaluation; settings of evaluation may change then."""
    original, calls = getattr(addp.PretrainStage, stop_in), []

    def with_signal(self, *arguments):
        calls.append(arguments)
        if len(calls) == (4 if stop_in == "loss" else 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(addp.PretrainStage, stop_in, with_signal)
        with pytest.raises(SystemExit):
            main(evaluated(root, tmp_path / "run"))
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [2]
    assert main(evaluated(root, tmp_path / "run", "train.keep_best=probe", "data.workers=1")) == 0
    assert lines(tmp_path / "run") == lines(root / "run")
    assert "probe" in json.loads((tmp_path / "run" / "best.json").read_text())


def test_two_processes_measure_what_one_does(root, tmp_path):
    settings = ["train.steps=2", *(f"model.{key}=0" for key in ("encoder.dropout", "decoder.dropout"))]
    settings += ["model.encoder.input_dropout=0", "evaluation.images=23", "evaluation.samples=7"]
    assert main(evaluated(root, tmp_path / "one", *settings)) == 0
    ended = run_ranks(evaluated(root, tmp_path / "two", *settings), tmp_path / "job")
    assert ended.codes == [0, 0], ended.text
    (one,), (two,) = (evaluations(tmp_path / name) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


def test_an_unreadable_image_of_one_process_leaves_no_image_of_another_out(root, tmp_path):
    """Of 21 images, the first process has 11; without one of the second's, the average share is a round of 10."""
    images = shutil.copytree(root / "images", tmp_path / "images")
    source = open_source(str(images), "val")
    Path(source.name(choose_images(source, 21, 100)[1])).write_bytes(b"no image")
    settings = [f"evaluation={images}", "evaluation.images=21", "evaluation.batch=10", "data.max_errors=3"]
    settings += ["train.steps=2", *(f"model.{key}=0" for key in ("encoder.dropout", "decoder.dropout"))]
    settings += ["model.encoder.input_dropout=0", "evaluation.samples=7"]
    assert main(evaluated(root, tmp_path / "one", *settings)) == 0
    ended = run_ranks(evaluated(root, tmp_path / "two", *settings), tmp_path / "job")
    assert ended.codes == [0, 0], ended.text
    (one,), (two,) = (evaluations(tmp_path / name) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


def test_held_out_images_are_not_trained_on(root, tmp_path, capsys):
    settings = ["evaluation.held_out=0.25", "train.steps=2", "evaluation.knn=2"]
    assert main(pretrain(root, tmp_path / "run", *settings)) == 0
    assert "6 of 24 images are held out for validation (evaluation.held_out=0.25, seed 0)" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["datasets"]["train"]["images"] == 18
    assert len(evaluations(tmp_path / "run")) == 1
    assert main(pretrain(root, tmp_path / "run", "train.steps=3")) == 2  # other training images
    assert "evaluation.held_out=0.0 (was 0.25)" in last_line(capsys)


def test_unlabelled_images_can_be_held_out_for_what_needs_no_labels(root, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((root / "images" / "val").rglob("*.png"))):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    settings = [f"data={flat}", "evaluation.held_out=0.5", "evaluation.knn=0", "evaluation.probe=false"]
    assert main(pretrain(root, tmp_path / "run", *settings, "train.steps=1", "evaluation.samples=0")) == 0
    assert [line.keys() for line in evaluations(tmp_path / "run")] == [{"step", "val_loss"}]


# -------------------- mistakes


MISTAKES = {
    "keep_best=kn": "train.keep_best: found 'kn', expected a metric that this run evaluates: val_loss, knn, probe, fd",
    "keep_best=knn evaluation=": "train.keep_best=knn: this run evaluates nothing; expected",
    "evaluation={flat}": "{flat} has no class folders for its 6 images",
    "evaluation={single}": "{single} has 1 classes of two images or more, expected at least two such classes",
    "evaluation=missing": "evaluation.data: missing does not exist",
    "evaluation.held_out=0.1": "held_out: found 0.1 beside data=",
    "evaluation.inception=missing.pth": "evaluation.inception: missing.pth: no such file",
    "evaluation.samples=3": "evaluation: found 3 images, expected more than 3, as precision and recall need",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_mistakes_are_errors_before_training(root, tmp_path, capsys, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    folders = {"flat": tmp_path / "flat", "single": tmp_path / "single"}
    for folder in (folders["flat"], folders["single"] / "only"):
        folder.mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (24, 16)).save(folder / f"{i}.png")
    given = setting.format(**folders).replace("keep_best", "train.keep_best").split()
    assert main(evaluated(root, tmp_path / "run", *given)) == 2
    assert MISTAKES[setting].format(**folders) in last_line(capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_comparing_images_without_torch_fidelity_says_what_to_install(root, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("addp_core.training.extractors")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_base", None)
    assert main(evaluated(root, tmp_path / "run")) == 2
    assert "pip install 'addp[gen]', or set evaluation.samples=0" in last_line(capsys)


def test_the_random_extractor_is_the_same_everywhere():
    from addp_core.training.extractors import RandomExtractor

    images = (255 * torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))).byte()
    features = RandomExtractor()(images)[0]
    assert features.shape == (2, 240)
    assert torch.equal(features, RandomExtractor()(images)[0])
    assert not torch.allclose(features[0], features[1], rtol=1e-3)


def test_a_model_without_evaluation_measures_nothing():
    stage = addp.PretrainStage(tiny_addp())
    assert stage.evaluate(stage.model, 1) == {}
    assert stage.metrics == {}


def test_images_without_a_label_are_of_no_class(root, tmp_path):
    """Every third of the 30 images in a tar file has no label."""
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for i, path in enumerate(sorted((root / "images" / "val").rglob("*.png"))):
            tar.add(path, f"{i:03}.png")
            if i % 3:
                label = str(i % 2).encode()
                member = tarfile.TarInfo(f"{i:03}.cls")
                member.size = len(label)
                tar.addfile(member, io.BytesIO(label))
    settings = [f"evaluation={tmp_path / 'val.tar'}", "train.steps=1", "evaluation.samples=0"]
    assert main(pretrain(root, tmp_path / "run", *settings)) == 0
    assert evaluations(tmp_path / "run")[-1].keys() >= {"knn", "probe", "val_loss"}
    source = open_source(str(tmp_path / "val.tar"))
    assert len(choose_images(source, 100, 100)) == 20
