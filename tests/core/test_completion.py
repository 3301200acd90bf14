"""What words become in the completion of shells, and the command lines that verbs show without arguments."""

import re
import shlex

import pytest

from addp_core.recipes.cli import main, split
from addp_core.recipes.completion import completions
from addp_core.recipes.config import recipes_of, show_recipe
from addp_core.recipes.examples import EXAMPLES
from addp_core.recipes.verbs import ONE_PROCESS, VERBS, recipe_module


def texts(line: str) -> list[str]:
    return list(completions(line.split(" ")))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pre", ["predictor", "pretrain"]),
        ("s", ["sweep", "seg"]),
        ("help det c", ["cost"]),
        ("--", ["--help", "--version"]),
        ("det ", ["train", "eval", "predict", "cost"]),
        ("tokenizer ca", ["cache"]),
        ("tokenizer c", ["cache", "cifar10", "cifar10_gpu"]),
        ("pretrain ti", ["tiny"]),
        ("pretrain tiny ti", []),
        ("pretrain --p", ["--print-config"]),
        ("pretrain tiny train.pr", ["train.precision=", "train.preview_every="]),
        ("pretrain train.precision=fp32 train.pr", ["train.preview_every="]),
        ("pretrain train.precision=", [f"train.precision={value}" for value in ("auto", "fp32", "bf16", "fp16")]),
        ("pretrain train.compile=t", ["train.compile=true"]),
        ("pretrain da", ["data=", "data."]),
        ("pretrain data=here/", []),
        ("pretrain nonsense=", []),
        ("nonsense ", []),
        ("completion ", ["bash", "fish", "zsh", "shell="]),
    ],
)
def test_words_become(line, expected):
    assert sorted(texts(line)) == sorted(expected)


def test_the_command_line_prints_each_with_its_meaning(capsys):
    assert main(["--complete", "pretrain", "train.par"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("train.parallel=\twhat several processes hold")
    assert main(["--complete"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 15


def test_keys_come_section_by_section():
    first = texts("pretrain tiny ")
    assert {"out=", "data=", "data.", "train.", "launch=", "slurm."} <= set(first)
    assert not any(re.search(r"\..", text) for text in first)
    assert "model.encoder." in texts("pretrain tiny model.")
    assert "model.encoder.width=" in texts("pretrain tiny model.encoder.w")


def test_every_verb_has_two_command_lines_that_it_accepts():
    assert EXAMPLES.keys() == VERBS.keys()
    for verb, lines in EXAMPLES.items():
        assert len(set(lines)) == 2
        for line in lines:
            words = shlex.split(re.sub(r'^eval "\$\((.*)\)"$', r"\1", line).partition(" > ")[0])
            assert words[: 1 + len(verb.split())] == ["addp", *verb.split()]
            module = recipe_module(verb)
            recipe, settings = split(words[1 + len(verb.split()) :])
            if recipe in (None, *recipes_of(module)):
                assert not show_recipe(module, recipe, settings).startswith("# required"), line
            else:
                assert recipe == "my_sweep.yaml"


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb in ONE_PROCESS or verb in ("pretrain", "det train")])
def test_a_verb_shows_them_in_its_help(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    assert "\n\nfor example\n  " + "\n  ".join(EXAMPLES[verb]) + "\n\n" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["pretrain", "det train", "export", "bench"])
def test_without_arguments_a_verb_shows_them(verb, capsys):
    assert main(verb.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{VERBS[verb][1]}\n\nfor example\n  {EXAMPLES[verb][0]}\n  {EXAMPLES[verb][1]}\n\n")
    assert captured.err.splitlines()[-1].startswith("addp: ")
    assert main([*verb.split(), "no_such_key=1"]) == 2  # with arguments, one line
    assert len(capsys.readouterr().err.splitlines()) == 1
