"""A segmentor and a run small enough for the tests of seg/."""

from pathlib import Path

import pytest

from addp_core.recipes.cli import main

CLASSES = 13  # of the toy scenes
STEPS = 4  # of a run of `train_command`
TINY_CONFIG = "config=upernet_addp-tiny_500_ade20k-512x512"


def train_command(scenes: Path, model: Path | str, out: Path, *settings: str) -> list[str]:
    """Return the arguments of a run of `STEPS` steps with narrow heads; `settings` come last and win."""
    segmentor = [TINY_CONFIG, "channels=8", "data.crop=32", "data.scale=[48,192]"]
    length = [f"train.steps={STEPS}", "train.warmup_steps=1", "train.batch=4", "train.log_every=1"]
    paths = ["seg", "train", f"data={scenes}", f"model={model}", f"out={out}", "data.workers=0"]
    return [*paths, *segmentor, *length, *settings]


def user_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must exit with 2, and return its only line of error on stderr."""
    assert main([*arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("addp: ")]
    assert len(lines) == 1
    return lines[0]
