"""Sections of a recipe that can be one of several dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from checks import assert_user_error

from addp_core.recipes.config import dump, load
from addp_core.recipes.help import describe_keys


@dataclass
class Blocks:
    depth: Annotated[int, "number of blocks"] = 12
    width: int = 768
    rate: float = 0.0


@dataclass
class Stages:
    arch: Annotated[str, "in place of blocks"]
    width: int = 512
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.arch == "bad":
            raise ValueError("arch: found 'bad', expected good")


@dataclass
class Model:
    encoder: Blocks | Stages = field(default_factory=lambda: Blocks(width=96))
    heads: int = 2


@dataclass
class Recipe:
    out: str
    model: Model = field(default_factory=Model)


def read(tmp_path: Path, text: str = "", *settings: str) -> Blocks | Stages:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    recipe = load(Recipe, path, ["out=x", *settings])
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load(Recipe, tmp_path / "again.yaml") == recipe
    return recipe.model.encoder


def test_the_first_variant_is_the_default(tmp_path):
    assert read(tmp_path) == Blocks(12, 96)
    assert read(tmp_path, "model: {encoder: {depth: 3}}", "model.encoder.rate=0.1") == Blocks(3, 96, 0.1)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("model: {encoder: {arch: a, rate: 0.1}}", []),
        ("model: {encoder: {rate: 0.1, arch: a}}", []),
        ("model.encoder.arch: a", ["model.encoder.rate=0.1"]),
        ("", ["model.encoder.rate=0.1", "model.encoder.arch=a"]),
        ("", ["model.encoder={rate: 0.1, arch: a}"]),
        ("", ["model={encoder: {arch: a, rate: 0.1}}"]),
    ],
)
def test_a_key_of_another_variant_chooses_it_and_shared_keys_stay(tmp_path, text, settings):
    assert read(tmp_path, text, *settings) == Stages("a", 96, 0.1)


def test_a_recipe_may_choose_another_variant_than_its_base(tmp_path):
    (tmp_path / "blocks.yaml").write_text("model: {encoder: {depth: 3, width: 8}}")
    assert read(tmp_path, "base: blocks\nmodel: {encoder: {arch: a}}") == Stages("a", 8, 0.0)
    (tmp_path / "stages.yaml").write_text("model: {encoder: {arch: a, width: 8}}")
    assert read(tmp_path, "base: stages\nmodel: {encoder: {arch: b}}") == Stages("b", 8, 0.0)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("model: {encoder: {arch: a, depth: 3}}", []),
        ("model: {encoder: {depth: 3, arch: a}}", []),
        ("model: {encoder: {arch: a}}", ["model.encoder.depth=3"]),
        ("", ["model.encoder.arch=a", "model.encoder.depth=3"]),
        ("", ["model.encoder.depth=3", "model.encoder.arch=a"]),
    ],
)
def test_keys_of_two_variants_exclude_each_other(tmp_path, text, settings):
    message = "unknown key 'model.encoder.depth'; the keys of model.encoder are here arch, width, rate"
    assert_user_error(lambda: read(tmp_path, text, *settings), message)


def test_mistakes_in_a_variant(tmp_path):
    assert_user_error(lambda: read(tmp_path, "", "model.encoder.arch=bad"), "model.encoder.arch: found 'bad'")
    assert_user_error(lambda: read(tmp_path, "", "model.encoder.arc=a"), "did you mean 'model.encoder.arch'?")


def test_help_shows_the_keys_of_all_variants_once():
    text = describe_keys(Recipe)
    assert text.count("model.encoder.width") == text.count("model.encoder.arch") == 1
    row = next(line for line in text.splitlines() if "model.encoder.arch" in line)
    assert "null" in row
    assert "in place of blocks" in row
