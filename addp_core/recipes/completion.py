"""What the words of a command line may become: verbs, recipes, keys and their values, for the completion of shells."""

import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from addp_core.recipes.config import recipes_of
from addp_core.recipes.keys import Key, all_keys, unannotated, union_members
from addp_core.recipes.verbs import VERBS, recipe_module, verb_groups

HELP, PRINT_CONFIG = "--help", "--print-config"
PROGRAM_OPTIONS = {HELP: "the verbs", "--version": "the version"}
VERB_OPTIONS = {HELP: "recipes and keys of the verb", PRINT_CONFIG: "print the resolved recipe and exit"}

Completions = dict[str, str]  # text of the word -> a few words about it


def completions(words: Sequence[str]) -> Completions:
    """Return what the last of the words after `addp`, which may be empty, can become; nothing if that is any text or
    file.
    """
    *before, current = words or [""]
    if before[:1] == ["help"]:
        before = before[1:]
    candidates = dict(_candidates(before, current))
    return {text: about for text, about in candidates.items() if text.startswith(current)}


def _candidates(before: list[str], current: str) -> Iterator[tuple[str, str]]:
    if not before:
        yield from (PROGRAM_OPTIONS if current.startswith("-") else _first_words()).items()
        return
    yield from ((verb.split()[1], VERBS[verb][1]) for verb in VERBS if verb.split()[:-1] == before)
    verb = next((verb for verb in (" ".join(before[:2]), before[0]) if verb in VERBS), None)
    if verb is None:
        return
    module, arguments = recipe_module(verb), before[len(verb.split()) :]
    keys = dict(all_keys(module.Recipe))
    name, equals, _ = current.partition("=")
    if equals:
        yield from ((f"{name}={value}", "") for value in (_values(keys[name]) if name in keys else ()))
    elif current.startswith("-"):
        yield from VERB_OPTIONS.items()
    else:
        if all("=" in argument or argument.startswith("-") for argument in arguments):
            yield from ((recipe, "recipe") for recipe in recipes_of(module))
        given = {argument.partition("=")[0] for argument in arguments}
        yield from _keys_beside(keys, current.rpartition(".")[0], given)


def _first_words() -> Completions:
    groups = {group: ", ".join(verb.split()[1] for verb in verbs) for group, verbs in verb_groups().items()}
    verbs = {verb: about for verb, (_, about) in VERBS.items() if " " not in verb}
    return {**verbs, **groups, "help": "the verbs, or one of them"}


def _keys_beside(keys: dict[str, Key], section: str, given: set[str]) -> Iterator[tuple[str, str]]:
    """Yield `key=` and `section.` for each key directly in a section ("" for the recipe) that is not given yet."""
    for name, key in keys.items():
        if name.rpartition(".")[0] != section:
            continue
        if key.section and getattr(key.section, "__shorthand__", None) and name not in given:
            yield f"{name}=", key.help
        if key.section:
            yield f"{name}.", key.help
        elif name not in given:
            yield f"{name}=", key.help


def _values(key: Key) -> list[str]:
    """Return the values of a key that has only a few."""
    values: list[Any] = []
    for member in union_members(key.type):
        plain = unannotated(member)
        if typing.get_origin(plain) is Literal:
            values += typing.get_args(plain)
        elif plain is bool:
            values += [True, False]
    return [str(value).lower() if isinstance(value, bool) else str(value) for value in values if value is not None]
