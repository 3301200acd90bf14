"""The texts of `addp --help`, `addp <group> --help` and `addp <verb> --help`."""

import dataclasses
import inspect
import shutil
import textwrap
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import addp_core
from addp_core.recipes.config import recipes_of
from addp_core.recipes.dialect import write_yaml
from addp_core.recipes.examples import EXAMPLES
from addp_core.recipes.keys import Key, all_keys, describe_type
from addp_core.recipes.tree import Tree, default_tree, plain_values
from addp_core.recipes.verbs import VERBS, verb_groups


def overview() -> str:
    """Return the text of `addp --help`."""
    return (
        f"addp {addp_core.__version__}: pretrain once, then generate and recognize\n\n"
        "usage: addp <verb> [recipe] [key=value ...]\n\n"
        f"{_verb_list(list(VERBS))}\n\n"
        "A recipe is a name that `addp <verb> --help` lists, the path of a YAML file, or a run folder.\n"
        "Settings override its keys; `--print-config` prints the resolved recipe and exits.\n"
        "Exit codes: 0 done, 2 the input is wrong, 1 anything else.\n"
    )


def group_help(group: str) -> str:
    """Return the text of `addp <group> --help`, for example of `addp det --help`."""
    return (
        f"usage: addp {group} <action> [recipe] [key=value ...]\n\n"
        f"{_verb_list(verb_groups()[group])}\n\n"
        f"`addp {group} <action> --help` shows the recipes and keys of an action.\n"
    )


def _verb_list(verbs: list[str]) -> str:
    width = max(map(len, verbs))
    return "\n".join(f"  {verb:<{width}}  {VERBS[verb][1]}" for verb in verbs)


def verb_help(verb: str, module: ModuleType) -> str:
    """Return the text of `addp <verb> --help`."""
    named = recipes_of(module)
    width = max(map(len, named), default=0)
    recipes = "".join(f"  {name:<{width}}  {_first_comment(path)}".rstrip() + "\n" for name, path in named.items())
    parts = [
        f"usage: addp {verb} {'[recipe] ' if named else ''}[key=value ...]",
        inspect.cleandoc(module.__doc__ or ""),
        _examples(verb),
        f"recipes\n{recipes}".rstrip() if named else "",
        describe_keys(module.Recipe),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def short_help(verb: str) -> str:
    """Return what `addp <verb>` shows without the arguments that it needs: two command lines."""
    parts = (VERBS[verb][1], _examples(verb), f"`addp {verb} --help` shows the recipes and keys.")
    return "".join(f"{part}\n\n" for part in parts)


def _examples(verb: str) -> str:
    return "\n".join(["for example", *(f"  {line}" for line in EXAMPLES[verb])]) if verb in EXAMPLES else ""


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


def describe_keys(cls: type) -> str:
    """Return a table of all keys with their defaults, types and help texts, wrapped to the width of the terminal."""
    defaults = default_tree(cls)
    rows = [("key", "default", "meaning")]
    for name, key in all_keys(cls):
        default = _default_of(name, defaults)
        rows.append(_section_row(name, key, default) if key.section else _key_row(name, key, default))
    width = max(shutil.get_terminal_size((120, 24)).columns, 80)
    name_width = min(max(len(row[0]) for row in rows), 34)
    default_width = min(max(len(row[1]) for row in rows), 24)
    widths = (name_width, default_width, width - name_width - default_width - 6)
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, size, break_on_hyphens=False) for cell, size in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(f"{part:<{size}}" for part, size in zip(parts, widths, strict=True)).rstrip())
    return "\n".join("  " + line for line in lines)


def _default_of(name: str, defaults: Tree) -> Any:
    """Return the default of a key by its full name, or `...` if it is required or its section is off."""
    default: Any = defaults
    for part in name.split("."):
        default = default.get(part, ...) if isinstance(default, dict) else ...
    return default


def _section_row(name: str, key: Key, default: Any) -> tuple[str, str, str]:
    section: Any = key.section
    summary = key.help or (section.__doc__ or "").split("\n")[0].rstrip(".")
    if summary.startswith(f"{section.__name__}("):  # the docstring that dataclasses generate
        summary = ""
    shorthand = getattr(section, "__shorthand__", None)
    notes = [
        summary,
        f"{name}=x means {name}.{shorthand}=x" if shorthand else "",
        "off (null); setting a key below switches it on" if default is None else "",
    ]
    return f"{name}:", "", "; ".join(filter(None, notes))


def _key_row(name: str, key: Key, default: Any) -> tuple[str, str, str]:
    # A section that is off by default still has defaults of its own.
    value = key.default if default is ... else default
    text = "required" if value is dataclasses.MISSING else _one_line(value)
    expected = describe_type(key.type)
    return name, text, f"{key.help} ({expected})" if key.help else expected


def _one_line(value: Any) -> str:
    """Return a value as it would be written after `key=`."""
    return write_yaml(plain_values(value), flow=True).removesuffix("\n").removesuffix("\n...")
