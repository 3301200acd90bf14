"""Fine-tuning, linear probing, robustness and export of a CNN, through their verbs."""

import json
from pathlib import Path

import pytest
import timm
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import random_tensor, tiny_cnn_addp
from transfers import NO_AUGMENTATION, write_color_images

from addp_core import load_classifier, load_encoder, save_model
from addp_core.networks.classifier import Classifier
from addp_core.networks.cnn import CnnEncoder
from addp_core.recipes.cli import main
from addp_core.recipes.config import load_recipe
from cls import finetune
from cls.finetune import layer_table

pytestmark = pytest.mark.usefixtures("no_curves")
DATA = ["data.size=32", "data.workers=0", "data.scale=[0.5,1]"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images of three colors and an ADDP with a CNN."""
    root = tmp_path_factory.mktemp("cnn")
    write_color_images(root / "colors", hw=(32, 32))
    save_model(tiny_cnn_addp(image_size=(32, 32)), root / "addp.safetensors")
    return root


def arguments(root: Path, verb: str, out: Path, *settings: str) -> list[str]:
    return [verb, f"data={root / 'colors'}", *DATA, f"model={root / 'addp.safetensors'}", f"out={out}", *settings]


def finetuning(root: Path, out: Path, *settings: str) -> list[str]:
    train = ["train.batch=8", "train.lr=0.003", "train.layer_decay=null", "drop_path=0.05", "loss=bce"]
    return arguments(root, "finetune", out, *train, *(f"{k}={v!r}" for k, v in NO_AUGMENTATION.items()), *settings)


def statistics(path: Path, prefix: str = "encoder.") -> dict[str, torch.Tensor]:
    state = load_file(path)
    return {key.removeprefix(prefix): value for key, value in state.items() if "running_" in key and prefix in key}


@pytest.fixture(scope="module")
def finetuned(root) -> Path:
    assert main(finetuning(root, root / "run", "train.steps=30")) == 0
    return root / "run"


def test_it_learns_and_feeds_everything_else(root, finetuned, tmp_path):
    results = json.loads((finetuned / "results.json").read_text())
    assert results["last"]["top1"] > 60
    model = load_classifier(finetuned)
    assert isinstance(model.encoder, CnnEncoder)
    assert (model.norm, model.pooling, model.head.weight.shape) == ("none", "avg", (3, 96))
    assert load_encoder(finetuned, 32).config.arch == "test_resnet"
    settings = [f"model={finetuned}", f"out={tmp_path / 'again'}", "train.lr=0", "train.steps=1", "train.batch=8"]
    assert main(["finetune", f"data={root / 'colors'}", *DATA, *settings, "train.layer_decay=null"]) == 0
    again = load_classifier(tmp_path / "again")
    assert torch.equal(again.head.weight, model.head.weight)  # its head was taken too


def test_processes_share_their_statistics(root, tmp_path):
    """With a learning rate of 0, one step on two processes moves the first means as one step on one process does."""
    settings = ["train.steps=1", "train.lr=0"]
    assert main(finetuning(root, tmp_path / "one", *settings)) == 0
    ended = run_ranks(finetuning(root, tmp_path / "two", *settings), tmp_path / "job")
    assert ended.codes == [0, 0], ended.text
    one, two = (statistics(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    before = statistics(root / "addp.safetensors", "denoiser.encoder.")
    name = "body.conv1.1.running_mean"
    assert not torch.allclose(one[name], before[name])
    torch.testing.assert_close(two[name], one[name])


def test_exported_to_timm_it_is_timms_own_model(finetuned, tmp_path):
    assert main(["export", f"model={finetuned}", f"out={tmp_path / 'timm'}", "layout=timm"]) == 0
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_resnet", 3)
    assert "model_args" not in config
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = random_tensor(2, 3, 48, 48)
    torch.testing.assert_close(theirs(images), load_classifier(finetuned)(images))


def test_a_pretrained_encoder_exports_to_timm_too(root, tmp_path):
    settings = [f"model={root / 'addp.safetensors'}", f"out={tmp_path / 'timm'}", "layout=timm"]
    assert main(["export", *settings]) == 0
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, features_only=True).eval()
    images = random_tensor(2, 3, 64, 64)
    ours = load_encoder(root / "addp.safetensors", 64).forward_maps(images, range(4))
    for found, expected in zip(theirs(images)[-4:], ours, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_linear_probing_freezes_the_statistics(root, tmp_path, mode):
    settings = ["train.batch=8", "train.optimizer=sgd", "train.lr=0.1", "train.steps=4", "fast.epochs=2"]
    assert main(arguments(root, "linprobe", tmp_path / "run", f"mode={mode}", *settings)) == 0
    found = statistics(tmp_path / "run" / "model.safetensors")
    before = statistics(root / "addp.safetensors", "denoiser.encoder.")
    assert found.keys() == before.keys()
    assert all(torch.equal(found[key], before[key]) for key in found)
    model = load_classifier(tmp_path / "run")
    assert model.norm == "batch"
    assert main(["export", f"model={tmp_path / 'run'}", f"out={tmp_path / 'timm'}", "layout=timm"]) == 0
    images = random_tensor(2, 3, 32, 32)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(images), model(images), atol=1e-4, rtol=1e-4)


def test_robustness_reads_it(root, finetuned, tmp_path):
    settings = [f"model={finetuned}", f"out={tmp_path / 'r'}", f"val={root / 'colors'}", "workers=0"]
    assert main(["robustness", *settings]) == 0
    report = json.loads((tmp_path / "r" / "results.json").read_text())
    top1 = json.loads((finetuned / "results.json").read_text())["last"]["top1"]
    assert report["rows"][0]["top1"] == pytest.approx(top1)


@pytest.mark.parametrize(
    ("verb", "setting", "message"),
    [
        ("finetune", "pooling=token", "pooling=token: test_resnet has no class token; expected avg"),
        ("finetune", "dropout=0.1", "is a test_resnet, which has none; leave the key out"),
        ("linprobe", "block=2", "block: found 2, expected 4 to 4, or -1 to -1 from the end (those before have fewer"),
        ("linprobe", "norm=pretrained", "norm=pretrained: test_resnet has no final norm; expected norm=layer or"),
    ],
)
def test_mistakes(root, tmp_path, verb, setting, message, capsys):
    assert main(arguments(root, verb, tmp_path / "run", setting)) == 2
    assert message in capsys.readouterr().err


def test_layers_are_those_of_timm():
    """For layer-wise learning rate decay, which the recipes of ResNet-50 do not use."""
    encoder = load_encoder("resnet18", 32, init="random")
    table = layer_table(Classifier(encoder, 3, norm="none"), finetune.TrainConfig(layer_decay=0.5))
    rows = [line.split() for line in table.splitlines()[1:]]
    assert len(rows) == 1 + 8 + 1  # stem, two blocks in each of four stages, head
    assert rows[0][4:] == ["conv1,", "bn1"]
    assert rows[-1][4:] == ["head"]


@pytest.mark.parametrize(
    ("name", "epochs", "rate", "drop_path", "auto", "repeats"),
    [
        ("resnet50_100ep", 100, 12e-3, 0.0, "rand-m6-mstd0.5-inc1", 1),
        ("resnet50_300ep", 300, 8e-3, 0.05, "rand-m7-mstd0.5-inc1", 3),
    ],
)
def test_published_recipes(name, epochs, rate, drop_path, auto, repeats):
    recipe = load_recipe(finetune, name, ["out=x", "model=y", "data=z"])
    augment, train = recipe.augment, recipe.train
    assert (recipe.loss, recipe.drop_path, recipe.data.size) == ("bce", drop_path, 224)
    assert (augment.auto, augment.repeats, augment.mixup, augment.cutmix) == (auto, repeats, 0.1, 1.0)
    assert (augment.smoothing, augment.erase) == (0.1, 0.0)
    assert (train.epochs, train.batch, train.peak_lr, train.weight_decay) == (epochs, 2048, rate, 0.02)
    assert (train.betas, train.warmup_epochs, train.layer_decay) == ((0.9, 0.999), 5, None)
