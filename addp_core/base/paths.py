"""The types of keys and fields that name something on disk, and the names of files in run folders."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from addp_core.base.errors import UserError


@dataclass(frozen=True)
class PathKind:
    """Marks a text as a path, and says what it leads to."""

    kind: Literal["file", "dataset", "cache"]


FilePath = Annotated[str, PathKind("file")]  # a file to read, or a run folder with it
DatasetPath = Annotated[str, PathKind("dataset")]
CachePath = Annotated[str, PathKind("cache")]  # a folder of what can be computed again

MODEL_FILE = "model.safetensors"  # of a run folder
TOKENS_FILE = "tokens.json"  # of a token cache, whose ids depend on nothing that it does not name
FINISHED_FILE = "finished.json"  # of a run folder, at the end
METRICS_FILE = "metrics.jsonl"  # of a run folder
RECIPE_FILE = "recipe.yaml"  # of a run folder, and of any other that a recipe filled
INPUTS_FILE = "inputs.json"  # in a run folder: digests of what the run began with


def user_cache(name: str) -> Path:
    """Return the folder of the user's cache for what can be computed again and is not of one run.

    A user without a home folder, as in a container that runs under any number, has it among the temporary files.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return expand_home(given) / "addp" / name
    try:
        return Path.home() / ".cache" / "addp" / name
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"addp-{os.getuid()}", name)


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder in place of a leading ~ or ~user. Raises UserError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise UserError(
            f"{path}: {user} has no home folder on this machine; expected another path, or ./{path} for a name with ~"
        ) from None
