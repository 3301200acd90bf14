"""Runs of `addp tokenizer`: they continue exactly, train on black images, refuse wrong keys, and export the tokenizer
alone."""

import json
import shutil

import pytest
import torch
from PIL import Image
from small_tokenizer import MODEL, SIZE, smooth_images

from addp_core.base.errors import UserError
from addp_core.networks.tokenizer import Tokenizer
from addp_core.recipes import config as recipes
from addp_core.training.metrics import RunLogger
from addp_core.weights.loading import load_tokenizer
from pretrain import tokenizer as tokenizer_stage
from pretrain.losses import PatchDiscriminator
from pretrain.tokenizer import Recipe, TokenizerTraining


@pytest.fixture(scope="module", autouse=True)
def without_curves():
    """Do not plot curves, which takes a second for each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "plot_curves", lambda self: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(smooth_images(6, size=32)):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(root / f"{number}.png")
    return root


def load(folder, out, *settings: str) -> Recipe:
    """A recipe with every loss term except the perceptual one, for six steps of two micro-steps."""
    tiny = [
        f"data.source={folder}", f"out={out}", f"data.size={SIZE}", "data.workers=0", "model.width=32",
        "model.multipliers=[1,1]", "model.blocks=1", "model.codebook=16", "model.dim=4", "loss.adversarial=0.1",
        "loss.adversarial_start=2", "loss.adversarial_balance=adaptive", "loss.discriminator_layers=1",
        "loss.discriminator_width=32", "loss.revive_after=2", "train.steps=6", "train.batch=4", "train.accumulate=2",
        "train.lr=1e-3", "train.schedule=constant", "train.log_every=1", "train.checkpoint_every=3",
    ]  # fmt: skip
    return recipes.load(Recipe, None, [*tiny, *settings])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    tokenizer_stage.run(load(folder, out))
    return out


def test_exported_file_is_the_tokenizer_alone(finished):
    tokenizer = load_tokenizer(finished)
    assert tokenizer.grid == (12, 12)
    assert set(tokenizer.state_dict()) == set(Tokenizer(MODEL).state_dict())
    state = torch.load(finished / "checkpoints/step-6/training.pt", weights_only=True)["model"]
    assert any(name.startswith("discriminator.") for name in state)
    training = TokenizerTraining(Tokenizer(MODEL), PatchDiscriminator(32, 1))
    training.load_state_dict(state)
    ids = tokenizer.encode(smooth_images())
    assert torch.equal(ids, training.tokenizer.encode(smooth_images()))
    assert torch.equal(tokenizer.lookup(ids), training.tokenizer.lookup(ids, (12, 12)))


def test_run_folder(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {"l1", "commitment", "psnr", "usage", "perplexity", "revived", "adversarial", "discriminator"} <= set(
        lines[-1]
    )
    assert "adversarial" not in lines[0]
    with Image.open(finished / "images" / "recon-6.png") as image:
        assert image.width > 2 * SIZE
    before = (finished / "model.safetensors").stat().st_mtime_ns
    tokenizer_stage.run(recipes.load(Recipe, finished / "recipe.yaml", []))
    assert (finished / "model.safetensors").stat().st_mtime_ns == before


def test_continued_run_equals_one_that_never_stopped(folder, finished, tmp_path):
    for steps in (3, 6):
        tokenizer_stage.run(load(folder, tmp_path / "run", f"train.steps={steps}"))
    runs = [tmp_path / "run", finished]
    states = [torch.load(run / "checkpoints/step-6/training.pt", weights_only=True)["model"] for run in runs]
    assert {"count", "total", "idle", "tokenizer.quantize.embedding.weight"} <= set(states[0])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("recipe", ["tiny", "vqgan_256"])
def test_black_images_train(folder, tmp_path, recipe):
    """Exactly black maps have no variance, at which the derivative of a norm is 1000: no step may be skipped."""
    shutil.copytree(folder, tmp_path / "images")
    for number in range(2):
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "images" / f"black{number}.png")
    tiny = [
        f"data={tmp_path / 'images'}", f"out={tmp_path / 'run'}", "data.size=32", "data.workers=0", "model.width=32",
        "train.batch=4", "train.steps=5", "train.lr=2e-3", "train.warmup_steps=1", "train.log_every=1",
        "loss.discriminator_width=32", "loss.discriminator_layers=1", "loss.adversarial_start=3",
    ]  # fmt: skip
    tokenizer_stage.run(recipes.load(Recipe, recipes.recipes_of(tokenizer_stage)[recipe], tiny))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0] * 5
    assert lines[-1]["l1"] < 0.8 * lines[0]["l1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.size=25"], r"data\.size: image size 25 x 25: expected multiples of the tokenizer's stride 2"),
        (["loss.discriminator_layers=4"], r"loss\.discriminator_layers: found 4, for images of at least 48 pixels"),
        (
            ["loss.adversarial=0", "loss.perceptual_weights=vgg.pth"],
            r"loss\.perceptual_weights: vgg\.pth: no such file",
        ),
        (["loss.l1=0"], r"loss\.l1: found 0"),
        (["loss.codebook_decay=1"], r"loss\.codebook_decay: found 1, expected a number >= 0 and < 1"),
        (["loss.revive_after=0"], r"loss\.revive_after: found 0, expected a whole number >= 1 or null"),
        (["loss.revive=3"], r"unknown key 'loss\.revive'; did you mean 'loss\.revive_after'"),
        (["train.compile=true"], r"train\.compile: found true, expected false with loss\.adversarial_balance=adaptive"),
        (["model.width=48"], r"model\.width: found 48, expected a multiple of groups = 32"),
    ],
)
def test_bad_input(folder, tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as error:
        tokenizer_stage.run(load(folder, tmp_path / "run", *settings))
    assert "\n" not in str(error.value)
