"""The command line: what it runs, what it prints, and its exit codes."""

import logging
import os
import re
import shutil
import subprocess
import sys

import pytest

import addp_core
from addp_core.base import job
from addp_core.recipes import cli
from addp_core.recipes.cli import main
from addp_core.recipes.verbs import VERBS, verb_groups

PARROT = '''"""`addp parrot` says words."""
import logging, os, signal, sys
from dataclasses import dataclass, field
from typing import Annotated
from addp_core.base.errors import UserError

@dataclass
class Voice:
    volume: Annotated[int, "decibels"] = 60

    def __post_init__(self):
        if not self.volume:
            raise ValueError("volume: found 0, expected a parrot")

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
    """A verb with two named recipes and a group of two verbs, in a package of their own; the folder is empty."""
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
    """Run a wrong command line and return the one line of its error."""
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
    shutil.copytree(run_folder, tmp_path / "here" / "lr=3")
    outputs = {
        ("polly",): "hello\n",
        ("twice", "word=x"): "x\nx\n",
        ("times=2", "polly"): "hello\nhello\n",
        ("lr=3.yaml",): "mine\n",
        (str(own), "times=3"): "mine\nmine\nmine\n",
        ("run",): "resumed\n",
        ("lr=3", "times=2"): "resumed\nresumed\n",
        ("word=a b",): "a b\n",
    }
    for args, text in outputs.items():
        assert main(["parrot", *args]) == 0
        assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pretrian"], "unknown verb 'pretrian'; did you mean 'pretrain'?"),
        (["xyz"], f"unknown verb 'xyz'; the verbs are {', '.join(VERBS)}, parrot, cage open, cage shut"),
        (["cage", "opne"], "unknown verb 'cage opne'; did you mean 'cage open'?"),
        (["caeg"], "unknown verb 'caeg'; did you mean 'cage'?"),
        (["cage", "--print-config"], "unknown verb 'cage'; the verbs are cage open, cage shut"),
        (["cage", "opne", "--help"], "unknown verb 'cage opne'; did you mean 'cage open'?"),
        (["help", "cage", "opne"], "unknown verb 'cage opne'; did you mean 'cage open'?"),
        (["cage", "zzz", "x=1"], "unknown verb 'cage zzz'; the verbs are cage open, cage shut"),
        (["parrot", "poly"], "no recipe named 'poly'; named recipes: polly, twice; did you mean 'polly'?"),
        (
            ["parrot", "zzz"],
            "no recipe named 'zzz'; named recipes: polly, twice; a setting is written key=value, "
            "a recipe file of your own as its path",
        ),
        (["parrot", "a/polly.yaml"], "a/polly.yaml: no such file; named recipes: polly, twice; did you mean 'polly'?"),
        (
            ["parrot", "polly", "times"],
            "'times': expected key=value without spaces; the recipe is 'polly', and there can be only one",
        ),
        (["parrot", "--times=3"], "'--times=3': settings are written key=value, without dashes (train.batch=32)"),
        (
            ["parrot", "polly", "--print-confg"],
            "'--print-confg': settings are written key=value, without dashes (train.batch=32); "
            "did you mean '--print-config'?",
        ),
        (["parrot", "polly", "tims=3"], "unknown key 'tims'; did you mean 'times'?"),
        (["parrot", "polly", "volume=3"], "unknown key 'volume'; did you mean 'voice.volume'?"),
        (["parrot", "polly", "times=x"], "times: found 'x', expected a whole number"),
        (["parrot"], "1 required key is missing: word; write word=... or put it into the recipe"),
        (["parrot", "word=user"], "word: found 'user', expected a real word"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(parrot, capsys, args, message):
    # The log goes to stderr as well. Nothing has been logged yet, except if the run itself finds the mistake.
    if args[-1] == "word=user":
        assert main(args) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"addp: {message}"
    else:
        assert refusal(capsys, *args) == message


def test_interrupts_bugs_and_system_exit(parrot, capsys):
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
    assert main(["parrot", "word=extra"]) == 1  # not a package of any extra: a bug, shown with its traceback
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


def test_only_rank_0_reports_progress(parrot, capsys, monkeypatch):
    assert main(["parrot", "polly"]) == 0
    assert re.fullmatch(
        r"(\d\d:){2}\d\d clearing the throat\n(\d\d:){2}\d\d feathers everywhere\n", capsys.readouterr().err
    )
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(job, "join", lambda: None)  # rank 3 alone would wait for the others
    assert main(["parrot", "polly"]) == 0
    assert re.fullmatch(r"(\d\d:){2}\d\d feathers everywhere\n", capsys.readouterr().err)
    assert main(["parrot", "tims=3"]) == 2
    assert capsys.readouterr().err.startswith("addp (rank 3): unknown key")
    assert len(logging.getLogger("addp").handlers) == 1


def test_a_verb_that_runs_alone_does_not_mind_half_a_group(parrot, capsys, monkeypatch):
    """A job script of Slurm may export WORLD_SIZE for commands that `srun` starts later."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["parrot", "polly"]) == 2
    assert "WORLD_SIZE=8: found in the environment without RANK, MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err
    monkeypatch.setattr(cli, "ONE_PROCESS", {"parrot"})
    assert main(["parrot", "polly"]) == 0
    assert "WORLD_SIZE" not in os.environ  # nor in the processes that it starts


def test_a_verb_of_two_words(parrot, capsys):
    (parrot / "recipes" / "open").mkdir()
    assert main(["cage", "open", "word=out"]) == 0
    output = capsys.readouterr().out
    assert main(["parrot", "word=out"]) == 0
    assert capsys.readouterr().out == output
    for argv in (["cage", "open", "--help"], ["help", "cage", "open"]):
        assert main(argv) == 0
        assert capsys.readouterr().out.startswith("usage: addp cage open ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_module_and_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: addp {verb} ")


@pytest.mark.parametrize("group", verb_groups())
def test_a_group_lists_its_verbs(group, capsys):
    texts = set()
    for argv in ([group], [group, "--help"], [group, "-h"], [group, "help"], ["help", group], ["--help", group]):
        assert main(argv) == 0
        texts.add(capsys.readouterr().out)
    (text,) = texts
    assert text.startswith(f"usage: addp {group} <action> [recipe] [key=value ...]\n\n")
    lines = [line for verb in verb_groups()[group] for line in [VERBS[verb][1]]]
    assert re.findall(rf"^  {group} \w+ +(.*)$", text, re.M) == lines


def test_print_config_runs_nothing(parrot, capsys, tmp_path):
    for argv in (["polly", "times=3", "--print-config"], ["--print-config", "times=3", "polly"]):
        assert main(["parrot", *argv]) == 0
        out, err = capsys.readouterr()
        assert (out, err) == ("word: hello\ntimes: 3\nvoice:\n  volume: 60\n", "")
    (tmp_path / "here" / "loud.yaml").write_text("base: twice\nvoice: {volume: 90}\n")
    assert main(["parrot", "loud.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == "word: again\ntimes: 2\nvoice:\n  volume: 90\n"
    assert main(["parrot", "polly", "--print-config", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: addp parrot ")


def test_print_config_names_the_keys_that_are_missing(parrot, capsys, tmp_path):
    assert main(["parrot", "voice.volume=1", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert text == "# required, not set: word\ntimes: 1\nvoice:\n  volume: 1\n"
    (tmp_path / "here" / "printed.yaml").write_text(text)
    assert main(["parrot", "printed.yaml", "word=hi"]) == 0
    assert capsys.readouterr().out == "hi\n"


@pytest.mark.parametrize("setting", ["tims=3", "times=x", "voice.volume=0", "--times=3"])
def test_print_config_refuses_what_a_run_refuses(parrot, capsys, setting):
    """Also without the required key: the sections that are complete are checked."""
    assert refusal(capsys, "parrot", setting, "--print-config") == refusal(capsys, "parrot", "word=x", setting)


def test_help_and_errors_do_not_import_torch():
    """Importing torch would take seconds."""
    code = "import sys; from addp_core.recipes.cli import main; main({}); sys.exit('torch' in sys.modules)"
    for argv in (["--help"], ["det"], ["doctor", "--help"], ["nonsense"]):
        done = subprocess.run([sys.executable, "-c", code.format(argv)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_reader_of_stdout_that_leaves_early_causes_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "addp_core", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_python_m_addp_core():
    done = subprocess.run([sys.executable, "-m", "addp_core", "tokeniser"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "addp: unknown verb 'tokeniser'; did you mean 'tokenizer'?\n"
