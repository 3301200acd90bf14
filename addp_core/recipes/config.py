"""Recipes: YAML over typed dataclasses, checked to the last key before anything starts.

keys.py says how keys are declared. Values come from the defaults of the dataclass, then from the YAML file, then from
`key=value` settings. A file may build on another recipe of the same verb:

    base: vit_b_1600ep      # a recipe's name, or the path of a YAML file relative to this one
    train: {epochs: 800}    # sections are merged key by key

Of two keys of which one counts instead of the other, such as `train.steps` and `train.epochs`, a file or the settings
that set the second alone clear the first.

Everything that is not a section replaces what the base says, including lists and free-form mappings such as `grid`,
`set`, `models` and `arms`: an entry of a merged mapping could never be removed again. As in settings, a key with dots
changes a single entry: `set.train.accumulate: 8`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml

from addp_core.base.addresses import is_address
from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.paths import RECIPE_FILE, expand_home
from addp_core.recipes.dialect import write_yaml
from addp_core.recipes.document import BASE, UNPARSED, Document
from addp_core.recipes.keys import all_keys, keys_of
from addp_core.recipes.tree import Tree, build, clear_replaced, default_tree, missing_keys, plain_tree, plain_values
from addp_core.recipes.verbs import VERBS

T = TypeVar("T")
NamedRecipes = Mapping[str, Path]

# ---------------------------------------------------------------- reading


def load(cls: type[T], path: Path | None = None, settings: Sequence[str] = (), named: NamedRecipes | None = None) -> T:
    """Load a recipe.

    Args:
        cls: its dataclass.
        path: its YAML file; None: the defaults alone.
        settings: `key=value` texts that go on top.
        named: the recipes that the file may name as its base, besides those in its own folder.

    Raises:
        UserError: in one line, for a file that cannot be read, an unknown key, a wrong type, an impossible value, a key
            set twice, an unusable base, or missing keys (all of them are named).
    """
    return build(cls, _resolve(cls, path, settings, named or {}))


def load_recipe(module: ModuleType, recipe: str | None, settings: Sequence[str] = ()) -> Any:
    """Load a recipe of the verb that `module` implements; `recipe` is its name, its path or a run folder."""
    path = None if recipe is None else find_recipe(module, recipe)
    return load(module.Recipe, path, settings, recipes_of(module))


def show_recipe(module: ModuleType, recipe: str | None, settings: Sequence[str] = ()) -> str:
    """Return the YAML of a resolved recipe, which `load` reads back.

    If required keys are missing, the first line is a comment that names them, and the rest is complete.
    Raises UserError for anything else that `load` refuses.
    """
    path = None if recipe is None else find_recipe(module, recipe)
    tree = _resolve(module.Recipe, path, settings, recipes_of(module))
    missing = ", ".join(missing_keys(module.Recipe, tree))
    return (f"# required, not set: {missing}\n" if missing else "") + write_yaml(plain_tree(module.Recipe, tree))


def dump(instance: Any) -> str:
    """Return the YAML of a dataclass, which `load` reads back as an equal one."""
    return write_yaml(plain_values(instance))


def _resolve(cls: type, path: Path | None, settings: Sequence[str], named: NamedRecipes) -> Tree:
    """Return the tree of the defaults, the file with its bases, and the settings, in this order."""
    tree = default_tree(cls)
    if path is not None:
        for document in reversed(list(_documents(cls, Path(path), named))):
            document.read(tree)
            clear_replaced(cls, tree, document.keys_set)
    _check_braces(settings)
    keys_set: set[str] = set()
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals or not name:
            hint = f"; did you mean {name}=...?" if name in dict(all_keys(cls)) else ""
            raise UserError(f"{setting!r}: settings are written key=value, without spaces{hint}")
        if name == BASE:
            suggestion = did_you_mean(text, named) or f"; the recipes are {', '.join(named) or 'not named'}"
            raise UserError(
                f"{BASE}: found {text!r} on the command line, expected this key in recipe files only; "
                f"write the name of the recipe without '{BASE}='{suggestion}"
            )
        document = Document(cls)
        document.set_key(tree, cls, name, yaml.ScalarNode(UNPARSED, text))
        keys_set |= document.keys_set
    clear_replaced(cls, tree, keys_set)
    for setting in settings:
        _check_still_set(cls, tree, setting.partition("=")[0].strip())
    return tree


def _check_braces(settings: Sequence[str]) -> None:
    """Raise UserError if the shell has made several settings of an address with braces; the last one would hold."""
    for setting, other in pairwise(settings):
        (name, _, text), (other_name, _, other_text) = setting.partition("="), other.partition("=")
        if name == other_name and is_address(text) and is_address(other_text):
            raise UserError(
                f"{name}: given more than once; a shell replaces braces by what they stand for, expected quotes, as in "
                f"'{name}=https://host/train-{{00..09}}.tar'"
            )


def _check_still_set(cls: type, tree: Tree, name: str) -> None:
    """Raise UserError if a later setting has made a section one that lacks the key of an earlier setting."""
    section, values, parts = cls, tree, name.split(".")
    for i, part in enumerate(parts):
        if part not in keys_of(section):
            prefix = ".".join(parts[:i])
            raise UserError(f"unknown key {name!r}; the keys of {prefix} are here {', '.join(keys_of(section))}")
        if not keys_of(section)[part].variants or not isinstance(values[part], dict):
            return
        section, values = keys_of(section)[part].variant_of(values[part]), values[part]


# ---------------------------------------------------------------- recipes that build on others


def _documents(cls: type, path: Path, named: NamedRecipes) -> Iterator[Document]:
    """Yield the file, then its base, then the base of that, and so on."""
    chain = [path]
    while True:
        document = Document(cls, str(path), _read_text(path))
        yield document
        node = document.base()
        if node is None:
            return
        path = _find_base(document, node, path, named)
        if path.resolve() in [other.resolve() for other in chain]:
            circle = " -> ".join(map(str, [*chain, path]))
            raise UserError(
                f"{document.location(node)}{BASE}: found {node.value!r}, which leads in a circle ({circle}); "
                "expected a recipe that does not build on this one"
            )
        chain.append(path)


def _find_base(document: Document, node: yaml.Node, path: Path, named: NamedRecipes) -> Path:
    """Return the file that a base stands for: a named recipe, a file beside `path`, or a path relative to it."""
    beside = {file.stem: file for file in sorted(path.parent.glob("*.yaml")) if file != path}
    known = {**beside, **named}
    if node.value in known:
        return known[node.value]
    target = path.parent / expand_home(node.value)
    if target.is_file():
        return target
    names = ", ".join(sorted(known)) or "there is none"
    raise UserError(
        f"{document.location(node)}{BASE}: found {node.value!r}, expected the name of a recipe ({names}) "
        f"or the path of a YAML file relative to {path.parent}{did_you_mean(Path(node.value).stem, known)}"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file; expected a recipe in YAML") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


# ---------------------------------------------------------------- where recipes are


def recipes_of(module: ModuleType) -> dict[str, Path]:
    """Return the named recipes of the verb that `module` implements, by name.

    They are the files `recipes/<verb>/<name>.yaml` beside the module; of a verb such as `det train`, the folder is
    `recipes/train`.
    """
    verb = next((verb for verb, (name, _) in VERBS.items() if name == module.__name__), module.__name__.split(".")[-1])
    folder = Path(module.__file__ or "").parent / "recipes" / verb.split()[-1]
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(module: ModuleType, recipe: str) -> Path:
    """Return the file of a recipe: `recipe` is its name ('tiny'), its path or a run folder.

    Raises UserError if there is no such recipe.
    """
    named, path = recipes_of(module), Path(recipe)
    if recipe in named:
        return named[recipe]
    if path.is_file():
        return path
    if (path / RECIPE_FILE).is_file():
        return path / RECIPE_FILE
    looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    problem = f"{recipe}: no such file" if looks_like_path else f"no recipe named {recipe!r}"
    suggestion = (
        did_you_mean(path.stem, named) or "; a setting is written key=value, a recipe file of your own as its path"
    )
    raise UserError(f"{problem}; named recipes: {', '.join(named) or 'none'}{suggestion}")
