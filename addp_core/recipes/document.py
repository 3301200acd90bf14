"""Reading one YAML document, or the text after one `key=`, into the tree of a recipe.

Each value is checked by pydantic where it is read, so that an error can name the file, the line and the key.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Any, Literal, cast

import yaml
from pydantic import AllowInfNan, ValidationError

from addp_core.base.addresses import CREDENTIALS_FIX, has_credentials
from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.paths import expand_home
from addp_core.recipes.dialect import NULL, STR, Loader, is_null, is_readable, scalar_value
from addp_core.recipes.keys import Key, all_keys, describe_type, keys_of, unannotated, union_members
from addp_core.recipes.tree import Tree, build, choose_variant, default_tree

OUT = "out"  # the key of every verb that names the folder it writes
BASE = "base"  # the top-level key of a file that names the recipe it builds on
UNPARSED = "!unparsed"  # tag of the text after `key=`: whether it is YAML or plain text depends on the type of the key


class Document:
    """One YAML text over the tree of a recipe: a file (`path` is shown in errors) or the text after one `key=`."""

    def __init__(self, recipe: type, path: str = "", text: str = "") -> None:
        self.recipe, self.path, self.text = recipe, path, text
        self.keys_set: set[str] = set()

    def location(self, node: yaml.Node | None = None) -> str:
        """Return the file and line that an error starts with; '' outside of files."""
        line = f" line {node.start_mark.line + 1}" if node is not None and node.start_mark is not None else ""
        return f"{self.path}{line}: " if self.path else ""

    # ------------------------------------------------------------ the whole document

    @functools.cached_property
    def root(self) -> yaml.Node:
        """The nodes of the whole text."""
        return self.compose(self.text)

    def compose(self, text: str, key: str = "") -> yaml.Node:
        """Parse a text into nodes. Raises UserError if it is not valid YAML."""
        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=Loader)):
                location = self.location() or f"{key}: "
                raise UserError(f"{location}anchors (&) and aliases (*) are not supported; write the value out")
            return yaml.compose(text, Loader=Loader) or yaml.ScalarNode(NULL, "")
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            if not self.path:
                raise UserError(f"{key}: {text!r} is not valid YAML: {problem}") from error
            line = f" line {mark.line + 1}" if mark else ""
            raise UserError(f"{self.path}{line}: not valid YAML: {problem}") from error

    def base(self) -> yaml.Node | None:
        """Return the value of the top-level key `base`. Raises UserError if it is not text or is set twice."""
        entries = self.root.value if isinstance(self.root, yaml.MappingNode) else []
        nodes = [(name, value) for name, value in entries if name.value == BASE]
        if len(nodes) > 1:
            raise UserError(f"{self.location(nodes[1][0])}{BASE}: set twice; keep one")
        for _, node in nodes:
            if node.tag == NULL or not is_readable(node):
                raise UserError(
                    f"{self.location(node)}{BASE}: found {self.excerpt(node)}, "
                    "expected the name of a recipe or the path of a YAML file"
                )
            return node
        return None

    def read(self, tree: Tree) -> None:
        """Set in the tree all keys of the document, apart from `base`."""
        root = self.root
        if isinstance(root, yaml.MappingNode):
            entries = [(name, value) for name, value in root.value if name.value != BASE]
            root = yaml.MappingNode(root.tag, entries, root.start_mark, root.end_mark)
        if root.tag != NULL:  # an empty file sets nothing
            self.read_mapping(tree, self.recipe, root, "")

    def read_mapping(self, tree: Tree, cls: type, node: yaml.Node, prefix: str) -> None:
        """Set in the tree of `cls` all keys of a mapping. `prefix` is the full name of the section with a dot."""
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{self.location(node)}found {self.excerpt(node)}, expected lines of the form `key: value`")
        for name, value in node.value:
            self.set_key(tree, cls, self.key_name(name), value, prefix, name)

    def key_name(self, node: yaml.Node) -> str:
        """Return the text of a key. Raises UserError if the key is a list or a mapping."""
        if not isinstance(node, yaml.ScalarNode):
            raise UserError(f"{self.location(node)}found {self.excerpt(node)} as a key, expected a name")
        return node.value

    # ------------------------------------------------------------ one key

    def set_key(
        self,
        tree: Tree,
        cls: type,
        name: str,
        node: yaml.Node,
        prefix: str = "",
        name_node: yaml.Node | None = None,
    ) -> None:
        """Set one key of `cls` in its tree.

        Args:
            tree: of `cls`; changed in place.
            cls: the dataclass of the recipe or section.
            name: 'batch', or with dots ('train.batch') from outside of the section.
            node: the value.
            prefix: the full name of the section with a dot.
            name_node: where an error about the name points to.
        """
        first, _, rest = name.partition(".")
        full_name = prefix + first
        if first not in keys_of(cls):
            suggestion = self.suggest_key(cls, name, prefix)
            raise UserError(f"{self.location(name_node)}unknown key {prefix + name!r}{suggestion}")
        key = keys_of(cls)[first]
        if not rest:
            self.mark_as_set(full_name, name_node)
            tree[first] = self.read_value(node, key, tree.get(first), full_name)
        elif key.section:
            tree[first] = section = tree[first] if isinstance(tree.get(first), dict) else default_tree(key.section)
            variant = choose_variant(key, section, [rest.partition(".")[0]])
            self.set_key(section, variant, rest, node, f"{full_name}.", name_node)
        elif entry_types := [
            typing.get_args(t) for t in map(unannotated, union_members(key.type)) if typing.get_origin(t) is dict
        ]:
            self.mark_as_set(f"{full_name}.{rest}", name_node)
            entry = self.read_value(node, Key(entry_types[0][1], "", None), None, f"{full_name}.{rest}")
            tree[first] = {**(tree.get(first) or {}), rest: entry}
        else:
            expected = describe_type(key.type)
            raise UserError(
                f"{self.location(name_node)}unknown key {prefix + name!r}: {full_name} is not a section but {expected}"
            )

    def mark_as_set(self, full_name: str, name_node: yaml.Node | None) -> None:
        """Record that a key is set. Raises UserError if this document has set it before."""
        if full_name in self.keys_set:
            raise UserError(f"{self.location(name_node)}{full_name}: set twice; keep one")
        self.keys_set.add(full_name)

    def suggest_key(self, cls: type, name: str, prefix: str) -> str:
        """Suggest the key that was probably meant: the same name in another section, then the closest name."""
        if name.split(".")[0] == BASE:
            return f"; {BASE} belongs at the top level of a recipe file, with the name or path of a recipe"
        all_names = [full_name for full_name, _ in all_keys(self.recipe)]
        if prefix + name in all_names:  # a key of another variant of the section
            return f"; the keys of {prefix[:-1]} are here {', '.join(keys_of(cls))}"
        same_name = [full_name for full_name in all_names if full_name.split(".")[-1] == name.split(".")[-1]]
        if same_name and len(same_name) <= 3:
            return f"; did you mean {' or '.join(map(repr, same_name))}?"
        in_section = [prefix + key for key in keys_of(cls)]
        in_section += [full_name for full_name in all_names if full_name.rpartition(".")[0] + "." == prefix]
        suggestion = did_you_mean(prefix + name, in_section) or did_you_mean(prefix + name, all_names)
        section = f"of {prefix[:-1]} " if prefix else ""
        return suggestion or f"; the keys {section}are {', '.join(keys_of(cls))}"

    # ------------------------------------------------------------ one value

    def read_value(self, node: yaml.Node, key: Key, current: Any, full_name: str) -> Any:
        """Return the checked value of a node.

        If the key is a section, this is its tree: `current` with the keys of the node set. Any other value, including a
        list or a free-form mapping, replaces the current one.
        """
        if any(map(has_credentials, _texts(node))):
            raise UserError(f"{self.location(node)}{full_name}: {CREDENTIALS_FIX}")
        if node.tag == UNPARSED:
            node = self.parse_setting(node, key, full_name)
        section = key.section
        if section and (isinstance(node, yaml.MappingNode) or (node.tag != NULL and hasattr(section, "__shorthand__"))):
            tree = current if isinstance(current, dict) else default_tree(section)
            if isinstance(node, yaml.MappingNode):
                names = [self.key_name(name).partition(".")[0] for name, _ in node.value]
                self.read_mapping(tree, choose_variant(key, tree, names), node, f"{full_name}.")
            else:
                self.set_key(tree, section, cast(Any, section).__shorthand__, node, f"{full_name}.")
            return tree
        try:
            value = key.adapter.validate_python(self.to_python(node, key.type, full_name), strict=True)
        except (ValidationError, _TypeMismatchError) as error:
            literals = [t for t in map(unannotated, union_members(key.type)) if typing.get_origin(t) is Literal]
            choices = [str(choice) for literal in literals for choice in typing.get_args(literal)]
            suggestion = did_you_mean(node.value, choices) if isinstance(node, yaml.ScalarNode) else ""
            expected = describe_type(key.type)
            if isinstance(error, _OutOfRangeError):
                expected = error.describe(expected)
            message = f"{full_name}: found {self.excerpt(node)}, expected {expected}{suggestion}"
            raise UserError(self.location(node) + message) from error
        if full_name == OUT and value == "" and key.default != "":
            raise UserError(
                f"{self.location(node)}{OUT}: found an empty text, as of a shell's variable that is not set; expected "
                f"{describe_type(key.type)} ({key.help}); {OUT}=. is the current folder"
            )
        return value

    def parse_setting(self, node: yaml.Node, key: Key, full_name: str) -> yaml.Node:
        """Return the node of the text after `key=`: the text itself for keys that hold text, YAML for all others."""
        text = node.value.strip()
        types = {typing.get_origin(t) or t for t in map(unannotated, union_members(key.type))}
        holds_text = types <= {str, Path, NoneType}
        if text == "" and NoneType not in types and str in types:
            return yaml.ScalarNode(STR, "")
        if holds_text and text[:1] not in ("'", '"') and not is_null(text):
            # A shell does not expand the ~ of out=~/runs.
            return yaml.ScalarNode(STR, str(expand_home(text)) if text.startswith("~/") else text)
        if key.section and hasattr(key.section, "__shorthand__") and not text.startswith("{"):
            return node
        self.text = text
        return self.compose(text, full_name)

    def excerpt(self, node: yaml.Node) -> str:
        """Return a node as an error quotes it, in at most 60 characters if it is not a scalar."""
        if isinstance(node, yaml.ScalarNode):
            if node.tag in (STR, UNPARSED):
                return repr(node.value)
            return "null" if node.tag == NULL else node.value if is_readable(node) else f"{node.tag} {node.value}"
        text = " ".join(self.text[node.start_mark.index : node.end_mark.index].split())
        return text if len(text) <= 60 else f"{text[:57]}..."

    def to_python(self, node: yaml.Node, tp: Any, full_name: str) -> Any:
        """Convert a node to Python values as its type asks: the same `5` is a number for an int and text for a path."""
        members = [unannotated(member) for member in union_members(tp)]
        origins = [typing.get_origin(member) or member for member in members]
        if isinstance(node, yaml.MappingNode):
            return self.mapping_to_python(node, members, origins, full_name)
        if isinstance(node, yaml.SequenceNode):
            return self.sequence_to_python(node, members, origins, full_name)
        if not is_readable(node):
            raise _TypeMismatchError
        for member, origin in zip(members, origins, strict=True):
            if origin is Literal:
                for choice in typing.get_args(member):
                    if node.value == str(choice):
                        return choice
        value = scalar_value(node)
        if float in origins or (int in origins and isinstance(value, int)):
            _check_range(value, tp)
        if type(value) in origins or Any in origins or value is None:
            return value
        if Path in origins:
            return Path(node.value)
        if str in origins:
            return node.value
        if isinstance(value, float) and int in origins and value.is_integer():
            return int(value)  # steps=1e5
        return value

    def mapping_to_python(self, node: yaml.MappingNode, members: list[Any], origins: list[Any], full_name: str) -> Any:
        for member, origin in zip(members, origins, strict=True):
            if dataclasses.is_dataclass(origin):
                cls = cast(type, origin)
                tree = default_tree(cls)
                self.read_mapping(tree, cls, node, f"{full_name}.")
                return build(cls, tree, f"{full_name}.", self.location(node))
            if origin in (dict, Any):
                key_type, value_type = typing.get_args(member) or (str, Any)
                return {
                    self.to_python(name, key_type, full_name): self.to_python(
                        value, value_type, f"{full_name}.{name.value}"
                    )
                    for name, value in self.unique_entries(node, full_name)
                }
        raise _TypeMismatchError

    def sequence_to_python(
        self, node: yaml.SequenceNode, members: list[Any], origins: list[Any], full_name: str
    ) -> list | tuple:
        for member, origin in zip(members, origins, strict=True):
            if origin in (list, tuple, Any):
                types = [arg for arg in typing.get_args(member) or (Any,) if arg is not ...]
                pairs = zip_longest(node.value, types[: len(node.value)], fillvalue=types[-1])
                items = [self.to_python(item, tp, f"{full_name}[{i}]") for i, (item, tp) in enumerate(pairs)]
                return tuple(items) if origin is tuple else items
        raise _TypeMismatchError

    def unique_entries(self, node: yaml.MappingNode, full_name: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """Yield the entries of a free-form mapping. Raises UserError if a key occurs twice."""
        names: set[str] = set()
        for name, value in node.value:
            if self.key_name(name) in names:
                raise UserError(f"{self.location(name)}{full_name}.{name.value}: set twice; keep one")
            names.add(name.value)
            yield name, value


def _texts(node: yaml.Node) -> Iterator[str]:
    """Yield the texts of all scalars in a node."""
    if isinstance(node, yaml.ScalarNode):
        yield node.value
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for each in child if isinstance(child, tuple) else (child,):
            yield from _texts(each)


class _TypeMismatchError(Exception):
    """No member of the type of the key can hold a node of this shape (list, mapping, tag)."""


class _OutOfRangeError(_TypeMismatchError):
    """The key takes no number of this size."""

    def describe(self, expected: str) -> str:
        """Return what the key takes, with the limit that the number is beyond."""
        finite = expected.replace("a number", "a finite number")
        return f"{expected}, of at most 64 bits" if finite == expected else finite


def _check_range(value: Any, tp: Any) -> None:
    """Raise _OutOfRangeError for infinity, unless the key says that it has a meaning (`AllowInfNan`), and for whole
    numbers of more than 64 bits, which torch takes nowhere.
    """
    notes = [note for member in union_members(tp) for note in getattr(member, "__metadata__", ())]
    infinite = isinstance(value, float) and math.isinf(value) and AllowInfNan(True) not in notes
    if infinite or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        raise _OutOfRangeError
