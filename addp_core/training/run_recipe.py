"""The recipe of a run as its folder stores it, and how another recipe differs from it."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import yaml

from addp_core.base.paths import MODEL_FILE
from addp_core.data.config import DEFAULT_RESIZE, DataConfig
from addp_core.recipes.config import dump
from addp_core.recipes.keys import all_keys
from addp_core.recipes.tree import default_tree, plain_tree
from addp_core.training.precision import AUTO
from addp_core.training.submission import KEYS as LAUNCH_KEYS

# Keys that change how a run is monitored, stored or computed, but not its result: a run may continue with other values.
COMPUTE_ONLY_KEYS = frozenset(
    {"out", "checkpointing", "eval_batch", "confusion", "data.workers", "data.prefetch", "data.max_errors"}
    | {f"train.{key}" for key in ("compile", "channels_last", "parallel", "log_every", "checkpoint_every", "keep")}
    | {f"train.{key}" for key in ("preview_every", "evaluate_every", "export_every", "max_nonfinite")}
    | {f"train.{key}" for key in ("trackers", "tracker_project", "keep_best")}
    | {f"evaluation.{key}" for key in ("data", "images", "classes", "knn", "probe", "samples", "inception")}
    | {"evaluation.extractor", "evaluation.batch"}
    | {"data.tries", "data.timeout"}
    | LAUNCH_KEYS
)
# Compute only too; the digests of segmentation runs, which had this key first, contain it.
CHECKPOINTING = "train.checkpointing"
# Keys that set a run's length: a run may be extended, and then counts as unfinished until it reaches the new end.
STEPS = "train.steps"
LENGTH_KEYS = frozenset({STEPS, "train.epochs"})

PRECISION, FORMER_PRECISION = "train.precision", "fp32"  # the default until `auto` existed
RESIZE, FORMER_RESIZE = "data.resize", "pillow"  # what all runs had until the key existed
BLOCK, FORMER_BLOCK = "data.shuffle_block", 1  # the default, and what all runs had until the key existed

Values = dict[str, Any]  # full name of a key ('train.batch') -> value


class RunRecipe:
    """A resolved recipe: `source` is what it was made of, `text` its YAML, `values` its keys.

    `defaults` has the values of keys that are not given, and `paths` the kind (`Key.path_kind`) of keys that are paths.

    Args:
        recipe: an instance of a recipe's dataclass, or the YAML of one, of which neither is known.
    """

    def __init__(self, recipe: Any):
        self.source = recipe
        self.text = recipe if isinstance(recipe, str) else dump(recipe)
        self.values = read_values(self.text)
        cls = type(recipe)
        declared = dataclasses.is_dataclass(cls)
        self.defaults = flatten(plain_tree(cls, default_tree(cls))) if declared else {}
        if PRECISION in self.defaults:
            self.defaults[PRECISION] = FORMER_PRECISION
        if RESIZE in self.defaults:
            self.defaults[RESIZE] = FORMER_RESIZE
        kinds = {name: key.path_kind for name, key in all_keys(cls)} if declared else {}
        self.paths = {name: kind for name, kind in kinds.items() if kind and name in self.values}

    def changed_keys(self, previous: Values) -> list[str]:
        """Return the keys that make this another run than one with the values `previous`.

        A recipe that was stored before a key existed is one with this key's default. Two spellings of a path are the
        same, and so are no path and that of what the run then makes itself, such as `<out>/tokenizer`.
        """
        absent = object()
        before = {**self.defaults, **previous}

        def same(key: str) -> bool:
            old, new = before.get(key, absent), self.values.get(key, absent)
            return old == new or (key in self.paths and _given_path(before, key) == _given_path(self.values, key))

        keys, ignored = previous.keys() | self.values.keys(), COMPUTE_ONLY_KEYS | LENGTH_KEYS | {CHECKPOINTING}
        return [key for key in sorted(keys) if key not in ignored and not same(key)]

    def changed_length(self, previous: Values) -> set[str]:
        """Return the keys that make this run longer or shorter than one with the values `previous`."""
        before, keys = {**self.defaults, **previous}, LENGTH_KEYS
        if None not in (before.get(STEPS), self.values.get(STEPS)):  # epochs then mean nothing
            keys = frozenset({STEPS})
        return {key for key in keys if before.get(key) != self.values.get(key)}

    def moved_with_run(self, key: str, previous: Values) -> bool:
        """Check whether a path leads to the same place in the run folder or beside it, as when both were moved.

        Earlier stages in the folder of a later one are such paths: `../tokenizer/model.safetensors`.
        """
        before, now = (_path_from_run(values, key) for values in (previous, self.values))
        return before == now and before is not None

    def describe_changes(self, keys: list[str], previous: Values) -> str:
        """Return 'key=value (was another)' for each of the keys, separated by commas."""
        before = {**self.defaults, **previous}
        return ", ".join(f"{key}={self.values.get(key, 'absent')} (was {before.get(key, 'absent')})" for key in keys)


def _full_path(text: Any) -> str:
    """Return the absolute path, with links followed; "" if there is no path."""
    return os.path.realpath(os.path.expanduser(text)) if text and isinstance(text, str) else ""


def _given_path(values: Values, key: str) -> str:
    """Return the full path of a key; "" if it leads to what the run makes itself: the earlier stage of this name."""
    path = _full_path(values.get(key))
    own = os.path.join(_full_path(values.get("out")), key)
    return "" if path in (own, os.path.join(own, MODEL_FILE)) else path


def _path_from_run(values: Values, key: str) -> str | None:
    """Return the path relative to the run folder, or None if it is farther than beside it."""
    path, out = values.get(key), values.get("out")
    if not path or not out:
        return None
    relative = os.path.relpath(_full_path(path), _full_path(out))
    return None if relative.startswith(os.path.join("..", "..")) else relative


def keep_precision(recipe: Any, previous: Values) -> None:
    """Give `train.precision=auto` in a recipe, in place, the value of the run with the values `previous`."""
    section = getattr(recipe, "train", None)
    if section is not None and getattr(section, "precision", None) == AUTO:
        section.precision = previous.get(PRECISION, FORMER_PRECISION)


def settle_resize(recipe: Any, previous: Values | None) -> None:
    """Give a `data.resize` that is not set, in place, the value of the run with the values `previous`, or the default.

    previous: None for a new run.
    """
    section = getattr(recipe, "data", None)
    if isinstance(section, DataConfig) and section.resize is None:
        former = None if previous is None else previous.get(RESIZE, FORMER_RESIZE)
        section.resize = former or DEFAULT_RESIZE


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


def result_values(values: Values) -> Values:
    """Return the keys that determine the result, without a later key that has the value of runs from before it."""
    relevant = {key: value for key, value in values.items() if key not in COMPUTE_ONLY_KEYS}
    if relevant.get(BLOCK) == FORMER_BLOCK:
        del relevant[BLOCK]
    return relevant


def digest(values: Values) -> str:
    """Return a digest of the keys that determine the result."""
    return hashlib.blake2b(
        json.dumps(result_values(values), sort_keys=True, default=str).encode(), digest_size=16
    ).hexdigest()
