"""The recipes that come with the verbs: each is valid, and those that build on another differ from it as intended."""

import importlib
from typing import Any

import pytest

from addp_core.recipes.config import load_recipe, recipes_of, show_recipe
from addp_core.recipes.document import BASE
from addp_core.recipes.keys import all_keys, keys_of
from addp_core.recipes.verbs import VERBS


def load_complete(verb: str, name: str) -> Any:
    """Load a recipe with 'x' for the required keys that it leaves to the user."""
    module = importlib.import_module(VERBS[verb][0])
    first_line = show_recipe(module, name).splitlines()[0]
    missing = first_line.removeprefix("# required, not set: ").split(", ") if first_line.startswith("#") else []
    return load_recipe(module, name, [f"{key}=x" for key in missing])


@pytest.mark.parametrize("verb", VERBS)
def test_every_named_recipe_is_valid_and_says_what_it_is_for(verb):
    for name, path in recipes_of(importlib.import_module(VERBS[verb][0])).items():
        assert path.read_text().startswith("# "), path
        load_complete(verb, name)


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_has_a_key_of_its_own_named_base(verb):
    assert BASE not in keys_of(importlib.import_module(VERBS[verb][0]).Recipe)


def flatten(recipe: Any) -> dict[str, Any]:
    """All keys of a recipe by their full names; free-form mappings stay whole."""
    values: dict[str, Any] = {}
    for name, key in all_keys(type(recipe)):
        if not key.section:
            value = recipe
            for part in name.split("."):
                value = getattr(value, part, None)  # None below a section that is off
            values[name] = value
    return values


@pytest.mark.parametrize(
    ("verb", "name", "base", "differences"),
    [
        (
            "pretrain",
            "vit_l_800ep",
            "vit_b_1600ep",
            {"model.encoder.width": 1024, "model.encoder.depth": 24, "model.encoder.heads": 16, "train.epochs": 800.0},
        ),
        (
            "pretrain",
            "demo",
            "tiny",
            {
                "stages": "demo",
                "data.size": 24,
                "data.scale": (0.5, 1.0),
                "data.flip": False,
                "data.workers": 0,
                "model.encoder.width": 96,
                "model.encoder.depth": 4,
                "model.encoder.heads": 3,
                "model.decoder.depth": 2,
                "model.decoder.heads": 3,
                "train.steps": 400,
                "train.batch": 64,
                "train.lr": 1.5e-3,
                "train.log_every": 50,
                "train.preview_every": 200,
                "train.export_every": 100,
            },
        ),
        (
            "predictor",
            "mage_vit_l_1600ep",
            "mage_vit_b_1600ep",
            {"model.width": 1024, "model.depth": 24, "model.heads": 16},
        ),
        (
            "predictor",
            "demo",
            "tiny",
            {
                "data.size": 24,
                "data.scale": (0.5, 1.0),
                "data.flip": False,
                "data.workers": 0,
                "model.width": 96,
                "model.depth": 4,
                "model.heads": 3,
                "model.decoder_heads": 3,
                "model.dropout": 0.0,
                "train.batch": 64,
                "train.lr": 2e-3,
                "train.log_every": 50,
                "train.preview_every": 500,
                "train.checkpoint_every": 250,
            },
        ),
        (
            "tokenizer",
            "demo",
            "tiny",
            {
                "data.size": 24,
                "data.scale": (0.5, 1.0),
                "data.flip": False,
                "data.workers": 0,
                "model.multipliers": (1, 1, 1),
                "model.codebook": 256,
                "train.steps": 1000,
                "train.batch": 8,
                "train.preview_every": 500,
            },
        ),
        (
            "finetune",
            "vit_l_50ep",
            "vit_b_100ep",
            {
                "drop_path": 0.2,
                "train.epochs": 50.0,
                "train.base_lr": 2.5e-4,
                "train.warmup_epochs": 5.0,
                "train.layer_decay": 0.8,
            },
        ),
        ("det train", "vitdet_l_100ep", "vitdet_b_100ep", {"drop_path": 0.4, "train.layer_decay": 0.9}),
        ("seg train", "vit_l_40k", "vit_b_80k", {"config": "upernet_addp-l_40k_ade20k-512x512"}),
        (
            "bench",
            "vit_l",
            "vit_b",
            {
                "out": "runs/bench_vit_l",
                "finetune.recipe": "vit_l_50ep",
                "det.recipe": "vitdet_l_100ep",
                "det.set": {"train.accumulate": 8, "checkpointing": True},
                "seg.recipe": "vit_l_40k",
            },
        ),
    ],
)
def test_what_a_recipe_changes_in_its_base(verb, name, base, differences):
    values, base_values = flatten(load_complete(verb, name)), flatten(load_complete(verb, base))
    assert {key: value for key, value in values.items() if value != base_values[key]} == differences
