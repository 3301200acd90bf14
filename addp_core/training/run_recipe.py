"""The recipe of a run as its folder stores it, and how another recipe differs from it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import yaml

from addp_core.recipes.config import dump
from addp_core.recipes.tree import default_tree, plain_tree

# Keys that change how a run is monitored, stored or computed, but not its result: a run may continue with other values.
COMPUTE_ONLY_KEYS = frozenset(
    {"out", "checkpointing", "eval_batch", "confusion", "data.workers", "data.prefetch", "data.max_errors"}
    | {f"train.{key}" for key in ("compile", "channels_last", "log_every", "checkpoint_every", "keep")}
    | {f"train.{key}" for key in ("preview_every", "evaluate_every", "export_every", "max_nonfinite")}
)
# Keys that set a run's length: a run may be extended, and then counts as unfinished until it reaches the new end.
LENGTH_KEYS = frozenset({"train.steps", "train.epochs"})

Values = dict[str, Any]  # full name of a key ('train.batch') -> value


class RunRecipe:
    """A resolved recipe: `text` is its YAML, `values` its keys, `defaults` the values of keys that are not given.

    Args:
        recipe: an instance of a recipe's dataclass, or the YAML of one, of which no defaults are known.
    """

    def __init__(self, recipe: Any):
        self.text = recipe if isinstance(recipe, str) else dump(recipe)
        self.values = read_values(self.text)
        cls = type(recipe)
        self.defaults = flatten(plain_tree(cls, default_tree(cls))) if dataclasses.is_dataclass(cls) else {}

    def changed_keys(self, previous: Values) -> list[str]:
        """Return the keys that make this another run than one with the values `previous`.

        A recipe that was stored before a key existed is one with this key's default.
        """
        absent = object()
        before = {**self.defaults, **previous}
        return [
            key
            for key in sorted(previous.keys() | self.values.keys())
            if key not in COMPUTE_ONLY_KEYS | LENGTH_KEYS and before.get(key, absent) != self.values.get(key, absent)
        ]

    def describe_changes(self, keys: list[str], previous: Values) -> str:
        """Return 'key=value (was another)' for each of the keys, separated by commas."""
        before = {**self.defaults, **previous}
        return ", ".join(f"{key}={self.values.get(key, 'absent')} (was {before.get(key, 'absent')})" for key in keys)


def read_values(text: str) -> Values:
    """Return the keys of a recipe's YAML. Raises yaml.YAMLError or AttributeError if it is not a mapping."""
    return flatten(yaml.safe_load(text) or {})


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Values:
    """{'a': {'b': 1}} -> {'a.b': 1}"""
    flat: Values = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest(values: Values) -> str:
    """Return a digest of the keys that determine the result."""
    relevant = {key: value for key, value in values.items() if key not in COMPUTE_ONLY_KEYS}
    return hashlib.blake2b(json.dumps(relevant, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
