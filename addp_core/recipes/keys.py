"""What the dataclass of a recipe declares about its keys.

A field whose type is a dataclass is a section; if it is a union of several, the first one is what the section holds
until a key is set that another one alone has. Every other field is a key, and its annotation documents it:

    size: Annotated[int, Ge(8), "pixels"] = 256

A string inside `Annotated` is the help text of the key, `annotated_types` set bounds, `Literal` lists the choices,
`X | None` allows null, and a field without a default is required. A key that names something on disk is a `FilePath`, a
`DatasetPath` or a `CachePath` of base/paths.py instead of `str`: a run may continue when that has moved. A number that
may be infinite has pydantic's `AllowInfNan(True)` among its annotations.

If a section has the class attribute `__shorthand__ = "source"`, then `data=photos` means `data.source=photos`. With
`__replaced_by__ = {"epochs": "steps"}`, `steps` counts instead of `epochs` unless it is null, and a file or a command
line that sets `epochs` alone sets the `steps` of what it builds on to null. `__post_init__` may raise
`ValueError("key: found ..., expected ...")` for constraints that involve several keys.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Union, cast

from pydantic import TypeAdapter

from addp_core.base.paths import PathKind

TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}
BOUNDS = {  # attribute of an annotated_types constraint -> how it is written in help texts
    "gt": ">",
    "ge": ">=",
    "lt": "<",
    "le": "<=",
    "multiple_of": "a multiple of",
    "min_length": "of length >=",
    "max_length": "of length <=",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One field of a recipe. `default` is `dataclasses.MISSING` if the key is required."""

    type: Any
    help: str
    default: Any

    @property
    def section(self) -> type | None:
        """The dataclass that this key holds, the first if it has several, or None if the key is not a section."""
        return next(iter(self.variants), None)

    @property
    def variants(self) -> list[type]:
        """The dataclasses that this key can hold; a key that the first one lacks makes the section a later one."""
        return [t for t in union_members(self.type) if isinstance(t, type) and dataclasses.is_dataclass(t)]

    def variant_of(self, names: Iterable[str]) -> Any:
        """Return the dataclass of a section that has keys of these names: the first variant that has them all."""
        return next((cls for cls in self.variants if set(names) <= keys_of(cls).keys()), self.section)

    @property
    def path_kind(self) -> str:
        """What the key's path leads to: "file", "dataset", "cache", or "" if it is no path."""
        notes = [note for member in union_members(self.type) for note in getattr(member, "__metadata__", ())]
        return next((note.kind for note in notes if isinstance(note, PathKind)), "")

    @property
    def adapter(self) -> TypeAdapter:
        """The pydantic adapter that validates values of this key."""
        return _adapter(self.type)


@functools.cache
def _adapter(tp: Any) -> TypeAdapter:
    return TypeAdapter(cast(Any, Union[tuple(union_members(tp))]))  # noqa: UP007 (a union of a computed tuple)


def keys_of(cls: type) -> dict[str, Key]:
    """Return the fields of a dataclass that its constructor accepts, by name."""
    return _keys_of(cls)


@functools.cache
def _keys_of(cls: Any) -> dict[str, Key]:
    hints = typing.get_type_hints(cls, include_extras=True)
    keys = {}
    for field in dataclasses.fields(cls):
        if field.init:
            annotations = getattr(hints[field.name], "__metadata__", ())
            text = " ".join(next((note for note in annotations if isinstance(note, str)), "").split())
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = cast(Callable[[], Any], field.default_factory)()
            keys[field.name] = Key(hints[field.name], text, default)
    return keys


def all_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Yield every key with its full name ('train.batch'), of all variants; a section comes before the keys in it."""
    for name, key in keys_of(cls).items():
        yield prefix + name, key
        names: set[str] = set()
        for i, variant in enumerate(key.variants):
            for full_name, inner in all_keys(variant, f"{prefix}{name}."):
                if full_name not in names:
                    names.add(full_name)
                    # Of a later variant, nothing is required unless it is chosen.
                    yield full_name, dataclasses.replace(inner, default=None) if i else inner


def union_members(tp: Any) -> list[Any]:
    """Return the members of a union, or the type itself in a list.

    Bounds around the union are repeated on each member except None.
    """
    if typing.get_origin(tp) is Annotated:
        bounds = tuple(note for note in tp.__metadata__ if not isinstance(note, str))
        members = union_members(tp.__origin__)
        return [Annotated[(t, *bounds)] if bounds and t is not NoneType else t for t in members]
    if typing.get_origin(tp) in (Union, types.UnionType):
        return [option for member in typing.get_args(tp) for option in union_members(member)]
    return [NoneType if tp is None else tp]


def unannotated(tp: Any) -> Any:
    """Return the type without `Annotated`."""
    return tp.__origin__ if typing.get_origin(tp) is Annotated else tp


def describe_type(tp: Any) -> str:
    """Describe the values of a type in plain words, for example 'a whole number >= 1 or null'."""
    return " or ".join(map(_describe_member, union_members(tp)))


def _describe_member(tp: Any) -> str:
    args = typing.get_args(unannotated(tp))
    origin = typing.get_origin(unannotated(tp)) or unannotated(tp)
    if origin is Literal:
        text = ", ".join("null" if choice is None else str(choice) for choice in args)
        text = f"one of {text}" if len(args) > 1 else text
    elif origin is tuple and args and args[-1] is not ...:
        items = list(dict.fromkeys(map(describe_type, args)))
        text = f"a list of {len(args)} in brackets"
        text += f", each {items[0]}" if len(items) == 1 else f": {', '.join(items)}"
    elif origin in (list, tuple):
        text = f"a list in brackets, each {describe_type(args[0])}" if args else "a list"
    elif origin is dict:
        text = f"a mapping, each value {describe_type(args[1])}" if args else "a mapping"
    elif dataclasses.is_dataclass(origin):
        text = f"a section with the keys {', '.join(keys_of(cast(type, origin)))}"
    else:
        text = TYPE_NAMES.get(origin, getattr(origin, "__name__", str(origin)))
    annotations = tp.__metadata__ if typing.get_origin(tp) is Annotated else ()
    bounds = [(sign, getattr(note, name, None)) for note in annotations for name, sign in BOUNDS.items()]
    limits = [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
    return f"{text} {' and '.join(limits)}" if limits else text
