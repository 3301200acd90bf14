"""The command `addp <verb> [recipe] [key=value ...]`.

Exit codes: 0 done; 2 the user's input is wrong, which one line on stderr explains; 1 anything else. Results go to
stdout, everything else to stderr.
"""

import contextlib
import importlib
import logging
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import addp_core
from addp_core.base import job
from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.launch import describe_unused_tasks, rank, run_alone, take_place_from_slurm
from addp_core.base.paths import RECIPE_FILE
from addp_core.recipes.completion import HELP as LONG_HELP
from addp_core.recipes.completion import PRINT_CONFIG, completions
from addp_core.recipes.config import load_recipe, show_recipe
from addp_core.recipes.examples import EXAMPLES
from addp_core.recipes.help import group_help, overview, short_help, verb_help
from addp_core.recipes.verbs import NEED_NO_ARGUMENTS, ONE_PROCESS, VERBS, recipe_module, verb_groups

log = logging.getLogger("addp")

HELP = ("-h", LONG_HELP)
COMPLETE = "--complete"  # called by shells
OPTIONS = (*HELP, "--version", PRINT_CONFIG)  # all that may begin with a dash


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default that of the process) and return its exit code. `SystemExit` passes through."""
    return exit_code(lambda: run(list(sys.argv[1:] if argv is None else argv)))


def exit_code(command: Callable[[], int]) -> int:
    """Call a command that returns its exit code, and return that of its error if there is one, which is written to
    stderr. `SystemExit` passes through.
    """
    if sys.platform == "darwin":  # read when torch is imported: operations that Apple's GPUs lack run on the CPU
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    take_place_from_slurm()
    set_up_logging(rank())
    try:
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        line = " ".join(str(error).splitlines())
        job.fail(2, line)
        program = "addp" if rank() == 0 else f"addp (rank {rank()})"
        sys.stderr.write(f"{program}: {line}\n")
        return 2
    except KeyboardInterrupt:
        job.fail(1, "interrupted")
        sys.stderr.write("\naddp: interrupted\n")
        return 1
    except Exception as error:
        without_reader = isinstance(error, BrokenPipeError) and _discard_output_without_reader()
        details = "" if without_reader else traceback.format_exc()
        job.fail(1, f"{type(error).__name__}: {error}; {job.CONTINUE}" if details else "", details)
        sys.stderr.write(details)
        return 1
    finally:
        job.leave()


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code; errors are raised."""
    if not argv:
        sys.stderr.write(overview())
        return 2
    if argv[0] in (*HELP, "help") and len(argv) == 1:
        sys.stdout.write(overview())
        return 0
    if argv[0] == "--version":
        sys.stdout.write(f"addp {addp_core.__version__}\n")
        return 0
    if argv[0] == COMPLETE:
        sys.stdout.writelines(f"{text}\t{about}\n" for text, about in completions(argv[1:]).items())
        return 0
    if argv[0] in (*HELP, "help"):  # addp help pretrain
        argv = [*argv[1:], "--help"]
    verb, arguments = _split_verb(argv)
    wants_help = any(argument in HELP for argument in arguments)
    if verb in verb_groups() and (wants_help or not arguments or arguments == ["help"]):
        sys.stdout.write(group_help(verb))
        return 0
    if verb not in VERBS:
        raise UserError(_unknown_verb(verb))
    if verb in ONE_PROCESS:
        run_alone()
    elif not wants_help and PRINT_CONFIG not in arguments:
        job.join()
        if unused := describe_unused_tasks():
            log.warning("%s", unused)
    with _naming_missing_packages(verb):
        module = recipe_module(verb)
        if wants_help:
            sys.stdout.write(verb_help(verb, module))
            return 0
        recipe, settings = split(arguments)
        if PRINT_CONFIG in arguments:
            sys.stdout.write(show_recipe(module, recipe, settings))
            return 0
        with _showing_examples("" if arguments or verb in NEED_NO_ARGUMENTS else verb):
            resolved = load_recipe(module, recipe, settings)
            importlib.import_module(VERBS[verb][0]).run(resolved)
    return 0


def _split_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split a command line into the verb, which has one word (`pretrain`) or two (`det train`), and its arguments."""
    has_action = argv[0] in verb_groups() and len(argv) > 1 and not argv[1].startswith("-") and argv[1] != "help"
    words = 2 if has_action or " ".join(argv[:2]) in VERBS else 1
    return " ".join(argv[:words]), list(argv[words:])


def _unknown_verb(verb: str) -> str:
    groups = verb_groups()
    actions = groups.get(verb.split(" ")[0], [])
    suggestion = "" if verb in groups else did_you_mean(verb, actions or [*VERBS, *groups])
    return f"unknown verb {verb!r}{suggestion or '; the verbs are ' + ', '.join(actions or VERBS)}"


def split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the arguments of a verb into the recipe (a name or path, at most one) and the `key=value` settings."""
    recipe, settings = None, []
    for argument in arguments:
        if argument == PRINT_CONFIG:
            continue
        if argument.startswith("-"):
            raise UserError(
                f"{argument!r}: settings are written key=value, without dashes (train.batch=32)"
                f"{did_you_mean(argument, OPTIONS)}"
            )
        path = Path(argument)  # which may contain an equals sign
        is_recipe = recipe is None and (path.is_file() or (path / RECIPE_FILE).is_file())
        if "=" in argument and not is_recipe:
            settings.append(argument)
        elif recipe is None:
            recipe = argument
        else:
            raise UserError(
                f"{argument!r}: expected key=value without spaces; the recipe is {recipe!r}, and there can be only one"
            )
    return recipe, settings


def set_up_logging(rank: int) -> None:
    """Log to stderr: everything from rank 0, warnings from the other ranks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("addp")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


@contextlib.contextmanager
def _showing_examples(verb: str) -> Iterator[None]:
    """Write two command lines of a verb, if it was called without arguments and needs some."""
    try:
        yield
    except UserError:
        if verb in EXAMPLES and rank() == 0:
            sys.stderr.write(short_help(verb))
        raise


@contextlib.contextmanager
def _naming_missing_packages(verb: str) -> Iterator[None]:
    """Raise UserError with the command that installs a package, if a package of an extra is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        doctor = importlib.import_module(VERBS["doctor"][0])
        command = doctor.command_for((error.name or "").split(".")[0])
        if command is None:
            raise
        raise UserError(f"{verb}: the package {error.name!r} is not installed; add it with: {command}") from error


def _discard_output_without_reader() -> bool:
    """Check whether the reader of stdout has gone (as in `addp ... | head`) and, if so, discard what is flushed at
    exit."""
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
