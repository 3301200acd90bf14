"""What the command line does not wait for: help and the errors of a recipe import neither torch nor what needs it."""

import importlib
import json
import subprocess
import sys

import pytest

from addp_core.recipes.verbs import RECIPES, VERBS

SLOW = ("torch", "timm", "torchvision", "accelerate", "mmengine", "detectron2", "numpy", "PIL")
# One process for all verbs, which forks: it starts once, and each verb finds the modules as they were before it.
SCRIPT = """
import json, os, sys
from addp_core.recipes.cli import main

slow, verbs = json.loads(sys.argv[1])
arguments = (["--help"], ["no_such_key=3"], ["--print-config"])
for verb in verbs:
    if not (child := os.fork()):
        stdout, sys.stdout, sys.stderr = sys.stdout, open(os.devnull, "w"), open(os.devnull, "w")
        for rest in arguments:
            code = main([*verb.split(), *rest])
            imported = [name for name in slow if name in sys.modules]
            print(json.dumps([verb, rest, code, imported]), file=stdout, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_no_verb_imports_torch_for_help_or_for_a_wrong_key():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([SLOW, list(VERBS)])], capture_output=True, text=True, check=True
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 3 * len(VERBS), done.stderr
    for verb, arguments, code, imported in results:
        assert code == (2 if arguments == ["no_such_key=3"] else 0), (verb, arguments)
        assert imported == [], (verb, arguments)


@pytest.mark.parametrize("verb", RECIPES)
def test_a_verb_runs_with_the_dataclass_that_the_command_line_has_checked(verb):
    module, name = RECIPES[verb].split(":")
    assert importlib.import_module(VERBS[verb][0]).Recipe is getattr(importlib.import_module(module), name)
