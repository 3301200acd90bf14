"""Arguments of the commands that a bench runs: written from settings, resolved as `addp` would, compared by result."""

import functools
import hashlib
import importlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from addp_core.base.errors import UserError, naming_key
from addp_core.recipes.config import dump, load_recipe
from addp_core.recipes.verbs import VERBS


def as_argument(value: Any, seed: int = 0) -> str:
    """Return a setting's value as the command line takes it; {seed} in a text stands for the seed."""
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else json.dumps(value, default=str)


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings as `key=value`."""
    texts = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return [f"{key}={as_argument(value)}" for key, value in texts.items()]


def verb_recipe(arguments: Sequence[str], benchmark: str) -> Any:
    """Return the recipe (a dataclass of the verb's module) that `addp <arguments>` would run with.

    Raises UserError, which begins with the benchmark, if `addp` would refuse the arguments.
    """
    verb = " ".join(arguments[:2]) if " ".join(arguments[:2]) in VERBS else arguments[0]
    rest = arguments[len(verb.split()) :]
    module = importlib.import_module(VERBS[verb][0])
    name = rest[0] if rest and "=" not in rest[0] else None
    with naming_key(benchmark):
        recipe = load_recipe(module, name, rest[1:] if name else rest)
    if (launch := getattr(recipe, "launch", "local")) != "local":
        raise UserError(f"{benchmark}: launch: found {launch}, expected local in a bench or sweep; see bench.launch")
    return recipe


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def digests_of_files(recipe: Any, made_in: Path, known: Collection[str] = ()) -> dict[str, str]:
    """Return the digest of each file that a verb's recipe names, by its key.

    Without models and the keys `known`, of which a bench knows more, and without what is below `made_in`.
    """
    from addp_core.training.inputs import file_digest
    from addp_core.training.run_recipe import RunRecipe

    resolved = RunRecipe(recipe)
    keys = [key for key, kind in resolved.paths.items() if kind == "file" and resolved.values[key]]
    keys = [key for key in keys if key not in keys_without_effect() | set(known)]
    outside = [key for key in keys if not Path(resolved.values[key]).absolute().is_relative_to(made_in.absolute())]
    return {key: found for key in outside if (found := file_digest(resolved.values[key]))}


@functools.cache
def keys_without_effect() -> frozenset[str]:
    """Return the keys which do not change a result, or whose values a step's fingerprint holds otherwise."""
    from addp_core.training.run_recipe import COMPUTE_ONLY_KEYS  # `addp report` does without it

    return COMPUTE_ONLY_KEYS | {"model", "workers", "cache"}


def result_settings(recipe: Any) -> dict[str, Any]:
    """Return a verb's recipe as nested dictionaries, without `keys_without_effect`."""
    from addp_core.training.precision import AUTO
    from addp_core.training.run_recipe import FORMER_PRECISION

    tree = yaml.safe_load(dump(recipe))
    for key in keys_without_effect():
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section.get(name) or {}
        section.pop(last, None)
    for section in (tree, tree.get("train") or {}):
        if section.get("precision") == AUTO:  # a result from before `auto` existed still holds: runs keep what they had
            section["precision"] = FORMER_PRECISION
    data = tree.get("data")
    if isinstance(data, dict) and data.get("resize", "") is None:  # nor does one from before this key existed change
        del data["resize"]
    return tree


@contextmanager
def errors_name(key: str) -> Iterator[None]:
    """Let a UserError from this block begin with the bench's key instead of the verb's."""
    try:
        yield
    except UserError as error:
        text = str(error)
        prefix = re.match(r"(data\.\w+|imagenet_c): ", text)
        raise UserError(f"{key}: {text[prefix.end() :] if prefix else text}") from error
