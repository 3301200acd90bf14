"""MAE, the baseline: its positions, its target, what the encoder sees, and `addp mae` from images to a transfer."""

import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from toy_stage import metrics
from transfers import write_color_images

from addp_core import load_encoder
from addp_core.networks.config import EncoderConfig, MaeConfig, PixelDecoderConfig
from addp_core.networks.mae import (
    MaskedAutoencoder,
    draw_visible,
    from_patches,
    mark_visible,
    sincos_positions,
    to_patches,
)
from addp_core.recipes.cli import main

CONFIG = MaeConfig(EncoderConfig(16, 2, 2), patch_size=4, decoder=PixelDecoderConfig(8, 1, 2))
SIZE = (16, 24)
TOKENS = 24


@pytest.fixture
def mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(CONFIG, SIZE)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def visible() -> torch.Tensor:
    return draw_visible(2, TOKENS, 0.75, torch.Generator().manual_seed(0))


def test_positions_are_sines_and_cosines_of_column_and_row():
    """Feature by feature, for a grid that is not square; the first half is of the column, as published."""
    positions = sincos_positions((2, 3), 8)[0]
    assert (positions[0] == 0).all()
    for row in range(2):
        for column in range(3):
            angles = [[at / 10000 ** (i / 2) for i in range(2)] for at in (column, row)]
            expected = [f(angle) for part in angles for f in (math.sin, math.cos) for angle in part]
            assert positions[1 + 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_positions_are_not_trained(mae, images, visible):
    mae(images, visible, True)["loss"].backward()
    untrained = {name for name, parameter in mae.named_parameters() if parameter.grad is None}
    assert untrained == {"encoder.pos_embed", "decoder_pos_embed"}


def test_patches_are_rows_of_pixels_and_fit_together_again(images):
    patches = to_patches(images, 4)
    assert torch.equal(patches[1, 7], images[1, :, 4:8, 4:8].permute(1, 2, 0).flatten())
    assert torch.equal(from_patches(patches, (4, 6), 4), images)


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 6), (0.5, 12), (0.9, 2)])
def test_each_image_keeps_its_own_patches(ratio, kept):
    visible = draw_visible(50, TOKENS, ratio, torch.Generator().manual_seed(0))
    assert visible.shape == (50, kept)
    assert (visible.diff(dim=1) > 0).all()
    assert (mark_visible(visible, TOKENS).sum(1) == kept).all()
    assert len({tuple(row) for row in visible.tolist()}) > 40


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_is_that_of_the_pixels_of_masked_patches(mae, images, visible, norm_pix_loss):
    predicted = mae.reconstruct(images, visible)
    errors = []
    for i, patches in enumerate(to_patches(images, 4)):
        for n, target in enumerate(patches):
            if n not in visible[i]:
                scale = (target.var() + 1e-6).sqrt() if norm_pix_loss else 1
                shift = target.mean() if norm_pix_loss else 0
                errors.append(((predicted[i, n] - (target - shift) / scale) ** 2).mean())
    assert len(errors) == 2 * 18
    expected = torch.stack(errors).mean().item()
    assert mae(images, visible, norm_pix_loss)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_masked_pixels_are_not_seen(mae, images, visible):
    hidden = 1 - mark_visible(visible, TOKENS).unsqueeze(-1)
    changed = from_patches(to_patches(images, 4) + hidden, (4, 6), 4)
    assert torch.equal(mae.reconstruct(changed, visible), mae.reconstruct(images, visible))
    assert not torch.equal(mae.reconstruct(images + 1, visible), mae.reconstruct(images, visible))


def test_the_decoder_is_independent_of_the_encoder(mae, images, visible):
    wide = replace(CONFIG, decoder=PixelDecoderConfig(12, 3, 4))
    assert MaskedAutoencoder(wide, SIZE).reconstruct(images, visible).shape == (2, TOKENS, 3 * 4 * 4)


# --- the verb


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images in color, a recipe, and `run`, which is trained and evaluated."""
    root = tmp_path_factory.mktemp("mae")
    write_color_images(root / "data", train=8, val=8)
    (root / "mae.yaml").write_text("""
data: {size: [16, 24], workers: 0}
model: {encoder: {width: 16, depth: 2, heads: 2}, patch_size: 4, decoder: {width: 8, depth: 1, heads: 2}}
evaluation: {images: 16, knn: 3}
train: {steps: 6, batch: 4, lr: 1.0e-3, log_every: 1, checkpoint_every: 4, preview_every: 6}
""")
    assert main([*verb(root, root / "run"), f"evaluation={root / 'data'}", "train.evaluate_every=3"]) == 0
    return root


def verb(root: Path, out: Path, *settings: str) -> list[str]:
    return ["mae", str(root / "mae.yaml"), f"data={root / 'data' / 'train'}", f"out={out}", *settings]


def test_a_run_ends_as_an_encoder_for_every_transfer(root):
    encoder = load_encoder(root / "run", SIZE)
    assert encoder.kind == "encoder"
    assert (encoder.width, encoder.depth, encoder.grid) == (16, 2, (4, 6))
    assert load_encoder(root / "run", 32).grid == (8, 8)  # resampled positions
    assert torch.equal(encoder.pos_embed, sincos_positions((4, 6), 16))
    assert (root / "run" / "images" / "reconstruction-6.png").exists()
    values = [each for each in metrics(root / "run") if "val_loss" in each]
    assert len(values) == 2
    assert all(0 <= each["probe"] <= 100 for each in values)


def test_killed_and_continued_equals_never_stopped(root, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "addp_core", *verb(root, out, "train.checkpoint_every=1")])
    deadline = time.time() + 120
    while not (out / "checkpoints").exists() or not any((out / "checkpoints").glob("step-[2-9]")):
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    assert main(verb(root, out, "train.checkpoint_every=1")) == 0
    never, continued = (load_file(each / "model.safetensors") for each in (root / "run", out))
    assert never.keys() == continued.keys()
    assert all(torch.equal(never[name], continued[name]) for name in never)


def test_two_processes_equal_one(root, tmp_path):
    ended = run_ranks(verb(root, tmp_path / "two"), tmp_path / "job")
    assert ended.codes == [0, 0], ended.text
    one, two = ([each["loss"] for each in metrics(out) if "loss" in each] for out in (root / "run", tmp_path / "two"))
    assert len(two) == 6
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.patch_size=5", "model.patch_size: image size 16 x 24: expected multiples of the patch size 5"),
        ("mask_ratio=0.99", "mask_ratio: 0.99 of the 24 patches of an image leaves 0 of them visible"),
        ("mask_ratio=1.0e-30", "mask_ratio: 1e-30 of the 24 patches of an image leaves 24 of them visible"),
        ("mask_ratio=1", "mask_ratio: "),
        ("model.encoder.width=18", "encoder.width: found 18, expected a multiple of 4"),
        ("model.encoder.tokenizer_norm=true", "encoder.tokenizer_norm: found true, expected false"),
        ("model.decoder.heads=3", "decoder.heads: found 3, expected a divisor of the width 8"),
    ],
)
def test_what_does_not_fit_is_refused(root, tmp_path, capsys, setting, message):
    assert main(verb(root, tmp_path / "run", setting)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
