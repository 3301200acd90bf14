"""A recipe under construction: nested dictionaries of values, from the defaults to the finished dataclass."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast

from addp_core.base.errors import UserError
from addp_core.recipes.keys import Key, keys_of, union_members

T = TypeVar("T")
Tree = dict[str, Any]  # field name -> value, or the Tree of a nested section


def default_tree(cls: type) -> Tree:
    """Return the tree of a dataclass before anything is read; required keys are absent."""
    tree: Tree = {}
    # Default factories are called anew for each recipe, so that two recipes never share a list.
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        key = keys_of(cls)[field.name]
        if field.default_factory is not dataclasses.MISSING:
            value = cast(Callable[[], Any], field.default_factory)()
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif key.section and NoneType not in union_members(key.type):
            value = default_tree(key.section)
        else:
            continue
        tree[field.name] = _tree_of(value) if key.section and dataclasses.is_dataclass(value) else value
    return tree


def _tree_of(instance: Any) -> Tree:
    keys = keys_of(type(instance))
    values = {name: getattr(instance, name) for name in keys}
    return {
        name: _tree_of(value) if keys[name].section and value is not None else value for name, value in values.items()
    }


def choose_variant(key: Key, tree: Tree, names: Iterable[str]) -> Any:
    """Return the dataclass of a section in whose tree keys of these names are about to be set.

    If one of them belongs to another variant than the first, the tree becomes that of its defaults, in place; keys that
    both have keep their values. Once chosen, a variant stays.
    """
    current = key.variant_of(tree)
    is_chosen = current is not key.section
    if is_chosen:
        return current
    others = set(names) - keys_of(current).keys()
    chosen = next((cls for cls in key.variants[1:] if others & keys_of(cls).keys()), None)
    if chosen is None:
        return current
    kept = {name: value for name, value in tree.items() if name in keys_of(chosen)}
    tree.clear()
    tree.update(default_tree(chosen) | kept)
    return chosen


def clear_replaced(cls: type, tree: Tree, keys_set: Collection[str], prefix: str = "") -> None:
    """Set to null the keys that would count instead of those that a document or the settings have set alone.

    Args:
        cls: the dataclass of the tree.
        tree: changed in place.
        keys_set: the full names of the keys that were set.
        prefix: the full name of the section with a dot.
    """
    for name, other in getattr(cls, "__replaced_by__", {}).items():
        if prefix + name in keys_set and prefix + other not in keys_set:
            tree[other] = None
    for name, key in keys_of(cls).items():
        if key.section and isinstance(tree.get(name), dict):
            clear_replaced(key.variant_of(tree[name]), tree[name], keys_set, f"{prefix}{name}.")


def missing_keys(cls: type, tree: Tree, prefix: str = "") -> Iterator[str]:
    """Yield the full names of required keys that the tree lacks."""
    for name, key in keys_of(cls).items():
        if name not in tree:
            yield prefix + name
        elif key.section and isinstance(tree[name], dict):
            yield from missing_keys(key.variant_of(tree[name]), tree[name], f"{prefix}{name}.")


def build(cls: type[T], tree: Tree, prefix: str = "", location: str = "") -> T:
    """Return the dataclass of a complete tree.

    Raises UserError if required keys are missing (all of them are named, after `location`) or if `__post_init__`
    refuses the values.
    """
    if missing := list(missing_keys(cls, tree, prefix)):
        noun = "required key is" if len(missing) == 1 else "required keys are"
        names = ", ".join(missing)
        raise UserError(
            f"{location}{len(missing)} {noun} missing: {names}; write {missing[0]}=... or put it into the recipe"
        )
    return _construct(cls, tree, prefix)


def _construct(cls: type[T], tree: Tree, prefix: str) -> T:
    keys: dict[str, Any] = {}
    for name, key in keys_of(cls).items():
        value = tree[name]
        is_section = key.section and isinstance(value, dict)
        keys[name] = _construct(key.variant_of(value), value, f"{prefix}{name}.") if is_section else value
    try:
        return cls(**keys)
    except (ValueError, UserError) as error:  # from __post_init__; the message may begin with the name of the key
        message = " ".join(str(error).split())
        names_a_key = re.split(r"[.:\s]", message)[0] in keys_of(cls)
        raise UserError(f"{prefix}{message}" if names_a_key or not prefix else f"{prefix[:-1]}: {message}") from error


def plain_values(value: Any) -> Any:
    """Return what YAML can hold of a value: a mapping of a dataclass, a list of a tuple, text of a path."""
    if dataclasses.is_dataclass(value):
        return {name: plain_values(getattr(value, name)) for name in keys_of(cast(type, type(value)))}
    if isinstance(value, dict):
        return {name: plain_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def plain_tree(cls: type, tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Return what YAML can hold of a tree that may lack required keys, in the order of the dataclass.

    Every section that is complete is built, so that its constraints are checked.
    """
    if not any(missing_keys(cls, tree)):
        return plain_values(_construct(cls, tree, prefix))
    values: dict[str, Any] = {}
    for name, key in keys_of(cls).items():
        if name in tree:
            is_section = key.section and isinstance(tree[name], dict)
            values[name] = (
                plain_tree(key.variant_of(tree[name]), tree[name], f"{prefix}{name}.")
                if is_section
                else plain_values(tree[name])
            )
    return values
