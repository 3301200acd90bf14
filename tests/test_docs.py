"""The pages name only what exists: files, modules, verbs, names defined in the code; their commands are understood."""

import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

from addp_core.recipes.cli import split
from addp_core.recipes.config import find_recipe, load
from addp_core.recipes.verbs import VERBS

ROOT = Path(__file__).parents[1]
ROOMS = ("addp_core", "pretrain", "gen", "cls", "det", "seg", "tools", "tests", "docs")
PAGES = ("README.md", "docs/architecture.md")


def quoted(page: str) -> list[str]:
    """What stands in backticks, outside of blocks of code."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_is_there(page):
    paths = [
        word for text in quoted(page) for word in text.split() if re.fullmatch(rf"({'|'.join(ROOMS)})/[\w./]*", word)
    ]
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_is_one(page):
    code = re.findall(r"(?:^|[`\s])addp ((?:det |seg )?[a-z]+)", "\n".join(quoted(page)))
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    code += re.findall(r"(?:^addp|-m addp_core) ((?:det |seg )?[a-z]+)", "\n".join(blocks), flags=re.MULTILINE)
    assert len(code) > 5
    assert sorted({verb for verb in code if verb not in VERBS}) == []


def test_the_architecture_page_names_what_is_defined():
    sources = [path.read_text(encoding="utf-8") for room in ROOMS[:-2] for path in (ROOT / room).rglob("*.py")]
    words = {word for text in quoted("docs/architecture.md") for word in [text.split("(")[0]] if word.isidentifier()}
    unknown = {word for word in words if not any(re.search(rf"\b{word}\b", source) for source in sources)}
    assert unknown == set()


def test_every_module_is_in_the_architecture_page():
    text = " ".join(quoted("docs/architecture.md"))
    files = (path for path in (ROOT / "addp_core").rglob("*.py") if not path.name.startswith("__"))
    modules = {str(path.relative_to(ROOT)) for path in files}
    assert {name for name in modules if name not in text} == set()


def commands() -> list[list[str]]:
    """What stands behind `addp` in the blocks of code of README.md and docs/results.md."""
    found = []
    for page in ("README.md", "docs/results.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                words = shlex.split(line, comments=True)
                for i, word in enumerate(words):
                    if word in ("addp", "addp_core") and (i == 0 or words[i - 1] in ("-m", "&&")):
                        found.append(list(itertools.takewhile(lambda other: other != "&&", words[i + 1 :])))
    return found


def test_every_command_is_understood():
    """Verb, recipe, keys and values: a command of the pages fails for want of data only."""
    assert len(commands()) > 40
    for words in commands():
        size = 2 if " ".join(words[:2]) in VERBS else 1
        module = importlib.import_module(VERBS[" ".join(words[:size])][0])
        recipe, settings = split(words[size:])
        if recipe and "/" not in recipe and not recipe.endswith(".yaml"):
            load(module.Recipe, find_recipe(module, recipe), settings)
        elif not recipe and "<" not in " ".join(words):
            load(module.Recipe, None, settings)
