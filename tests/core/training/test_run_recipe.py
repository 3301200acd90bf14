"""What a run's recipe keeps from the time when the run began: `data.resize`."""

import pytest
import yaml

from addp_core.base.errors import UserError
from addp_core.recipes.config import load
from addp_core.training.run_folder import prepare_out, release_out
from pretrain.tokenizer import Recipe


def prepare(out, *settings):
    """Prepare the run folder as `addp tokenizer` does; return its `data.resize`, and that in recipe.yaml."""
    recipe = load(Recipe, settings=[f"out={out}", *settings])
    try:
        prepare_out(out, recipe)
    finally:
        release_out(out)
    return recipe.data.resize, yaml.safe_load((out / "recipe.yaml").read_text())["data"]["resize"]


def begin_before_the_key(out):
    """Make the folder that of a run that has computed something, from before `data.resize` existed."""
    prepare(out)
    stored = yaml.safe_load((out / "recipe.yaml").read_text())
    del stored["data"]["resize"]
    (out / "recipe.yaml").write_text(yaml.safe_dump(stored))
    (out / "checkpoints/step-5").mkdir()


def test_a_new_run_stores_torch_and_keeps_it(tmp_path):
    out = tmp_path / "run"
    assert prepare(out) == ("torch", "torch")
    (out / "checkpoints/step-5").mkdir()
    assert prepare(out) == ("torch", "torch")
    with pytest.raises(UserError, match=r"data\.resize=pillow \(was torch\)"):
        prepare(out, "data.resize=pillow")


def test_a_run_from_before_the_key_keeps_pillow(tmp_path):
    out = tmp_path / "run"
    begin_before_the_key(out)
    with pytest.raises(UserError, match=r"data\.resize=torch \(was pillow\)"):
        prepare(out, "data.resize=torch")
    assert prepare(out) == ("pillow", "pillow")
    assert prepare(out, "data.resize=pillow") == ("pillow", "pillow")


def test_a_run_whose_parts_are_still_trained_keeps_it_too(tmp_path):
    """`addp pretrain` has computed nothing itself while it trains its tokenizer, which is given the same section."""
    out = tmp_path / "run"
    begin_before_the_key(out)
    (out / "checkpoints/step-5").rmdir()
    assert prepare(out) == ("pillow", "pillow")
