"""The types of keys and fields that name something on disk, and the names of files in run folders."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal


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
    """Return the folder of the user's cache for what can be computed again and is not of one run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "addp" / name
