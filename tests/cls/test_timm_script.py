"""`python -m cls.timm_script` runs scripts of timm, here one that stands in for them, with our models registered."""

import subprocess
import sys

import pytest

from addp_core import save_model
from addp_core.networks.encoder import Encoder, EncoderConfig
from cls.timm_script import main

SCRIPT = """
import argparse
import timm
from helper import describe  # a module beside the script

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--checkpoint")
arguments = parser.parse_args()
describe(timm.create_model(arguments.model, checkpoint_path=arguments.checkpoint))
"""


@pytest.fixture
def command(tmp_path):
    """Return the command of a script that builds a model from a file."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("def describe(model):\n    print(model.embed_dim, len(model.blocks))\n")
    save_model(Encoder(EncoderConfig(16, 2, 2), (16, 16), 8), tmp_path / "e.safetensors")
    start = [sys.executable, "-m", "cls.timm_script", str(tmp_path / "script.py")]
    return [*start, "--checkpoint", str(tmp_path / "e.safetensors"), "--model"]


def test_a_script_builds_our_models(command):
    done = subprocess.run([*command, "addp_vit"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "16 2\n"), done.stderr


def test_mistakes_are_one_line(command):
    done = subprocess.run([*command, "addp_vit_tiny_patch16"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected patch_size=8, embed_dim=16, depth=2" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "found"), [([], "found no script"), (["t.py", "--x"], "found t.py, which is no file")]
)
def test_a_script_is_needed(arguments, found, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(found)
