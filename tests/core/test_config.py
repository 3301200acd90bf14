"""Recipes: what is read, what is written, and the message for each mistake."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Interval, MultipleOf
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AllowInfNan

from addp_core.base.addresses import CREDENTIALS_FIX
from addp_core.base.errors import UserError
from addp_core.recipes.config import dump, load
from addp_core.recipes.help import describe_keys


@dataclass
class Data:
    __shorthand__ = "source"
    source: Annotated[str, "folder of images"]
    size: Annotated[int | None, Ge(8), MultipleOf(4), "pixels"] = 256
    scale: Annotated[tuple[float, float], "smallest and largest share"] = (0.2, 1.0)
    classes: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    flip: bool = True

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: found {self.scale}, expected the smaller share first")


@dataclass(frozen=True)
class Train:
    """How to train."""

    lr: Annotated[float, Gt(0), "learning rate"] = 1e-4
    batch: Annotated[int, Interval(ge=1, le=4096)] = 32
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    steps: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.batch == 13:
            raise ValueError("thirteen is\nnot a batch")


@dataclass
class Recipe:
    out: Annotated[Path, "run folder"]
    data: Data
    train: Train = field(default_factory=lambda: Train(batch=64))
    ema: Train | None = None
    runs: list[Train] = field(default_factory=list)
    note: str | None = None
    sizes: tuple[int, ...] = (1, 2)


REQUIRED = ["out=run", "data=photos"]


def read(tmp_path: Path, text: str, *settings: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load(Recipe, path, settings)


def refusal(*settings: str) -> str:
    """Load a wrong setting and return the one line of its error."""
    with pytest.raises(UserError) as caught:
        load(Recipe, None, [*REQUIRED, *settings])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_come_from_the_class_then_the_file_then_the_settings(tmp_path):
    recipe = read(tmp_path, "out: a\ndata: {source: b, size: 64}\ntrain: {lr: 3}\n", "data.size=128", "train.batch=2")
    assert recipe == Recipe(Path("a"), Data("b", 128), Train(lr=3.0, batch=2))
    assert isinstance(recipe.train.lr, float)


def test_a_section_keeps_the_defaults_that_its_recipe_sets():
    assert load(Recipe, None, [*REQUIRED, "train.lr=1"]).train == Train(lr=1.0, batch=64)


def test_two_loads_share_nothing():
    load(Recipe, None, REQUIRED).data.classes.append("x")
    assert load(Recipe, None, REQUIRED).data.classes == []


@pytest.mark.parametrize(
    ("setting", "get", "value"),
    [
        ("train.lr=1e-4", lambda r: r.train.lr, 1e-4),
        ("train.lr=3", lambda r: r.train.lr, 3.0),
        ("train.lr=.5", lambda r: r.train.lr, 0.5),
        ("train.batch=1e3", lambda r: r.train.batch, 1000),
        ("train.steps=1_000", lambda r: r.train.steps, 1000),
        ("train.steps=auto", lambda r: r.train.steps, "auto"),
        ("data.size=null", lambda r: r.data.size, None),
        ("data.scale=[0.5, 1]", lambda r: r.data.scale, (0.5, 1.0)),
        ("data.classes=[a, no, 1]", lambda r: r.data.classes, ["a", "no", "1"]),
        ("data.weights.b.c=2", lambda r: r.data.weights, {"b.c": 2.0}),
        ("data.flip=false", lambda r: r.data.flip, False),
        ("data={source: x, size: 16}", lambda r: (r.data.source, r.data.size), ("x", 16)),
        ("data=hf://repo/file?a=b", lambda r: r.data.source, "hf://repo/file?a=b"),
        ("data=2024", lambda r: r.data.source, "2024"),
        ("data=a: b # c", lambda r: r.data.source, "a: b # c"),
        ("data='[x]'", lambda r: r.data.source, "[x]"),
        ("data=", lambda r: r.data.source, ""),
        ("out=1e3", lambda r: r.out, Path("1e3")),
        ("out=~/runs", lambda r: r.out, Path.home() / "runs"),
        ("note=true", lambda r: r.note, "true"),
        ("note=~", lambda r: r.note, None),
        ("ema.lr=2", lambda r: r.ema, Train(lr=2.0)),
        ("ema={}", lambda r: r.ema, Train()),
        ("runs=[{batch: 3}, {}]", lambda r: r.runs, [Train(batch=3), Train()]),
        ("sizes=[]", lambda r: r.sizes, ()),
    ],
)
def test_what_a_setting_means(setting, get, value):
    loaded = get(load(Recipe, None, [*REQUIRED, setting]))
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.batch=many", "train.batch: found 'many', expected a whole number >= 1 and <= 4096"),
        ("train.batch=1.5", "train.batch: found 1.5, expected a whole number >= 1 and <= 4096"),
        ("train.batch=0", "train.batch: found 0, expected a whole number >= 1 and <= 4096"),
        ("train.batch=true", "train.batch: found true, expected a whole number >= 1 and <= 4096"),
        ("train.batch=null", "train.batch: found null, expected a whole number >= 1 and <= 4096"),
        ("train.lr=fast", "train.lr: found 'fast', expected a number > 0"),
        ("train.lr=.nan", "train.lr: found '.nan', expected a number > 0"),
        ("train.lr=.inf", "train.lr: found .inf, expected a finite number > 0"),
        ("train.lr=1e400", "train.lr: found 1e400, expected a finite number > 0"),
        ("data.scale=[0, .inf]", "data.scale: found [0, .inf], expected a list of 2 in brackets, each a finite number"),
        ("data.weights.a=-.inf", "data.weights.a: found -.inf, expected a finite number"),
        (
            "train.steps=99999999999999999999",
            "train.steps: found 99999999999999999999, expected a whole number or auto, of at most 64 bits",
        ),
        ("train.steps=.inf", "train.steps: found .inf, expected a whole number or auto"),
        (
            "train.precision=bf17",
            "train.precision: found 'bf17', expected one of fp32, bf16, fp16; did you mean 'bf16'?",
        ),
        ("data.size=10", "data.size: found 10, expected a whole number >= 8 and a multiple of 4 or null"),
        ("data.flip=no", "data.flip: found 'no', expected true or false"),
        ("data.flip=1", "data.flip: found 1, expected true or false"),
        ("data.scale=[1]", "data.scale: found [1], expected a list of 2 in brackets, each a number"),
        ("data.scale=1", "data.scale: found 1, expected a list of 2 in brackets, each a number"),
        ("data.weights={a: b}", "data.weights: found {a: b}, expected a mapping, each value a number"),
        ("data.weights.a=b", "data.weights.a: found 'b', expected a number"),
        ("sizes=[1, x]", "sizes: found [1, x], expected a list in brackets, each a whole number"),
        ("train=3", "train: found 3, expected a section with the keys lr, batch, precision, steps"),
        ("train.lr={a: 1}", "train.lr: found {a: 1}, expected a number > 0"),
        ("out=null", "out: found null, expected a path"),
        ("runs=[{batch: 0}]", "runs[0].batch: found 0, expected a whole number >= 1 and <= 4096"),
        ("runs=[{bach: 3}]", "unknown key 'runs[0].bach'; did you mean 'runs[0].batch'?"),
        ("data.scale=[1, 0.5]", "data.scale: found (1.0, 0.5), expected the smaller share first"),
        ("train.batch=13", "train: thirteen is not a batch"),
        ("train.bach=3", "unknown key 'train.bach'; did you mean 'train.batch'?"),
        ("trian.batch=3", "unknown key 'trian.batch'; did you mean 'train.batch' or 'ema.batch'?"),
        ("source=x", "unknown key 'source'; did you mean 'data.source'?"),
        ("zzz=3", "unknown key 'zzz'; the keys are out, data, train, ema, runs, note, sizes"),
        ("train.lr.x=3", "unknown key 'train.lr.x': train.lr is not a section but a number > 0"),
        ("data.scale=[1", "data.scale: '[1' is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("note", "'note': settings are written key=value, without spaces; did you mean note=...?"),
        ("=3", "'=3': settings are written key=value, without spaces"),
        ("note=https://user:hush@host/x", f"note: {CREDENTIALS_FIX}"),
        ("note='https://user:hush@host/x", f"note: {CREDENTIALS_FIX}"),
        ("data.weights={a: 'https://host/x?token=hush'}", f"data.weights: {CREDENTIALS_FIX}"),
        ("sizes=*a", "sizes: anchors (&) and aliases (*) are not supported; write the value out"),
    ],
)
def test_the_message_for_a_wrong_setting(setting, message):
    assert refusal(setting) == message


@dataclass
class Run:
    out: Annotated[str, "run folder"]
    tolerated: Annotated[float, Ge(0), AllowInfNan(True)] = 0.0


@dataclass
class Report:
    out: Annotated[str, "folder; empty: write no files"] = ""


def test_infinity_where_it_has_a_meaning():
    assert load(Run, None, ["out=run", "tolerated=.inf"]).tolerated == float("inf")


@pytest.mark.parametrize("text", ["out:\n", "out: ''\n", 'out: ""\n'])
def test_an_output_folder_without_a_name(tmp_path, text):
    message = "out: found an empty text, as of a shell's variable that is not set; expected text (run folder); out=. is"
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        load(Run, None, ["out="])
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match="out: found"):
        load(Run, tmp_path / "run.yaml")
    assert load(Run, None, ["out=."]).out == "."
    assert load(Report, None, ["out="]).out == ""


def test_braces_that_the_shell_has_replaced():
    addresses = [f"note=https://host/{number}.tar" for number in range(3)]
    with pytest.raises(UserError, match="note: given more than once; a shell replaces braces"):
        load(Recipe, None, [*REQUIRED, *addresses])
    kept = load(Recipe, None, [*REQUIRED, "note=https://host/{0..2}.tar", "out=a", "note=https://host/3.tar"]).note
    assert kept == "https://host/3.tar"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: a\ndata: b: c\n", "line 2: not valid YAML: mapping values are not allowed here"),
        ("out: a\ntrain:\n\tbatch: 3\n", "line 3: not valid YAML: found character '\\t' that cannot start any token"),
        ("out: a\ntrain:\n  batch: 3\n  batch: 4\n", "line 4: train.batch: set twice; keep one"),
        ("train: {batch: 3}\ntrain.batch: 4\n", "line 2: train.batch: set twice; keep one"),
        ("data: {weights: {a: 1, a: 2}}\n", "line 1: data.weights.a: set twice; keep one"),
        ("out: a\n\ntrain:\n  bacth: 3\n", "line 4: unknown key 'train.bacth'; did you mean 'train.batch'?"),
        ("train:\n  lr: 1e-4x\n", "line 2: train.lr: found '1e-4x', expected a number > 0"),
        ("- 1\n- 2\n", "line 1: found - 1 - 2, expected lines of the form `key: value`"),
        ("{[1]: 2}\n", "line 1: found [1] as a key, expected a name"),
        (
            "out: !!python/object/apply:os.getcwd []\n",
            "line 1: out: found !!python/object/apply:os.getcwd [], expected a path",
        ),
        (
            "out: !!python/name:os.getcwd x\n",
            "line 1: out: found tag:yaml.org,2002:python/name:os.getcwd x, expected a path",
        ),
        ("out: &a b\nnote: *a\n", "anchors (&) and aliases (*) are not supported; write the value out"),
        ("out: a\n---\nout: b\n", "line 2: not valid YAML: but found another document"),
        ("out: \x07\n", "unacceptable character #x0007: special characters are not allowed"),
    ],
)
def test_the_message_for_a_wrong_file(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, text, *REQUIRED)
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.yaml'}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_missing_keys_are_named_at_once(tmp_path):
    with pytest.raises(UserError, match=r"^2 required keys are missing: out, data.source; write out=\.\.\. or put"):
        read(tmp_path, "train: {batch: 3}\n")
    with pytest.raises(UserError, match=r"^1 required key is missing: data\.source;"):
        read(tmp_path, "", "out=a", "data.size=16")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        load(Recipe, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load(Recipe, tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"x\.yaml: not a text file"):
        load(Recipe, tmp_path / "x.yaml")


def test_dotted_keys_and_shorthands_work_in_files_too(tmp_path):
    recipe = read(tmp_path, "out: 2024\ndata: photos\ntrain.batch: 3\nnote: no\n")
    assert recipe == Recipe(Path("2024"), Data("photos"), Train(batch=3), note="no")


def test_the_table_of_keys(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = describe_keys(Recipe).splitlines()
    assert max(map(len, lines)) <= 120
    table = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert table["out"] == "required run folder (a path)"
    assert table["data:"] == "data=x means data.source=x"
    assert table["data.source"] == "required folder of images (text)"
    assert table["data.size"] == "256 pixels (a whole number >= 8 and a multiple of 4 or null)"
    assert table["data.scale"] == "[0.2, 1.0] smallest and largest share (a list of 2 in brackets, each a number)"
    assert table["train:"] == "How to train"
    assert table["train.lr"] == "0.0001 learning rate (a number > 0)"
    assert table["train.batch"] == "64 a whole number >= 1 and <= 4096"
    assert table["train.precision"] == "fp32 one of fp32, bf16, fp16"
    assert table["ema:"] == "How to train; off (null); setting a key below switches it on"
    assert table["ema.batch"] == "32 a whole number >= 1 and <= 4096"
    assert table["note"] == "null text or null"


# Text of every kind, including what YAML reads as other types. Files cannot hold half of a surrogate pair.
SPECIAL_TEXTS = [
    "\x85",
    "a\n",
    "\u2028b",
    "",
    "~",
    "null",
    "no",
    "true",
    "1e-4",
    "1_0",
    "0x1f",
    "2001-01-01",
    "1:30",
    "<<",
    "=",
    "- a",
    "'",
    "*a",
    "&a",
    "!x",
]
TEXT = st.sampled_from(SPECIAL_TEXTS) | st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
BATCHES = st.integers(1, 4096).filter(lambda batch: batch != 13)
TRAIN = st.builds(Train, POSITIVE, BATCHES, st.sampled_from(["fp32", "bf16", "fp16"]), INTEGERS | st.just("auto"))
SCALES = st.tuples(NUMBERS, NUMBERS).map(lambda pair: (min(pair), max(pair)))
DATA = st.builds(
    Data,
    TEXT,
    st.none() | st.integers(2, 10**6).map(lambda n: 4 * n),
    SCALES,
    st.lists(TEXT),
    st.dictionaries(TEXT, NUMBERS),
    st.booleans(),
)
PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).map(Path)
RECIPES = st.builds(
    Recipe, PATHS, DATA, TRAIN, st.none() | TRAIN, st.lists(TRAIN), st.none() | TEXT, st.lists(INTEGERS).map(tuple)
)


@given(st.one_of(TRAIN, DATA, RECIPES))
def test_what_is_written_is_read_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(type(config), path) == config


def test_written_recipes_are_plain_yaml_without_anchors():
    shared = [1, 2]
    text = dump(Recipe(Path("a"), Data("b", classes=["x", "no"]), runs=[Train()] * 2, sizes=tuple(shared)))
    assert text.startswith("out: a\ndata:\n  source: b\n  size: 256\n  scale: [0.2, 1.0]\n  classes: [x, 'no']\n")
    assert "&" not in text
