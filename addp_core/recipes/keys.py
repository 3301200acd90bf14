"""What a recipe's dataclass says about its keys.

A field whose type is a dataclass is a section; every other field is a key, and its annotation is its documentation:

    size: Annotated[int, Ge(8), "pixels"] = 256

A string inside `Annotated` is the key's help, `annotated_types` give bounds, `Literal` gives choices, `X | None` may
be off, a field without a default is required. A section's class attribute `__shorthand__ = "source"` lets
`data=photos` mean `data.source=photos`. `__post_init__` may raise `ValueError("key: found, expected, fix")` for what
takes several keys.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import TypeAdapter

NONE = type(None)
NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path", NONE: "null"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}  # as annotated_types names them
BOUNDS |= {"min_length": "of length >=", "max_length": "of length <="}


@dataclasses.dataclass(frozen=True)
class Key:
    """One field of a recipe: its type with bounds, its help, its default (`dataclasses.MISSING`: it is required)."""

    type: Any
    help: str
    default: Any

    @property
    def section(self) -> type | None:
        """The dataclass this key holds, where it is a section."""
        return next((t for t in options_of(self.type) if dataclasses.is_dataclass(t)), None)

    @property
    def adapter(self) -> TypeAdapter:
        """Pydantic's check of a value of this key."""
        return _adapter(self.type)


@functools.cache
def _adapter(tp: Any) -> TypeAdapter:
    return TypeAdapter(Union[tuple(options_of(tp))])  # noqa: UP007 (a union of a computed tuple)


def with_defaults(section: type, **defaults: Any) -> type:
    """The same section with other defaults, for a verb that needs them."""
    hints = typing.get_type_hints(section, include_extras=True)
    fields = [(name, hints[name], dataclasses.field(default=value)) for name, value in defaults.items()]
    namespace = {"__doc__": section.__doc__}
    return dataclasses.make_dataclass(section.__name__, fields, bases=(section,), namespace=namespace)


@functools.cache
def keys_of(cls: type) -> dict[str, Key]:
    """The fields of a dataclass that its constructor takes, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    keys = {}
    for field in dataclasses.fields(cls):
        if field.init:
            notes = getattr(hints[field.name], "__metadata__", ())
            text = " ".join(next((note for note in notes if isinstance(note, str)), "").split())
            made = field.default_factory is not dataclasses.MISSING
            keys[field.name] = Key(hints[field.name], text, field.default_factory() if made else field.default)
    return keys


def all_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Every key with its full name ('train.batch'), a section before what it holds."""
    for name, key in keys_of(cls).items():
        yield prefix + name, key
        if key.section:
            yield from all_keys(key.section, f"{prefix}{name}.")


def options_of(tp: Any) -> list[Any]:
    """The members of a union (one for any other type), with the bounds that stood around the union on each but None."""
    if typing.get_origin(tp) is Annotated:
        bounds = tuple(note for note in tp.__metadata__ if not isinstance(note, str))
        members = options_of(tp.__origin__)
        return [Annotated[(t, *bounds)] if bounds and t is not NONE else t for t in members]
    if typing.get_origin(tp) in (Union, types.UnionType):
        return [option for member in typing.get_args(tp) for option in options_of(member)]
    return [NONE if tp is None else tp]


def bare(tp: Any) -> Any:
    """The type without `Annotated`."""
    return tp.__origin__ if typing.get_origin(tp) is Annotated else tp


def in_words(tp: Any) -> str:
    """What a value of this type is, in plain words: 'a whole number >= 1 or null'."""
    return " or ".join(map(_option_in_words, options_of(tp)))


def _option_in_words(tp: Any) -> str:
    args = typing.get_args(bare(tp))
    origin = typing.get_origin(bare(tp)) or bare(tp)
    if origin is Literal:
        words = ", ".join("null" if choice is None else str(choice) for choice in args)
        words = f"one of {words}" if len(args) > 1 else words
    elif origin is tuple and args and args[-1] is not ...:
        kinds = list(dict.fromkeys(map(in_words, args)))
        words = f"a list of {len(args)} in brackets" + (
            f", each {kinds[0]}" if len(kinds) == 1 else f": {', '.join(kinds)}"
        )
    elif origin in (list, tuple):
        words = f"a list in brackets, each {in_words(args[0])}" if args else "a list"
    elif origin is dict:
        words = f"a mapping, each value {in_words(args[1])}" if args else "a mapping"
    elif dataclasses.is_dataclass(origin):
        words = f"a section with the keys {', '.join(keys_of(origin))}"
    else:
        words = NOUNS.get(origin, getattr(origin, "__name__", str(origin)))
    notes = tp.__metadata__ if typing.get_origin(tp) is Annotated else ()
    found = [(sign, getattr(note, name, None)) for note in notes for name, sign in BOUNDS.items()]
    limits = [f"{sign} {bound}" for sign, bound in found if bound is not None]
    return f"{words} {' and '.join(limits)}" if limits else words
