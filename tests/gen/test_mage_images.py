"""`addp generate`, `evaluate` and `inpaint` with MAGE: the model's files, and those that do not go together."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation import evaluate_command, report_rows
from golden_weights import HEADS, golden_state
from PIL import Image
from tiny import TOKENIZER
from transfers import write_tiny_mage

from addp_core import load_mage, save_model
from addp_core.networks.tokenizer import Tokenizer
from addp_core.recipes.cli import main
from addp_core.weights.files import strip_prefix
from gen.app import open_actions
from gen.recipe import AppRecipe


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of `addp predictor` for images of 24 x 24 pixels, beside a tokenizer with another codebook."""
    root = tmp_path_factory.mktemp("mage")
    save_model(Tokenizer(replace(TOKENIZER, codebook=32)), root / "other.safetensors")
    return write_tiny_mage(root, side=6)[0]


def test_images_of_a_run_and_their_metrics(run, sets, tmp_path, capsys):
    assert main(["generate", f"model={run}", f"out={tmp_path / 'images'}", "n=3", "sampling.steps=4"]) == 0
    assert f"took the tokenizer that the recipe of its run names, {run.parent}" in capsys.readouterr().err
    images = [Image.open(tmp_path / "images" / f"{i:06d}.png") for i in range(3)]
    assert {image.size for image in images} == {(24, 24)}
    keys = (f"model={run}", "n=4", "sampling.steps=3", "sweep.order=[confidence,halton]")
    assert main(evaluate_command(sets, tmp_path / "evaluation", *keys)) == 0
    assert [row["name"] for row in report_rows(tmp_path / "evaluation")] == ["cosine-3-t6", "cosine-3-halton"]


def test_a_hole_of_another_size_is_filled(run, sets, tmp_path):
    image = next((sets / "a").glob("*.png"))
    keys = ("size=[16,16]", "box=[4,4,20,20]", "n=2", "sampling.steps=3")
    assert main(["inpaint", f"model={run}", f"image={image}", f"out={tmp_path / 'filled'}", *keys]) == 0
    assert Image.open(tmp_path / "filled" / "000001.png").size == (16, 16)


def test_the_page_shows_its_steps(run):
    sampling, features, _ = open_actions(AppRecipe(model=str(run)))
    assert features is not None
    assert sampling is not None
    steps = list(sampling.generate(lambda: True, 2, 0, 3, "cosine", 6.0, 1.0, 0, "confidence"))
    assert [step.note for step in steps] == ["Step 1 of 3.", "Step 2 of 3.", "Step 3 of 3."]
    contents = [step.sections[0].tiles[0].content for step in steps]
    assert len(set(contents)) == 3  # each step has an image of its own


def test_a_published_file_with_and_without_its_tokenizer():
    golden = golden_state()
    state, vqgan = strip_prefix(golden, "token_predictor."), strip_prefix(golden, "vqgan.")
    heads = {"predictor_heads": HEADS["predictor_heads"]}
    separate = load_mage({"model": state}, tokenizer={"state_dict": vqgan}, **heads)
    combined = load_mage({"model": state | {f"vqgan.{k}": v for k, v in vqgan.items()}}, **heads)
    assert separate.config == combined.config
    assert all(torch.equal(a, b) for a, b in zip(separate.parameters(), combined.parameters(), strict=True))


def test_what_does_not_go_together_is_refused_in_a_line(run, sets, tmp_path, expect_user_error):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "model.safetensors").read_bytes())
    generate = ["generate", f"out={tmp_path / 'images'}", "n=1"]
    expect_user_error([*generate, f"model={alone}"], "MAGE reads token ids", "tokenizer=<VQGAN file>")
    other = f"tokenizer={run.parent / 'other.safetensors'}"
    expect_user_error([*generate, f"model={alone}", other], "it has 32 codes, but the model predicts 24")
    expect_user_error([*generate, f"model={alone}", f"tokenizer={sets / 'classifier.safetensors'}"], "tokenizer")
    expect_user_error([*generate, f"model={run}", "encoder_heads=3"], "encoder_heads")
    expect_user_error([*generate, f"model={sets / 'classifier.safetensors'}"], "expected an ADDP checkpoint")
    assert not (tmp_path / "images" / "000000.png").exists()
