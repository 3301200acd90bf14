"""`addp generate`: whose folder it takes, and what it leaves as it is."""

from pathlib import Path

import pytest
from evaluation import HW, photographs, write_images
from other_process import at_work_in
from tiny import tiny_addp

from addp_core import save_model
from addp_core.recipes.cli import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with two models of the same architecture, `model` and `other`, and an image in photos/."""
    root = tmp_path_factory.mktemp("inputs")
    model = tiny_addp(HW)
    save_model(model, root / "model.safetensors")
    model.tokenizer.quantize.embedding.weight.data += 1
    save_model(model, root / "other.safetensors")
    write_images(root / "photos", photographs(1, 0))
    return root


def generate(inputs: Path, out: Path, *settings: str) -> list[str]:
    return ["generate", f"model={inputs / 'model.safetensors'}", f"out={out}", "n=2", "sampling.steps=2", *settings]


def inpaint(inputs: Path, out: Path) -> list[str]:
    image = f"image={inputs / 'photos' / '000.png'}"
    return ["inpaint", f"model={inputs / 'model.safetensors'}", f"out={out}", image, "box=[0,0,8,8]", "n=1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("name", ["000000.png", "000123.png", "grid.png"])
def test_images_of_others_are_neither_taken_nor_replaced(inputs, tmp_path, expect_user_error, name):
    (tmp_path / name).write_bytes(b"mine")
    for command in (generate, inpaint):
        expect_user_error(command(inputs, tmp_path), f"holds {name}, and no recipe.yaml", "choose another out")
    assert contents(tmp_path) == {name: b"mine"}


def test_the_folder_of_another_verb_is_left_as_it_is(inputs, tmp_path, expect_user_error):
    assert main(inpaint(inputs, tmp_path / "filled")) == 0
    assert main(generate(inputs, tmp_path / "images")) == 0
    for command, folder in ((generate, tmp_path / "filled"), (inpaint, tmp_path / "images")):
        before = contents(folder)
        expect_user_error(command(inputs, folder), "holds a run of another verb, whose recipe.yaml has the key")
        assert contents(folder) == before


def test_settings_and_weights_may_be_corrected_until_there_is_an_image(inputs, tmp_path, expect_user_error):
    other = f"model={inputs / 'other.safetensors'}"
    assert main(generate(inputs, tmp_path / "out")) == 0
    before = contents(tmp_path / "out")
    expect_user_error(generate(inputs, tmp_path / "out", "seed=1"), "holds images made with seed=0;")
    (inputs / "model.safetensors").rename(inputs / "moved.safetensors")
    (inputs / "other.safetensors").rename(inputs / "model.safetensors")
    expect_user_error(generate(inputs, tmp_path / "out"), "holds images made with other weights")
    (inputs / "model.safetensors").rename(inputs / "other.safetensors")
    (inputs / "moved.safetensors").rename(inputs / "model.safetensors")
    assert contents(tmp_path / "out") == before
    for path in (tmp_path / "out").glob("*.png"):
        path.unlink()
    assert main(generate(inputs, tmp_path / "out", "seed=1", other)) == 0


def test_a_folder_in_which_another_process_works_is_refused(inputs, tmp_path, expect_user_error):
    for command in (generate, inpaint):
        with at_work_in(tmp_path / command.__name__):
            expect_user_error(
                command(inputs, tmp_path / command.__name__), "process 1 on a-machine works in this folder"
            )
        assert not contents(tmp_path / command.__name__)
        assert main(command(inputs, tmp_path / command.__name__)) == 0
