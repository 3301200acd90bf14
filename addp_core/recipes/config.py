"""Recipes: YAML over typed dataclasses, checked to the last key before anything starts.

keys.py says how they are declared. Values come from the dataclass, then from the YAML file, then from `key=value`
settings. Each is checked by pydantic where it is read, so that a message can name the file, the line and the key.
YAML is read with the core rules of version 1.2: `1e-4` is a number, `no` is a word. Where a key holds text or a path,
`2024` is text.
"""

import dataclasses
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ValidationError

from addp_core.base.errors import UserError, did_you_mean
from addp_core.recipes.keys import NONE, Key, all_keys, bare, in_words, keys_of, options_of
from addp_core.recipes.verbs import VERBS

T = TypeVar("T")
Tree = dict[str, Any]  # a section under construction: field name -> value, or the Tree of a nested section

STR = "tag:yaml.org,2002:str"
NULL = "tag:yaml.org,2002:null"
RAW = "!raw"  # the text behind `key=`: whether it is YAML or plain text depends on the key's type
SCALARS = {  # tag: (pattern of a plain scalar, first characters, its value)
    NULL: (r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF"), lambda text: text.lower() == "true"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+(_[0-9]+)*", list("-+0123456789"), int),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)",
        list("-+.0123456789"),
        lambda text: float(text.lower().replace(".inf", "inf")),
    ),
    STR: (None, None, str),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or our rules would take for something other than text; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first, _) in SCALARS.items():
    if _pattern is not None:
        for _class in (_Loader, _Dumper):
            _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def _represent_list(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
    nested = any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=not nested)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # between single quotes PyYAML loses some of Unicode's line breaks
    return dumper.represent_scalar(STR, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


# ---------------------------------------------------------------- from a dataclass to a tree and back


def _tree(instance: Any) -> Tree:
    keys = keys_of(type(instance))
    values = {name: getattr(instance, name) for name in keys}
    return {name: _tree(value) if keys[name].section and value is not None else value for name, value in values.items()}


def _defaults(cls: type) -> Tree:
    """The tree of `cls` before anything is read; required keys are absent."""
    tree: Tree = {}
    # default factories run anew for each load: two recipes must not share a list
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        key = keys_of(cls)[field.name]
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif key.section and NONE not in options_of(key.type):
            value = _defaults(key.section)
        else:
            continue
        tree[field.name] = _tree(value) if key.section and dataclasses.is_dataclass(value) else value
    return tree


def _missing(cls: type, tree: Tree, prefix: str = "") -> Iterator[str]:
    for name, key in keys_of(cls).items():
        if name not in tree:
            yield prefix + name
        elif key.section and isinstance(tree[name], dict):
            yield from _missing(key.section, tree[name], f"{prefix}{name}.")


def _build(cls: type[T], tree: Tree, prefix: str = "", place: str = "") -> T:
    """The dataclass of a tree that has been read whole; `place` is the file and line that a message starts with."""
    if missing := list(_missing(cls, tree, prefix)):
        noun = "required key is" if len(missing) == 1 else "required keys are"
        names = ", ".join(missing)
        raise UserError(
            f"{place}{len(missing)} {noun} missing: {names}; write {missing[0]}=... or put it into the recipe"
        )
    return _construct(cls, tree, prefix)


def _construct(cls: type[T], tree: Tree, prefix: str) -> T:
    values = dict(tree)
    for name, key in keys_of(cls).items():
        if key.section and isinstance(tree[name], dict):
            values[name] = _construct(key.section, tree[name], f"{prefix}{name}.")
    try:
        return cls(**values)
    except (ValueError, UserError) as error:  # what __post_init__ finds wrong; it may begin with the name of the key
        message = " ".join(str(error).split())
        named = re.split(r"[.:\s]", message)[0] in keys_of(cls)
        raise UserError(f"{prefix}{message}" if named or not prefix else f"{prefix[:-1]}: {message}") from error


# ---------------------------------------------------------------- reading


class _Document:
    """One YAML text over a recipe's tree: a file (`name` is its path) or the text behind one `key=` (no name)."""

    def __init__(self, recipe: type, name: str = "", text: str = "") -> None:
        self.recipe, self.name, self.text = recipe, name, text
        self.seen: set[str] = set()

    def place(self, node: yaml.Node | None = None) -> str:
        line = f" line {node.start_mark.line + 1}" if node is not None and node.start_mark is not None else ""
        return f"{self.name}{line}: " if self.name else ""

    def compose(self, text: str, key: str = "") -> yaml.Node:
        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_Loader)):
                place = self.place() or f"{key}: "
                raise UserError(f"{place}anchors (&) and aliases (*) are not read here; write the value out")
            return yaml.compose(text, Loader=_Loader) or yaml.ScalarNode(NULL, "")
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            if not self.name:
                raise UserError(f"{key}: {text!r} is not valid YAML: {problem}") from error
            line = f" line {mark.line + 1}" if mark else ""
            raise UserError(f"{self.name}{line}: not valid YAML: {problem}") from error

    def read(self, tree: Tree) -> None:
        root = self.compose(self.text)
        if root.tag != NULL:  # an empty file sets nothing
            self.fill(tree, self.recipe, root, "")

    def fill(self, tree: Tree, cls: type, node: yaml.Node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{self.place(node)}found {self.found(node)}, expected lines of the form `key: value`")
        for name, value in node.value:
            self.assign(tree, cls, self.name_of(name), value, prefix, name)

    def name_of(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise UserError(f"{self.place(node)}found {self.found(node)} as a key, expected a name")
        return node.value

    def assign(
        self, tree: Tree, cls: type, name: str, node: yaml.Node, prefix: str = "", at: yaml.Node | None = None
    ) -> None:
        """Set the key `name` ('batch', or 'train.batch' from outside the section) of `cls` in its tree.

        `prefix` is the section's full name with a dot, `at` the node that a complaint about the name points to.
        """
        head, _, rest = name.partition(".")
        full = prefix + head
        if head not in keys_of(cls):
            raise UserError(f"{self.place(at)}unknown key {prefix + name!r}{self.suggest(cls, name, prefix)}")
        key = keys_of(cls)[head]
        if not rest:
            if full in self.seen:
                raise UserError(f"{self.place(at)}{full}: set twice; keep one")
            self.seen.add(full)
            tree[head] = self.value(node, key, tree.get(head), full)
        elif key.section:
            tree[head] = section = tree[head] if isinstance(tree.get(head), dict) else _defaults(key.section)
            self.assign(section, key.section, rest, node, f"{full}.", at)
        elif entries := [typing.get_args(t) for t in map(bare, options_of(key.type)) if typing.get_origin(t) is dict]:
            entry = self.value(node, Key(entries[0][1], "", None), None, f"{full}.{rest}")
            tree[head] = {**(tree.get(head) or {}), rest: entry}
        else:
            words = in_words(key.type)
            raise UserError(f"{self.place(at)}unknown key {prefix + name!r}: {full} is not a section but {words}")

    def suggest(self, cls: type, name: str, prefix: str) -> str:
        """The key that was probably meant: the same name in another section, then the closest one."""
        known = [full for full, _ in all_keys(self.recipe)]
        same = [full for full in known if full.split(".")[-1] == name.split(".")[-1]]
        if same and len(same) <= 3:
            return f"; did you mean {' or '.join(map(repr, same))}?"
        near = did_you_mean(prefix + name, [prefix + key for key in keys_of(cls)]) or did_you_mean(prefix + name, known)
        return near or f"; the keys {f'of {prefix[:-1]} ' if prefix else ''}are {', '.join(keys_of(cls))}"

    def value(self, node: yaml.Node, key: Key, current: Any, full: str) -> Any:
        """The checked value of a node: a Tree where the key is a section, the value itself elsewhere."""
        if node.tag == RAW:
            node = self.cook(node, key, full)
        section = key.section
        if section and (isinstance(node, yaml.MappingNode) or (node.tag != NULL and hasattr(section, "__shorthand__"))):
            tree = current if isinstance(current, dict) else _defaults(section)
            if isinstance(node, yaml.MappingNode):
                self.fill(tree, section, node, f"{full}.")
            else:
                self.assign(tree, section, section.__shorthand__, node, f"{full}.")
            return tree
        try:
            return key.adapter.validate_python(self.plain(node, key.type, full), strict=True)
        except (ValidationError, _Mismatch) as error:
            literals = [t for t in map(bare, options_of(key.type)) if typing.get_origin(t) is Literal]
            choices = [str(choice) for literal in literals for choice in typing.get_args(literal)]
            near = did_you_mean(node.value, choices) if isinstance(node, yaml.ScalarNode) else ""
            message = f"{full}: found {self.found(node)}, expected {in_words(key.type)}{near}"
            raise UserError(self.place(node) + message) from error

    def cook(self, node: yaml.ScalarNode, key: Key, full: str) -> yaml.Node:
        """What the text behind `key=` is: itself for keys that hold text, YAML for all others."""
        text = node.value.strip()
        kinds = {typing.get_origin(t) or t for t in map(bare, options_of(key.type))}
        textual = kinds <= {str, Path, NONE}
        if text == "" and NONE not in kinds and str in kinds:
            return yaml.ScalarNode(STR, "")
        if textual and text[:1] not in ("'", '"') and not re.fullmatch(SCALARS[NULL][0], text):
            # a shell leaves the ~ of out=~/runs alone
            return yaml.ScalarNode(STR, str(Path(text).expanduser()) if text.startswith("~/") else text)
        if key.section and hasattr(key.section, "__shorthand__") and not text.startswith("{"):
            return node
        self.text = text
        return self.compose(text, full)

    def found(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.ScalarNode):
            if node.tag in (STR, RAW):
                return repr(node.value)
            return "null" if node.tag == NULL else node.value if node.tag in SCALARS else f"{node.tag} {node.value}"
        text = " ".join(self.text[node.start_mark.index : node.end_mark.index].split())
        return text if len(text) <= 60 else f"{text[:57]}..."

    def plain(self, node: yaml.Node, tp: Any, full: str) -> Any:
        """A node as Python values, led by the type: the same `5` is a number for an int and text for a path."""
        options = [bare(option) for option in options_of(tp)]
        origins = [typing.get_origin(option) or option for option in options]
        if isinstance(node, yaml.MappingNode):
            for option, origin in zip(options, origins, strict=True):
                if dataclasses.is_dataclass(origin):
                    tree = _defaults(origin)
                    self.fill(tree, origin, node, f"{full}.")
                    return _build(origin, tree, f"{full}.", self.place(node))
                if origin in (dict, Any):
                    args = typing.get_args(option) or (str, Any)
                    pairs = self.unique(node, full)
                    return {self.plain(k, args[0], full): self.plain(v, args[1], f"{full}.{k.value}") for k, v in pairs}
            raise _Mismatch
        if isinstance(node, yaml.SequenceNode):
            for option, origin in zip(options, origins, strict=True):
                if origin in (list, tuple, Any):
                    args = [arg for arg in typing.get_args(option) or (Any,) if arg is not ...]
                    pairs = zip_longest(node.value, args[: len(node.value)], fillvalue=args[-1])
                    items = [self.plain(item, arg, f"{full}[{i}]") for i, (item, arg) in enumerate(pairs)]
                    return tuple(items) if origin is tuple else items
            raise _Mismatch
        if node.tag not in SCALARS:
            raise _Mismatch
        for option, origin in zip(options, origins, strict=True):
            if origin is Literal:
                for choice in typing.get_args(option):
                    if node.value == str(choice):
                        return choice
        value = SCALARS[node.tag][2](node.value)
        if type(value) in origins or Any in origins or value is None:
            return value
        if Path in origins:
            return Path(node.value)
        if str in origins:
            return node.value
        if isinstance(value, float) and int in origins and value.is_integer():
            return int(value)  # steps=1e5
        return value

    def unique(self, node: yaml.MappingNode, full: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        seen: set[str] = set()
        for name, value in node.value:
            if self.name_of(name) in seen:
                raise UserError(f"{self.place(name)}{full}.{name.value}: set twice; keep one")
            seen.add(name.value)
            yield name, value


class _Mismatch(Exception):
    """A node whose shape (list, mapping, tag) no member of the key's type has."""


def load(cls: type[T], path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """The recipe `cls` from its defaults, then the YAML file `path`, then `key=value` settings, in this order.

    UserError of one line: a file that cannot be read, an unknown key, a wrong type, an impossible value, a key set
    twice, or required keys left out (all of them named).
    """
    tree = _defaults(cls)
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a text file; expected a recipe in YAML") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        _Document(cls, str(path), text).read(tree)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            hint = f"; did you mean {name}=...?" if name in dict(all_keys(cls)) else ""
            raise UserError(f"{override!r}: settings are written key=value, without spaces{hint}")
        _Document(cls).assign(tree, cls, name.strip(), yaml.ScalarNode(RAW, text))
    return _build(cls, tree)


def recipes_of(module: ModuleType) -> dict[str, Path]:
    """The named recipes of a verb's module, by name: `<package>/recipes/<verb>/<name>.yaml` beside the module.

    Of a verb of two words, such as `det train`, the second.
    """
    verb = next((verb for verb, (name, _) in VERBS.items() if name == module.__name__), module.__name__.split(".")[-1])
    folder = Path(module.__file__ or "").parent / "recipes" / verb.split()[-1]
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(module: ModuleType, name: str) -> Path:
    """The file of a recipe given by its name ('tiny'), its path or a run folder. UserError where there is none."""
    named, path = recipes_of(module), Path(name)
    if name in named:
        return named[name]
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    problem = f"{name}: no such file" if looks_like_path else f"no recipe named {name!r}"
    close = did_you_mean(path.stem, named) or "; a setting is written key=value, a file of your own by its path"
    raise UserError(f"{problem}; named recipes: {', '.join(named) or 'none'}{close}")


# ---------------------------------------------------------------- writing


def dump(instance: Any) -> str:
    """YAML of a dataclass that `load` reads back as an equal one."""
    return _write(instance, flow=False)


def _write(value: Any, flow: bool) -> str:
    layout = {"sort_keys": False, "allow_unicode": True, "width": float("inf"), "default_flow_style": flow}
    return yaml.dump(_yaml_ready(value), Dumper=_Dumper, **layout)


def _yaml_ready(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _yaml_ready(getattr(value, name)) for name in keys_of(type(value))}
    if isinstance(value, dict):
        return {name: _yaml_ready(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_yaml_ready(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def describe(cls: type) -> str:
    """The table behind `--help`: every key with its default, what it holds and its help, wrapped to the terminal."""
    rows: list[tuple[str, str, str]] = []
    defaults = _defaults(cls)
    for name, key in all_keys(cls):
        default: Any = defaults
        for part in name.split("."):
            default = default.get(part, ...) if isinstance(default, dict) else ...
        if key.section:
            short = getattr(key.section, "__shorthand__", None)
            about = key.help or (key.section.__doc__ or "").split("\n")[0].rstrip(".")
            about = (
                "" if about.startswith(f"{key.section.__name__}(") else about
            )  # the docstring that dataclasses make up
            off = "off (null); a key below switches it on" if default is None else ""
            note = "; ".join(filter(None, [about, f"{name}=x means {name}.{short}=x" if short else "", off]))
            rows.append((f"{name}:", "", note))
        else:
            # a section that is off by default still has defaults of its own
            value = key.default if default is ... else default
            shown = "required" if value is dataclasses.MISSING else _inline(value)
            rows.append((name, shown, f"{key.help} ({in_words(key.type)})" if key.help else in_words(key.type)))
    rows = [("key", "default", "meaning"), *rows]
    width = max(shutil.get_terminal_size((120, 24)).columns, 80)
    first = min(max(len(row[0]) for row in rows), 34)
    second = min(max(len(row[1]) for row in rows), 24)
    sizes = (first, second, width - first - second - 6)
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, size, break_on_hyphens=False) for cell, size in zip(row, sizes, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(f"{part:<{size}}" for part, size in zip(parts, sizes, strict=True)).rstrip())
    return "\n".join("  " + line for line in lines)


def _inline(value: Any) -> str:
    """A value as one would write it behind `key=`."""
    return _write(value, flow=True).removesuffix("\n").removesuffix("\n...")
