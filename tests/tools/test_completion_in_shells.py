"""`addp completion`: the scripts, in the shells that are installed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from addp_core.recipes.cli import main

ADDP = Path(sys.executable).parent / "addp"


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        shutil.which(shell) is None or not ADDP.exists(), reason=f"{shell} or the command addp is not installed"
    )


@pytest.fixture
def in_shell(tmp_path, capsys):
    """A function that runs commands in a shell that has read its script, and returns the lines that they write."""

    def run(shell: str, commands: str) -> list[str]:
        capsys.readouterr()
        assert main(["completion", shell]) == 0
        script = tmp_path / f"addp.{shell}"
        script.write_text(capsys.readouterr().out)
        (tmp_path / "photos").mkdir(exist_ok=True)
        environment = os.environ | {"PATH": f"{ADDP.parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = subprocess.run(
            [shell, "-c", f"source {script}\n{commands}"],
            env=environment | {"TERM": "dumb"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@needs("bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("addp pretr", ["pretrain"]),
        ("addp seg pr", ["predict", "probe"]),
        ("addp pretrain tiny train.parallel=", ["ddp", "fsdp"]),  # readline replaces what follows the equals sign
        ("addp pretrain tiny data=pho", []),  # files, by `complete -o default`
    ],
)
def test_bash(in_shell, line, expected):
    commands = f"COMP_LINE='{line}' COMP_POINT={len(line)}\n_addp addp\nprintf '%s\\n' ${{COMPREPLY[@]}}\n"
    commands += "complete -p addp"
    *words, registered = in_shell("bash", commands)
    assert sorted(filter(None, words)) == expected
    assert registered == "complete -o default -F _addp addp"


@needs("fish")
def test_fish(in_shell):
    lines = in_shell("fish", 'complete -C "addp pretr"; complete -C "addp pretrain tiny train.parallel="')
    assert [line.split("\t")[0] for line in lines] == ["pretrain", "train.parallel=ddp", "train.parallel=fsdp"]
    assert in_shell("fish", 'complete -C "addp pretrain tiny data=pho"') == ["data=photos/"]


@needs("zsh")
def test_zsh(in_shell):
    """In a terminal of its own, since zsh completes nowhere else."""
    commands = """
zmodload zsh/zpty
zpty shell zsh -f
zpty -w shell "PS1='> '; autoload -U compinit; compinit -u -D; source addp.zsh; bindkey '^I' complete-word"
zpty -r shell shown '*> *'
for typed in $'addp pretr\\tti\\ttrain.para\\t' $'addp pretrain data=pho\\t'; do
    zpty -w -n shell $typed
    zpty -r shell shown '*(llel=|photos/)*'
    print -r -- $shown
    zpty -w -n shell $'\\C-u'
done
zpty -d shell
"""
    text = "".join(in_shell("zsh", commands))
    text = re.sub(r" \x08|\x07", "", text)  # the space that may be taken back, and the bell
    assert "addp pretrain tiny train.parallel=" in text
    assert "addp pretrain data=photos/" in text
