"""The command `addp <verb> [recipe] [key=value ...]`.

Exit codes: 0 done, 2 the user's input is wrong (one line on stderr), 1 anything else. Results go to stdout, all else to
stderr.
"""

import contextlib
import importlib
import inspect
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import addp_core
from addp_core.base.errors import UserError, did_you_mean
from addp_core.recipes.config import describe, find_recipe, load, recipes_of
from addp_core.recipes.verbs import VERBS

HELP = ("-h", "--help", "help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (that of the process by default) and return its exit code. `SystemExit` passes through."""
    rank = os.environ.get("RANK", "0")
    set_up_logging(rank)
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        name = "addp" if rank == "0" else f"addp (process {rank})"
        sys.stderr.write(f"{name}: {' '.join(str(error).splitlines())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\naddp: interrupted\n")
        return 1
    except BrokenPipeError:
        if not _reader_has_left():
            traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def run(argv: list[str]) -> int:
    """Run one command line; errors are raised."""
    if not argv:
        sys.stderr.write(overview())
        return 2
    verb, rest = _verb(argv)
    if verb in HELP and not rest:
        sys.stdout.write(overview())
        return 0
    if verb == "--version":
        sys.stdout.write(f"addp {addp_core.__version__}\n")
        return 0
    if verb in HELP:  # addp help pretrain
        verb, rest = _verb(rest)[0], ["--help"]
    if verb not in VERBS:
        actions = [known for known in VERBS if known.startswith(f"{verb.split()[0]} ")]
        known = actions or list(VERBS)
        close = did_you_mean(verb, known) if " " in verb or not actions else ""
        raise UserError(f"unknown verb {verb!r}{close or '; the verbs are ' + ', '.join(known)}")
    with _naming_missing_packages(verb):
        module = importlib.import_module(VERBS[verb][0])
        if any(arg in HELP[:2] for arg in rest):
            sys.stdout.write(verb_help(verb, module))
            return 0
        recipe, settings = split(rest)
        path = None if recipe is None else find_recipe(module, recipe)
        module.run(load(module.Recipe, path, settings))
    return 0


def _verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of one word (`pretrain`) or two (`det train`), and what follows it."""
    groups = {verb.split()[0] for verb in VERBS if " " in verb}
    words = 2 if argv[0] in groups and len(argv) > 1 and argv[1] not in HELP else 1
    return " ".join(argv[:words]), list(argv[words:])


def split(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe (a name or path, at most one) and the `key=value` settings."""
    recipe, settings = None, []
    for arg in args:
        if arg.startswith("-"):
            raise UserError(f"{arg!r}: settings are written key=value, without dashes (train.batch=32)")
        is_file = recipe is None and Path(arg).is_file()  # a path may hold an equals sign
        if "=" in arg and not is_file:
            settings.append(arg)
        elif recipe is None:
            recipe = arg
        else:
            raise UserError(
                f"{arg!r}: expected key=value without spaces; the recipe is {recipe!r}, and there is one at most"
            )
    return recipe, settings


def overview() -> str:
    """The text of `addp --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())
    return (
        f"addp {addp_core.__version__}: pretrain once, then generate and recognise\n\n"
        "usage: addp <verb> [recipe] [key=value ...]\n\n"
        f"{verbs}\n\n"
        "A recipe is a name that `addp <verb> --help` lists or the path of a YAML file; settings go on top of it.\n"
        "Exit codes: 0 done, 2 the input is wrong, 1 anything else.\n"
    )


def verb_help(verb: str, module: ModuleType) -> str:
    """The text of `addp <verb> --help`."""
    named = recipes_of(module)
    width = max(map(len, named), default=0)
    recipes = "".join(f"  {name:<{width}}  {_first_comment(path)}".rstrip() + "\n" for name, path in named.items())
    parts = [
        f"usage: addp {verb} {'[recipe] ' if named else ''}[key=value ...]",
        inspect.cleandoc(module.__doc__ or ""),
        f"recipes\n{recipes}".rstrip() if named else "",
        describe(module.Recipe),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


def set_up_logging(rank: str) -> None:
    """Progress on stderr: everything from the first process, warnings from the others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("addp")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == "0" else logging.WARNING)


@contextlib.contextmanager
def _naming_missing_packages(verb: str):
    """A package of an extra that is not installed is the user's to add: say how."""
    try:
        yield
    except ModuleNotFoundError as error:
        doctor = importlib.import_module(VERBS["doctor"][0])
        command = doctor.command_for((error.name or "").split(".")[0])
        if command is None:
            raise
        raise UserError(f"{verb}: the package {error.name!r} is not installed; add it with: {command}") from error


def _reader_has_left() -> bool:
    """Whether nobody reads stdout any more (`addp ... | head`); if so, what is flushed at exit goes nowhere."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
