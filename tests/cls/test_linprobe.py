"""`addp linprobe`: both modes through the verb, resuming after an interruption, and wrong input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import tiny_addp
from torch import nn
from transfers import write_color_images

import cls.linprobe
import cls.probing.fast
import cls.probing.full
from addp_core import load_encoder, save_model
from addp_core.data.images import eval_transform
from addp_core.data.sources import open_source
from addp_core.networks.classifier import normalize
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.networks.pooled_features import PooledFeatures
from addp_core.recipes.cli import main
from addp_core.recipes.config import find_recipe, load
from addp_core.training import feature_files
from addp_core.training.optimization import make_optimizer
from addp_core.training.stage import TrainConfig
from addp_core.weights.frozen import spaced_blocks
from addp_core.weights.loading import load_classifier
from cls.evaluation import evaluate_classifier
from cls.probing.recipe import Recipe

HW = (8, 12)
COLORS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 50)}


pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with noisy images of three colors in `data`, and an ADDP of two blocks in model.safetensors."""
    root = tmp_path_factory.mktemp("files")
    write_color_images(root / "data", COLORS, HW, noise=50, train=14, val=7)
    save_model(tiny_addp(HW), root / "model.safetensors")
    return root


def linprobe(files: Path, out: Path, *settings: str) -> int:
    """Run `addp linprobe`, and return its exit code."""
    keys = {"model": files / "model.safetensors", "data": files / "data", "data.size": "[8,12]", "data.workers": 0}
    keys |= {"eval_batch": 5, "out": out} | dict(setting.split("=", 1) for setting in settings)
    return main(["linprobe", *(f"{key}={value}" for key, value in keys.items())])


def fast(files: Path, out: Path, *settings: str) -> int:
    options = ("mode=fast", "fast.epochs=15", "fast.batch=16", "fast.knn=3", "fast.shard=8")
    return linprobe(files, out, *options, *settings)


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def top1_of_file(files: Path, path: Path) -> float:
    """Return the top-1 accuracy of a saved classifier on the validation images."""
    model = load_classifier(path)
    val = open_source(str(files / "data"), "val", model.class_names)
    scores = evaluate_classifier(model, val, eval_transform(HW), 3, mean=model.mean, std=model.std, workers=0, batch=4)
    return scores.metrics["top1"]


def assert_refused(capsys, code: int, *parts: str) -> None:
    """Check that the exit code is 2 and that the message contains all `parts`."""
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("addp: ")
    assert all(part in line for part in parts), line


# -------------------- fast mode


def test_fast_mode_solves_a_separable_problem(files, tmp_path, capsys):
    save_model(load_encoder(files / "model.safetensors", HW), tmp_path / "encoder.safetensors")
    settings = (f"model={tmp_path / 'encoder.safetensors'}", "fast.poolings=[avg,token]")
    out = tmp_path / "out"
    assert fast(files, out, *settings) == 0
    table = capsys.readouterr().out
    found = results(out)
    assert [(row["block"], row["pooling"]) for row in found["rows"]] == [
        (1, "avg"), (1, "token"), (2, "avg"), (2, "token")
    ]  # fmt: skip
    assert found["best"]["held_out"] == max(row["held_out"] for row in found["rows"])
    assert found["best"]["top1"] == found["best"]["knn"] == 100
    assert "10% of the training images" in table
    assert table.count("*") == 2  # in the best row, and in the note below
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    assert (out / "images" / "blocks.png").stat().st_size > 0
    assert top1_of_file(files, out) == 100

    (tmp_path / "encoder.safetensors").unlink()  # a finished run does not read its inputs again
    assert fast(files, out, *settings) == 0
    assert capsys.readouterr().out == table


class CountingWriter:
    """A function that counts its calls, and is interrupted at one of them."""

    def __init__(self, write, interrupted_call: int | None = None):
        self.write, self.interrupted_call, self.calls = write, interrupted_call, 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.interrupted_call:
            raise KeyboardInterrupt
        self.write(*arguments)


def test_an_interrupted_fast_run_resumes_bit_for_bit(files, tmp_path, monkeypatch):
    shards, heads = CountingWriter(feature_files.save_file, 4), CountingWriter(cls.probing.fast.save_file, 2)
    monkeypatch.setattr(feature_files, "save_file", shards)
    monkeypatch.setattr(cls.probing.fast, "save_file", heads)
    interrupted, uninterrupted = tmp_path / "interrupted", tmp_path / "uninterrupted"
    settings = ("fast.mirrored=true", "data.max_errors=1")
    assert fast(files, interrupted, *settings) == 1  # while features are written
    assert (shards.calls, heads.calls) == (4, 0)
    assert fast(files, interrupted, *settings) == 1  # while heads are written
    assert (shards.calls, heads.calls) == (4 + 3 + 3, 2)  # 42 and 21 images in shards of 8, three written before
    assert fast(files, interrupted, *settings) == 0
    assert (shards.calls, heads.calls) == (10, 3)
    assert fast(files, uninterrupted, *settings) == 0
    assert results(interrupted) == results(uninterrupted)
    one, other = (load_file(out / "model.safetensors") for out in (interrupted, uninterrupted))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_cached_features_are_reused_only_for_the_same_settings(files, tmp_path, monkeypatch):
    cache = f"fast.cache={tmp_path / 'cache'}"
    assert fast(files, tmp_path / "a", cache, "fast.epochs=1") == 0
    shards = CountingWriter(feature_files.save_file)
    monkeypatch.setattr(feature_files, "save_file", shards)
    assert fast(files, tmp_path / "b", cache, "fast.epochs=2", "fast.lrs=[0.1]") == 0
    assert shards.calls == 0
    assert fast(files, tmp_path / "c", cache, "fast.epochs=1", "tokenizer_norm=true") == 0
    assert shards.calls == 6 + 3


def test_the_learning_rate_may_be_chosen_on_validation_images(files, tmp_path, capsys):
    assert fast(files, tmp_path / "out", "fast.held_out=0", "fast.knn=0", "fast.blocks=[-1]") == 0
    (row,) = results(tmp_path / "out")["rows"]
    assert row["top1"] == max(row["sweep"])
    assert row["block"] == 2
    assert "knn" not in row
    assert "chosen on the validation images themselves" in capsys.readouterr().out


def test_spaced_blocks_fit_any_depth(files, tmp_path):
    """The recipe `fast` names no blocks, so that it fits an encoder of two blocks."""
    assert [spaced_blocks(depth, 4) for depth in (24, 12, 6, 2)] == [
        [6, 12, 18, 24], [3, 6, 9, 12], [2, 3, 5, 6], [1, 2]
    ]  # fmt: skip
    keys = {"model": files / "model.safetensors", "data": files / "data", "data.size": "[8,12]", "data.workers": 0}
    keys |= {"out": tmp_path, "fast.epochs": 1, "fast.batch": 16, "train.precision": "fp32"}
    assert main(["linprobe", "fast", *(f"{key}={value}" for key, value in keys.items())]) == 0
    assert {row["block"] for row in results(tmp_path)["rows"]} == {1, 2}


# -------------------- full mode


FULL = ("train.steps=24", "train.batch=12", "train.warmup_epochs=0", "train.optimizer=sgd", "train.lr=0.2")


def test_full_mode_trains_only_the_head_and_accumulates_exactly(files, tmp_path):
    out, accumulated = tmp_path / "out", tmp_path / "accumulated"
    assert linprobe(files, out, *FULL, "train.evaluate_every=10") == 0
    assert linprobe(files, accumulated, *FULL, "train.accumulate=4") == 0
    expected, found = (load_file(path / "model.safetensors") for path in (out, accumulated))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert expected["fc_norm.running_mean"].abs().max() > 0.01
    assert "fc_norm.weight" not in expected  # a norm without affine parameters

    encoder = load_encoder(files / "model.safetensors", HW).state_dict()
    assert all(torch.equal(expected[f"encoder.{name}"], value) for name, value in encoder.items())
    checkpoint = torch.load(out / "checkpoints" / "step-24" / "training.pt", weights_only=True)
    assert not [name for name in checkpoint["model"] if "blocks" in name]

    scores = results(out)
    assert scores["last"]["step"] == 24
    assert scores["best"]["top1"] >= scores["last"]["top1"] > 90
    assert top1_of_file(files, out) == scores["last"]["top1"]
    assert top1_of_file(files, out / "model-best.safetensors") == scores["best"]["top1"]


@pytest.mark.slow
def test_two_processes_train_the_same_head_as_one(files, tmp_path):
    """The batch norm sees the features of both processes, which are the halves of one batch."""
    settings = ["train.steps=8", *FULL[1:]]
    assert linprobe(files, tmp_path / "one", *settings) == 0
    keys = [f"model={files / 'model.safetensors'}", f"data={files / 'data'}", "data.size=[8,12]", "data.workers=0"]
    arguments = ["linprobe", *keys, "eval_batch=5", *settings, f"out={tmp_path / 'two'}"]
    ended = run_ranks(arguments, tmp_path / "job")
    assert ended.codes == [0, 0], ended.text
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    assert not torch.equal(one["head.weight"], torch.zeros_like(one["head.weight"]))
    assert results(tmp_path / "two")["last"] == results(tmp_path / "one")["last"]


def test_lars_without_weight_decay_scales_the_updates_of_matrices_only():
    steps = []
    for scale in (1.0, 10.0):
        torch.manual_seed(0)
        head = nn.Linear(3, 2)
        before = [p.detach().clone() for p in head.parameters()]
        optimizer = make_optimizer(head, TrainConfig(optimizer="lars", weight_decay=0.0, lr=1.0))
        head(torch.ones(1, 3)).sum().mul(scale).backward()
        optimizer.step()
        steps.append([p.detach() - b for p, b in zip(head.parameters(), before, strict=True)])
    torch.testing.assert_close(steps[1][0], steps[0][0])
    torch.testing.assert_close(steps[1][1], 10 * steps[0][1])


def test_images_that_could_not_be_read_before_are_tried_again(files, tmp_path, capsys):
    """The features in a cache of several runs then are those of a cache that was filled when all images were there."""
    shutil.copytree(files / "data", tmp_path / "data")
    settings = [f"data={tmp_path / 'data'}", "fast.epochs=1", "fast.held_out=0", "data.max_errors=2"]
    assert fast(files, tmp_path / "whole", *settings, f"fast.cache={tmp_path / 'whole-cache'}") == 0
    paths = [tmp_path / "data" / split / "green" / "2.png" for split in ("train", "val")]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(b"-" * len(content))
    settings.append(f"fast.cache={tmp_path / 'cache'}")
    assert fast(files, tmp_path / "a", *settings) == 0
    assert (results(tmp_path / "a")["trained_on"], results(tmp_path / "a")["images"]) == (41, 20)
    capsys.readouterr()
    assert fast(files, tmp_path / "b", *settings) == 0  # named again, and no others are read
    log = capsys.readouterr().err
    assert "train: trying 1 images again" in log
    assert log.count("skipped an unreadable image") == 2
    assert_refused(
        capsys, fast(files, tmp_path / "c", *settings, "data.max_errors=0"), "more than 0 of 42 images are unreadable"
    )
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    (tmp_path / "b" / "finished.json").unlink()  # as if killed after its heads: they are of fewer images
    for name in "bd":
        assert fast(files, tmp_path / name, *settings) == 0
        assert results(tmp_path / name) == results(tmp_path / "whole")
    for folder in (tmp_path / "whole-cache").iterdir():
        for path in folder.iterdir():
            stored, expected = load_file(tmp_path / "cache" / folder.name / path.name), load_file(path)
            assert stored.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(stored[name], value, atol=2e-3, rtol=2e-3)  # batches round otherwise


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_a_finished_run_says_that_its_model_or_images_have_changed(files, tmp_path, caplog, mode):
    """The result stays, and is of what the run began with."""
    shutil.copytree(files / "data", tmp_path / "data")
    model = tmp_path / "model.safetensors"
    shutil.copy(files / "model.safetensors", model)
    settings = [f"model={model}", f"data={tmp_path / 'data'}", "train.batch=6"]
    settings += ["mode=full", "train.steps=1"] if mode == "full" else ["mode=fast", "fast.epochs=1", "fast.knn=3"]
    assert linprobe(files, tmp_path / "out", *settings) == 0
    before = results(tmp_path / "out")
    caplog.clear()
    assert linprobe(files, tmp_path / "out", *settings) == 0
    assert "changed" not in caplog.text

    save_model(tiny_addp(HW, seed=1), model)
    assert linprobe(files, tmp_path / "out", *settings) == 0
    assert f"model: {model} has changed since this run began" in caplog.text
    assert "for a result of this one choose another out" in caplog.text
    caplog.clear()
    shutil.copy(files / "model.safetensors", model)
    (tmp_path / "data" / "val" / "green" / "2.png").unlink()
    assert linprobe(files, tmp_path / "out", *settings) == 0
    assert "model: " not in caplog.text
    assert "data: changed since this run read it: val: 20 images instead of 21" in caplog.text
    assert results(tmp_path / "out") == before
    caplog.clear()
    shutil.rmtree(tmp_path / "data")
    model.unlink()
    assert linprobe(files, tmp_path / "out", *settings) == 0  # what is gone has not changed
    assert "changed" not in caplog.text


# -------------------- the probed features


@pytest.fixture(scope="module")
def mage(files) -> list[str]:
    """Return the settings for an encoder over token ids."""
    model = tiny_addp(HW)
    model.predictor.trained_on = ""
    save_model(model.predictor, files / "mage.safetensors", model.config.grid)
    save_model(model.tokenizer, files / "vqgan.safetensors")
    return [f"model={files / 'mage.safetensors'}", f"tokenizer={files / 'vqgan.safetensors'}"]


@pytest.mark.parametrize("normalisation", ["imagenet", "half"])
def test_fast_mode_over_token_ids_saves_the_probed_classifier(files, mage, normalisation, tmp_path):
    """The classifier ends at the probed block, and computes the features that the head was trained on."""
    settings = ("fast.blocks=[1]", "fast.store=float32", "fast.epochs=1", f"normalisation={normalisation}")
    assert fast(files, tmp_path, *mage, *settings) == 0
    model = load_classifier(tmp_path)
    assert len(model.encoder.blocks) == 1
    (bank,) = (tmp_path / "features").glob("val-*")
    stored = load_file(bank / "00000.safetensors")
    val = open_source(str(files / "data"), "val")
    pixels = torch.stack([eval_transform(HW, 0.875)(val.open_image(int(i))[0]) for i in stored["indices"]])
    with torch.no_grad():
        tokens = model.forward_features(normalize(pixels, model.mean, model.std))
    torch.testing.assert_close(stored["block1.avg"][:, 0], model.pool(tokens), rtol=1e-4, atol=1e-5)


def test_full_mode_over_token_ids_ends_at_the_probed_block(files, mage, tmp_path):
    assert linprobe(files, tmp_path, *mage, "block=1", "train.steps=1", "train.batch=6") == 0
    assert len(load_classifier(tmp_path).encoder.blocks) == 1


def test_pooled_features_of_blocks_poolings_and_views(files):
    images = torch.randn(2, 3, *HW, generator=torch.Generator().manual_seed(0))
    encoder = load_encoder(files / "model.safetensors", HW)
    found = PooledFeatures(encoder, [1, 2], ["token", "avg"], mirrored=True)(images)
    assert found.shape == (2, 2, 2, 2, 16)
    for k, tokens in enumerate(encoder.forward_tokens(images, [0, 1])):
        torch.testing.assert_close(found[:, 0, k, 0], tokens[:, 0])
        torch.testing.assert_close(found[:, 0, k, 1], tokens[:, 1:].mean(1))
    torch.testing.assert_close(found[:, 1], PooledFeatures(encoder, [1, 2], ["token", "avg"])(images.flip(-1))[:, 0])
    normed = load_encoder(files / "model.safetensors", HW, tokenizer_norm=True)
    assert not torch.allclose(PooledFeatures(normed, [1], ["avg"])(images)[:, 0, 0, 0], found[:, 0, 0, 1], atol=1e-2)


def test_the_classifier_has_the_block_pooling_and_norm_of_the_recipe(files, tmp_path):
    settings = ("block=-2", "pooling=token", "tokenizer_norm=true", "train.steps=1", "train.batch=6")
    assert linprobe(files, tmp_path / "out", *settings) == 0
    model = load_classifier(tmp_path / "out")
    assert len(model.encoder.blocks) == 1
    assert (model.pooling, model.norm, model.encoder.config.tokenizer_norm) == ("token", "batch", True)
    assert model.class_names == tuple(COLORS)


def test_random_initialization_depends_on_the_seed(files, tmp_path):
    for name in ("a", "b"):
        assert fast(files, tmp_path / name, "init=random", "fast.epochs=1") == 0
    assert fast(files, tmp_path / "c", "init=random", "fast.epochs=1", "train.seed=1") == 0
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.cls_token"], c["encoder.cls_token"])


def test_published_recipe():
    """App. D.2: a recipe that drifts from the published numbers is a bug."""
    recipe = load(Recipe, find_recipe(cls.linprobe, "vit_b_90ep"), ["out=x", "model=x"])
    train, data = recipe.train, recipe.data
    assert (recipe.mode, recipe.pooling, recipe.block) == ("full", "avg", -1)
    assert (recipe.norm, recipe.batch_norm) == ("layer", 512)  # MAE's and MAGE's code, for the average
    assert (train.epochs, train.warmup_epochs, train.batch) == (90, 10, 16384)
    assert (train.optimizer, train.peak_lr, train.weight_decay) == ("lars", 6.4, 0)
    assert (train.schedule, train.min_lr) == ("cosine", 0)
    assert (data.size, data.scale, data.flip) == (256, (0.08, 1), True)
    norm = cls.probing.full.build_classifier(recipe, Encoder(EncoderConfig(16, 1, 2), (8, 8), 4), ("a", "b")).fc_norm
    assert isinstance(norm, nn.BatchNorm1d)
    assert not norm.affine


# -------------------- wrong input


def test_wrong_settings_are_refused(files, tmp_path, capsys):
    assert_refused(capsys, linprobe(files, tmp_path / "a", "block=3"), "block: found 3", "1 to 2")
    assert_refused(capsys, linprobe(files, tmp_path / "b", "block=0"), "block: found 0")
    assert_refused(capsys, fast(files, tmp_path / "c", "fast.blocks=[1,-3]"), "fast.blocks: found -3")
    assert_refused(capsys, fast(files, tmp_path / "d", "fast.lrs=[0.1,0.1]"), "fast.lrs")
    assert_refused(capsys, linprobe(files, tmp_path / "f", "train.parallel=fsdp"), "train.parallel: found fsdp")
    encoder = tmp_path / "encoder.safetensors"
    save_model(load_encoder(files / "model.safetensors", HW), encoder)
    assert_refused(capsys, linprobe(files, tmp_path / "e", f"model={encoder}", "tokenizer_norm=true"), "tokenizer_norm")


def test_datasets_without_labels_or_with_other_classes_are_refused(files, tmp_path, capsys):
    flat = files / "data" / "train" / "red"
    assert_refused(capsys, linprobe(files, tmp_path / "a", f"data={flat}"), "class")
    image = Image.open(next(flat.iterdir()))
    for name in ("blue", "red"):
        folder = tmp_path / "few" / "val" / name
        folder.mkdir(parents=True)
        image.save(folder / "0.png")
    assert_refused(capsys, linprobe(files, tmp_path / "b", f"val={tmp_path / 'few'}"), "green")
    (tmp_path / "few" / "val" / "mauve").mkdir()
    image.save(tmp_path / "few" / "val" / "mauve" / "0.png")
    assert_refused(capsys, fast(files, tmp_path / "c", f"val={tmp_path / 'few'}"), "mauve")


def test_one_class_is_refused(files, tmp_path, capsys):
    write_color_images(tmp_path / "one", {"red": COLORS["red"]}, HW, train=4, val=2)
    for run in (linprobe, fast):
        code = run(files, tmp_path / "out", f"data={tmp_path / 'one'}")
        assert_refused(capsys, code, "data.source", "one class, 'red'", "at least two")


def test_features_beyond_float16_are_refused(files, tmp_path, capsys):
    model = tiny_addp(HW)
    with torch.no_grad():
        model.denoiser.encoder.pos_embed[:, 1:] += 1e5
    save_model(model, tmp_path / "model.safetensors")
    settings = (f"model={tmp_path / 'model.safetensors'}", "fast.blocks=[1]", "fast.epochs=1")
    assert_refused(capsys, fast(files, tmp_path / "a", *settings), "fast.store=float32")
    assert fast(files, tmp_path / "b", *settings, "fast.store=float32") == 0
