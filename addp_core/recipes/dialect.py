"""The YAML that recipes are written in.

Recipes follow the core schema of YAML 1.2: `1e-4` is a number and `no` is text. What `dump` writes is read the same way
under these rules and under PyYAML's own (YAML 1.1). Anchors, tags and merge keys are not part of the dialect.
"""

import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import yaml

STR = "tag:yaml.org,2002:str"
NULL = "tag:yaml.org,2002:null"


class PlainScalar(NamedTuple):
    """How an unquoted value of one type is recognized and read."""

    pattern: str
    first_characters: list[str]
    convert: Callable[[str], Any]


PLAIN_SCALARS = {  # by tag
    NULL: PlainScalar(r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    "tag:yaml.org,2002:bool": PlainScalar(
        r"true|True|TRUE|false|False|FALSE", list("tTfF"), lambda text: text.lower() == "true"
    ),
    "tag:yaml.org,2002:int": PlainScalar(r"[-+]?[0-9]+(_[0-9]+)*", list("-+0123456789"), int),
    "tag:yaml.org,2002:float": PlainScalar(
        r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)",
        list("-+.0123456789"),
        lambda text: float(text.lower().replace(".inf", "inf")),
    ),
}


def is_null(text: str) -> bool:
    """Check whether an unquoted text stands for null."""
    return re.fullmatch(PLAIN_SCALARS[NULL].pattern, text) is not None


def is_readable(node: yaml.Node) -> bool:
    """Check whether a node is a scalar with one of the tags of the dialect."""
    return isinstance(node, yaml.ScalarNode) and (node.tag == STR or node.tag in PLAIN_SCALARS)


def scalar_value(node: yaml.Node) -> Any:
    """Return the Python value of a readable scalar."""
    return node.value if node.tag == STR else PLAIN_SCALARS[node.tag].convert(node.value)


class Loader(yaml.SafeLoader):
    """Reads the dialect."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes all text that YAML 1.1 or this dialect would read as another type. Writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _scalar in PLAIN_SCALARS.items():
    for _class in (Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_scalar.pattern})\Z"), _scalar.first_characters)


def _represent_list(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
    nested = any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=not nested)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Between single quotes, PyYAML loses some of Unicode's line breaks.
    return dumper.represent_scalar(STR, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def write_yaml(value: Any, flow: bool = False) -> str:
    """Return the YAML of mappings, lists and scalars; on one line if `flow`."""
    layout: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": float("inf")}
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=flow, **layout)
