"""`addp completion bash`, `zsh` or `fish`: print what makes the shell complete verbs, recipes, keys and values.

    bash   eval "$(addp completion bash)"                                    in ~/.bashrc
    zsh    eval "$(addp completion zsh)"                                     in ~/.zshrc, after compinit
    fish   addp completion fish > ~/.config/fish/completions/addp.fish       once

The shell asks `addp --complete <words>`, which knows the keys of the installed version.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class Recipe:
    """Keys of `addp completion`."""

    shell: Annotated[Literal["bash", "zsh", "fish"], "shell"]


def run(recipe: Recipe) -> None:
    """Write the script for a shell to stdout."""
    sys.stdout.write((TEMPLATES / f"completion.{recipe.shell}").read_text(encoding="utf-8"))
