"""`addp pretrain` with a CNN in place of the ViT, as a user runs it: on two processes, stopped and continued."""

from pathlib import Path

import pytest
import torch
from checks import assert_user_error
from image_data import noise_image, save_image
from ranks import Fault, run_ranks
from safetensors.torch import load_file
from tiny import tiny_addp

from addp_core import load_addp, save_model
from addp_core.method.addp import ADDPConfig
from addp_core.networks.cnn import CnnConfig
from addp_core.recipes.cli import main
from addp_core.recipes.config import load_recipe
from pretrain import addp as pretrain

SETTINGS = [
    "data.size=[8,12]",
    "data.workers=0",
    "model.encoder.arch=test_resnet",
    "model.encoder.width=16",
    "model.decoder.depth=1",
    "model.decoder.heads=2",
    "model.decoder.dropout=0",
    "train.steps=6",
    "train.batch=4",
    "train.lr=0.001",
    "train.log_every=1",
    "train.ema=0.9",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with images, frozen parts, and a finished run of one process."""
    root = tmp_path_factory.mktemp("cnn")
    for i in range(12):
        save_image(root / "photos" / f"{i}.png", noise_image(20, 16, seed=i))
    model = tiny_addp()
    save_model(model.tokenizer, root / "tokenizer.safetensors")
    save_model(model.predictor, root / "predictor.safetensors", grid=(4, 6))
    assert main(arguments(root, root / "run")) == 0
    return root


def arguments(root: Path, out: Path, *settings: str) -> list[str]:
    parts = [f"{part}={root / part}.safetensors" for part in ("tokenizer", "predictor")]
    return ["pretrain", f"data={root / 'photos'}", *parts, f"out={out}", *SETTINGS, *settings]


def test_a_run_is_generated_from(root, tmp_path):
    model = load_addp(root / "run")
    assert model.config.denoiser.encoder == CnnConfig("test_resnet", 16)
    assert main(["generate", f"model={root / 'run'}", f"out={tmp_path / 'images'}", "n=2", "sampling.steps=3"]) == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 2


def test_processes_share_statistics_and_a_stopped_run_continues_exactly(root, tmp_path):
    """Each process normalizes with its own images on a CPU; what is stored is the mean of their statistics."""
    settings = ["train.steps=3", "train.export_every=1"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for out, fault in ((whole, ()), (stopped, Fault("SIGTERM", "step", count=2)), (stopped, ())):
        log = tmp_path / f"{out.name}-{fault != ()}"
        ended = run_ranks(arguments(root, out, *settings), log, fault=fault)
        assert ended.codes == [0, 0], ended.text
        assert (out / "model.safetensors").exists() == (fault == ())
    for name in ("model.safetensors", "model-ema.safetensors"):
        one, other = load_file(whole / name), load_file(stopped / name)
        assert all(torch.equal(one[key], other[key]) for key in one)

    assert main(arguments(root, tmp_path / "one", *settings)) == 0
    one, two = (load_file(tmp_path / name / "models/step-1/model.safetensors") for name in ("one", "whole"))
    name = "denoiser.encoder.body.conv1.1.running_mean"  # of the first norm, which other norms do not influence
    assert one[name].abs().max() > 1e-4
    torch.testing.assert_close(two[name], one[name])


def test_the_recipe_of_resnet50():
    recipe = load_recipe(pretrain, "resnet50_300ep", ["out=x", "tokenizer=t", "predictor=p"])
    assert recipe.model.encoder == CnnConfig("resnet50", 768)
    assert recipe.model.decoder == ADDPConfig().denoiser.decoder
    train = recipe.train
    assert (train.epochs, train.batch, train.betas, train.warmup_epochs) == (300, 2048, (0.9, 0.98), 10)
    assert (train.optimizer, train.weight_decay, train.clip_grad, train.base_lr) == ("adamw", 0.05, 3.0, 1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.encoder.arch=resnet5", "model.encoder.arch: found 'resnet5', expected a CNN of timm"),
        ("process.ids_to=encoder+decoder", "process.ids_to: found encoder+decoder, but test_resnet takes pixels alone"),
        ("model.encoder.heads=2", "unknown key 'model.encoder.heads'; the keys of model.encoder are here arch"),
    ],
)
def test_mistakes(root, tmp_path, setting, message):
    assert_user_error(lambda: load_recipe(pretrain, None, [*SETTINGS, f"out={tmp_path}", setting]), message)
