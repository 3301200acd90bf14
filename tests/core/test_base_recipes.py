"""The key `base`: a recipe file that builds on another one."""

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from addp_core.base.errors import UserError
from addp_core.recipes.config import load, load_recipe, show_recipe


@dataclass
class Train:
    lr: float = 1e-4
    batch: int = 32
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass
class Length:
    __replaced_by__ = {"epochs": "steps"}  # noqa: RUF012

    epochs: float = 100.0
    steps: int | None = None


@dataclass
class Recipe:
    out: str
    train: Train = field(default_factory=Train)
    ema: Train | None = None
    grid: dict[str, list[float]] = field(default_factory=dict)
    runs: list[Train] = field(default_factory=list)
    length: Length = field(default_factory=Length)


BIG = """\
out: runs/big
train: {lr: 1.0, batch: 64, betas: [0.5, 0.6]}
ema: {lr: 2.0}
grid: {lr: [1, 2], decay: [3]}
runs: [{batch: 1}, {batch: 2}]
"""


@pytest.fixture
def verb(tmp_path, monkeypatch):
    """A verb with the named recipes `big` and `huge`; the test runs in an empty folder beside it."""
    recipes = tmp_path / "package" / "recipes" / "verb"
    recipes.mkdir(parents=True)
    (recipes / "big.yaml").write_text(BIG)
    (recipes / "huge.yaml").write_text("train.batch: 128\nbase: big\n")  # it need not be the first key
    module = ModuleType("package.verb")
    module.__file__ = str(tmp_path / "package" / "verb.py")
    module.Recipe = Recipe  # type: ignore[attr-defined]  # as the modules of verbs have it
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return module


def read(verb: ModuleType, text: str, *settings: str) -> Recipe:
    Path("mine.yaml").write_text(text)
    return load_recipe(verb, "mine.yaml", settings)


def refusal(verb: ModuleType, text: str, *settings: str) -> str:
    with pytest.raises(UserError) as error:
        read(verb, text, *settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_changes_keys_of_its_base(verb):
    assert read(verb, "base: big\n") == load_recipe(verb, "big")
    recipe = read(verb, "base: big\ntrain:\n  lr: 3\nema.batch: 7\n", "train.batch=8")
    assert recipe.train == Train(3.0, 8, (0.5, 0.6))
    assert recipe.ema == Train(2.0, 7)
    assert recipe.out == "runs/big"


def test_named_recipes_build_on_each_other_and_on_files(verb):
    assert load_recipe(verb, "huge").train == Train(1.0, 128, (0.5, 0.6))
    assert read(verb, "base: huge\nout: mine\n").train.batch == 128
    assert load(Recipe, Path("../package/recipes/verb/huge.yaml")).train.batch == 128  # without the verb


@pytest.mark.parametrize(
    "base", ["first", "first.yaml", "./first.yaml", "../work/first.yaml", "{cwd}/first.yaml", "2024", "my runs/a.yaml"]
)
def test_a_base_is_a_name_or_a_path_relative_to_the_file(verb, base, monkeypatch):
    Path("my runs").mkdir()
    for path in ("first.yaml", "2024.yaml", "my runs/a.yaml"):
        Path(path).write_text("base: big\ntrain.batch: 5\n")
    text = f"base: {base.format(cwd=Path.cwd())}\n"
    assert read(verb, text).train.batch == 5
    monkeypatch.chdir("..")
    assert load_recipe(verb, "work/mine.yaml").train.batch == 5


def test_a_named_recipe_comes_before_a_file_of_that_name(verb):
    Path("big.yaml").write_text("base: big\ntrain.batch: 5\n")
    assert load_recipe(verb, "./big.yaml").train == Train(1.0, 5, (0.5, 0.6))


def test_sections_merge_and_all_other_values_replace(verb):
    recipe = read(verb, "base: big\ngrid: {lr: [9]}\nruns: [{lr: 4}]\ntrain: {betas: [0, 1]}\nema: null\n")
    assert recipe.grid == {"lr": [9.0]}
    assert recipe.runs == [Train(lr=4.0)]
    assert recipe.train.betas == (0.0, 1.0)
    assert recipe.ema is None
    assert read(verb, "base: big\ngrid.lr: [9]\n").grid == {"lr": [9.0], "decay": [3.0]}
    assert read(verb, "base: big\n", "grid.lr=[9]").grid == {"lr": [9.0], "decay": [3.0]}


def test_a_key_that_another_one_replaces_counts_where_it_alone_is_set(verb):
    Path("long.yaml").write_text("base: big\nlength: {epochs: 3, steps: 400}\n")
    assert load_recipe(verb, "long.yaml").length == Length(3, 400)  # both at once: the steps count
    assert load_recipe(verb, "long.yaml", ["length.epochs=7"]).length == Length(7, None)
    assert load_recipe(verb, "long.yaml", ["length.epochs=7", "length.steps=5"]).length == Length(7, 5)
    assert load_recipe(verb, "long.yaml", ["length.steps=5", "length.epochs=7"]).length == Length(7, 5)
    assert load_recipe(verb, "long.yaml", ["length={epochs: 7}"]).length == Length(7, None)
    assert load_recipe(verb, "long.yaml", ["length.steps=5"]).length == Length(3, 5)
    assert read(verb, "base: long\nlength.epochs: 7\n").length == Length(7, None)
    assert read(verb, "base: long\nlength: {epochs: 7}\n", "length.steps=5").length == Length(7, 5)
    assert read(verb, "base: long\ntrain.batch: 7\n").length == Length(3, 400)


def test_a_section_that_a_base_switches_off_starts_from_its_defaults(verb):
    Path("off.yaml").write_text("base: big\nema: null\n")
    assert read(verb, "base: off\nema: {batch: 7}\n").ema == Train(batch=7)


def test_what_is_printed_is_resolved(verb):
    read(verb, "base: big\n")
    text = show_recipe(verb, "mine.yaml", ["train.batch=8"])
    assert "base" not in text
    assert read(verb, text) == load_recipe(verb, "big", ["train.batch=8"])


NAMES = "(big, huge, other)"  # other.yaml lies beside mine.yaml


NOT_TEXT = "expected the name of a recipe or the path of a YAML file"
UNKNOWN = f"expected the name of a recipe {NAMES} or the path of a YAML file relative to ."
CIRCLE = "expected a recipe that does not build on this one"
NESTED = "base belongs at the top level of a recipe file, with the name or path of a recipe"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: hug\n", f"mine.yaml line 1: base: found 'hug', {UNKNOWN}; did you mean 'huge'?"),
        ("\nbase: sub/xyz.yaml\n", f"mine.yaml line 2: base: found 'sub/xyz.yaml', {UNKNOWN}"),
        ("base: ''\n", f"mine.yaml line 1: base: found '', {UNKNOWN}"),
        ("base: null\n", f"mine.yaml line 1: base: found null, {NOT_TEXT}"),
        ("base: [big, huge]\n", f"mine.yaml line 1: base: found [big, huge], {NOT_TEXT}"),
        ("base: {big: 1}\n", f"mine.yaml line 1: base: found {{big: 1}}, {NOT_TEXT}"),
        ("base: big\nbase: huge\n", "mine.yaml line 2: base: set twice; keep one"),
        (
            "base: mine.yaml\n",
            "mine.yaml line 1: base: found 'mine.yaml', which leads in a circle (mine.yaml -> mine.yaml); " + CIRCLE,
        ),
        (
            "base: other\n",
            "other.yaml line 2: base: found 'mine.yaml', which leads in a circle "
            f"(mine.yaml -> other.yaml -> mine.yaml); {CIRCLE}",
        ),
        ("train: {base: big}\n", f"mine.yaml line 1: unknown key 'train.base'; {NESTED}"),
        ("base.big: 1\n", f"mine.yaml line 1: unknown key 'base.big'; {NESTED}"),
    ],
)
def test_bases_that_cannot_be_used(verb, text, message):
    Path("other.yaml").write_text("out: x\nbase: mine.yaml\n")
    assert refusal(verb, text) == message


def test_mistakes_in_a_base_are_reported_with_its_name(verb):
    first = Path("first.yaml")
    for text, message in {
        "out: x\ntrian: {}\n": "first.yaml line 2: unknown key 'trian'; did you mean 'train'?",
        "train: {batch: x}\n": "first.yaml line 1: train.batch: found 'x', expected a whole number",
        "train: [\n": "first.yaml line 2: not valid YAML: expected the node content, but found '<stream end>'",
    }.items():
        first.write_text(text)
        assert refusal(verb, "# above\nbase: first\n") == message
    first.write_bytes(b"\xff\xfe\x00\x80")
    assert refusal(verb, "base: first\n") == "first.yaml: not a text file; expected a recipe in YAML"


def test_an_entry_of_a_mapping_is_set_once(verb):
    assert refusal(verb, "out: x\ngrid.lr: [1]\ngrid.lr: [2]\n") == "mine.yaml line 3: grid.lr: set twice; keep one"


def test_a_base_is_not_a_setting(verb):
    expected = "base: found 'hug' on the command line, expected this key in recipe files only; write the name of the "
    assert refusal(verb, BIG, "base=hug") == f"{expected}recipe without 'base='; did you mean 'huge'?"
    with pytest.raises(UserError, match=r"without 'base='; the recipes are big, huge$"):
        load_recipe(verb, None, ["base=zzz"])
