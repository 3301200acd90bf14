"""The command line: what it runs, what it says, and its exit codes."""

import importlib
import logging
import os
import re
import subprocess
import sys
from dataclasses import MISSING

import pytest
import yaml

import addp_core
from addp_core.recipes.cli import main
from addp_core.recipes.config import load, recipes_of
from addp_core.recipes.keys import all_keys
from addp_core.recipes.verbs import VERBS

PARROT = '''"""`addp parrot` says words."""
import logging, os, signal, sys
from dataclasses import dataclass, field
from typing import Annotated
from addp_core.base.errors import UserError

@dataclass
class Voice:
    volume: Annotated[int, "decibels"] = 60

@dataclass
class Recipe:
    word: Annotated[str, "what to say"]
    times: int = 1
    voice: Voice = field(default_factory=Voice)

def run(recipe):
    logging.getLogger("addp").info("clearing the throat")
    logging.getLogger("addp").warning("feathers everywhere")
    match recipe.word:
        case "user": raise UserError("word: found 'user',\\nexpected a real word")
        case "stop": raise KeyboardInterrupt
        case "bug": raise ZeroDivisionError("seven")
        case "exit": raise SystemExit(0)
        case "pipe": raise BrokenPipeError("a worker's pipe")
        case "extra": import detectron2_of_mars
        case "detectron2": raise ModuleNotFoundError("No module named 'detectron2'", name="detectron2")
    sys.stdout.write((recipe.word + "\\n") * recipe.times)
'''


@pytest.fixture
def parrot(tmp_path, monkeypatch):
    """A verb of a package of its own, with two named recipes; the test runs in an empty folder."""
    package = tmp_path / "package" / "aviary"
    (package / "recipes" / "parrot").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "bird.py").write_text(PARROT)
    (package / "recipes" / "parrot" / "polly.yaml").write_text(
        "# Says hello, as in the film.\n# By hand.\nword: hello\n"
    )
    (package / "recipes" / "parrot" / "twice.yaml").write_text("word: again\ntimes: 2\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(VERBS, "parrot", ("aviary.bird", "says words"))
    for action in ("open", "shut"):
        monkeypatch.setitem(VERBS, f"cage {action}", ("aviary.bird", f"{action}s the cage"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield package
    for name in ("aviary", "aviary.bird"):
        sys.modules.pop(name, None)


def refusal(capsys, *argv: str) -> str:
    """The one line that a wrong command line is answered with."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("addp: ")
    assert err.count("\n") == 1
    return err.removeprefix("addp: ").rstrip("\n")


def test_recipes_by_name_path_run_folder_and_settings_alone(parrot, capsys, tmp_path):
    own = tmp_path / "here" / "lr=3.yaml"  # a path with an equals sign is still a path
    own.write_text("word: mine\n")
    run_folder = tmp_path / "here" / "run"
    run_folder.mkdir()
    (run_folder / "recipe.yaml").write_text("word: resumed\n")
    said = {
        ("polly",): "hello\n",
        ("twice", "word=x"): "x\nx\n",
        ("times=2", "polly"): "hello\nhello\n",
        ("lr=3.yaml",): "mine\n",
        (str(own), "times=3"): "mine\nmine\nmine\n",
        ("run",): "resumed\n",
        ("word=a b",): "a b\n",
    }
    for args, text in said.items():
        assert main(["parrot", *args]) == 0
        assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pretrian"], "unknown verb 'pretrian'; did you mean 'pretrain'?"),
        (["xyz"], f"unknown verb 'xyz'; the verbs are {', '.join(VERBS)}, parrot, cage open, cage shut"),
        (["cage", "opne"], "unknown verb 'cage opne'; did you mean 'cage open'?"),
        (["cage"], "unknown verb 'cage'; the verbs are cage open, cage shut"),
        (["cage", "zzz", "x=1"], "unknown verb 'cage zzz'; the verbs are cage open, cage shut"),
        (["parrot", "poly"], "no recipe named 'poly'; named recipes: polly, twice; did you mean 'polly'?"),
        (
            ["parrot", "zzz"],
            "no recipe named 'zzz'; named recipes: polly, twice; a setting is written key=value, "
            "a file of your own by its path",
        ),
        (["parrot", "a/polly.yaml"], "a/polly.yaml: no such file; named recipes: polly, twice; did you mean 'polly'?"),
        (
            ["parrot", "polly", "times"],
            "'times': expected key=value without spaces; the recipe is 'polly', and there is one at most",
        ),
        (["parrot", "--times=3"], "'--times=3': settings are written key=value, without dashes (train.batch=32)"),
        (["parrot", "polly", "tims=3"], "unknown key 'tims'; did you mean 'times'?"),
        (["parrot", "polly", "volume=3"], "unknown key 'volume'; did you mean 'voice.volume'?"),
        (["parrot", "polly", "times=x"], "times: found 'x', expected a whole number"),
        (["parrot"], "1 required key is missing: word; write word=... or put it into the recipe"),
        (["parrot", "word=user"], "word: found 'user', expected a real word"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(parrot, capsys, args, message):
    # the log's own lines go to stderr as well; these come before anything runs, except where the run finds the mistake
    if args[-1] == "word=user":
        assert main(args) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"addp: {message}"
    else:
        assert refusal(capsys, *args) == message


def test_other_ends(parrot, capsys):
    assert main(["parrot", "word=stop"]) == 1
    assert capsys.readouterr().err.endswith("\naddp: interrupted\n")
    for word, trace in {"bug": "ZeroDivisionError: seven", "pipe": "BrokenPipeError: a worker's pipe"}.items():
        assert main(["parrot", f"word={word}"]) == 1
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert trace in err
    with pytest.raises(SystemExit) as ended:
        main(["parrot", "word=exit"])
    assert ended.value.code == 0


def test_a_missing_package_is_named_with_its_command(parrot, capsys):
    assert main(["parrot", "word=detectron2"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("addp: parrot: the package 'detectron2' is not installed; add it with: ")
    assert "--no-build-isolation" in last
    assert main(["parrot", "word=extra"]) == 1  # none of the suite's packages: a bug, shown in full
    assert "No module named 'detectron2_of_mars'" in capsys.readouterr().err


def test_help_and_version(parrot, capsys):
    assert main([]) == 2
    assert "usage: addp <verb>" in capsys.readouterr().err
    for argv in (["--help"], ["-h"], ["help"]):
        assert main(argv) == 0
        text = capsys.readouterr().out
        assert all(re.search(rf"^  {verb} +{re.escape(line)}$", text, re.M) for verb, (_, line) in VERBS.items())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"addp {addp_core.__version__}\n"
    texts = set()
    for argv in (["parrot", "--help"], ["parrot", "-h"], ["help", "parrot"], ["parrot", "polly", "x=1", "--help"]):
        assert main(argv) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1
    text = texts.pop()
    assert text.startswith("usage: addp parrot [recipe] [key=value ...]\n\n`addp parrot` says words.\n\nrecipes\n")
    assert "\n  polly  Says hello, as in the film.\n  twice\n\n" in text
    assert re.search(r"^  word +required +what to say \(text\)$", text, re.M)
    assert re.search(r"^  voice\.volume +60 +decibels \(a whole number\)$", text, re.M)


def test_only_the_first_process_reports_progress(parrot, capsys, monkeypatch):
    assert main(["parrot", "polly"]) == 0
    assert re.fullmatch(
        r"(\d\d:){2}\d\d clearing the throat\n(\d\d:){2}\d\d feathers everywhere\n", capsys.readouterr().err
    )
    monkeypatch.setenv("RANK", "3")
    assert main(["parrot", "polly"]) == 0
    assert re.fullmatch(r"(\d\d:){2}\d\d feathers everywhere\n", capsys.readouterr().err)
    assert main(["parrot", "tims=3"]) == 2
    assert capsys.readouterr().err.startswith("addp (process 3): unknown key")
    assert len(logging.getLogger("addp").handlers) == 1


def test_a_verb_of_two_words(parrot, capsys):
    (parrot / "recipes" / "open").mkdir()
    assert main(["cage", "open", "word=out"]) == 0
    said = capsys.readouterr().out
    assert main(["parrot", "word=out"]) == 0
    assert capsys.readouterr().out == said
    for argv in (["cage", "open", "--help"], ["help", "cage", "open"]):
        assert main(argv) == 0
        assert capsys.readouterr().out.startswith("usage: addp cage open ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_module_and_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: addp {verb} ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_named_recipe_is_read(verb):
    module = importlib.import_module(VERBS[verb][0])
    required = [name for name, key in all_keys(module.Recipe) if key.default is MISSING and not key.section]
    for path in recipes_of(module).values():
        text = path.read_text()
        assert text.startswith("# "), f"{path} opens with what it is for"
        load(module.Recipe, path, [f"{name}=x" for name in required if name not in yaml.safe_load(text)])


def test_the_first_second_does_without_torch():
    """`addp --help` and `addp doctor --help` in a fresh process: torch would take seconds."""
    code = "import sys; from addp_core.recipes.cli import main; main({}); sys.exit('torch' in sys.modules)"
    for argv in (["--help"], ["doctor", "--help"], ["nonsense"]):
        done = subprocess.run([sys.executable, "-c", code.format(argv)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "addp_core", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "addp_core", "tokeniser"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "addp: unknown verb 'tokeniser'; did you mean 'tokenizer'?\n"
