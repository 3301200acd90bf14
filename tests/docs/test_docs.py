"""The README and the pages of docs/ name only what exists: files, modules, verbs, keys, commands, names in the code."""

import ast
import functools
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import addp_core
from addp_core.recipes.cli import split
from addp_core.recipes.config import load_recipe, show_recipe
from addp_core.recipes.keys import all_keys
from addp_core.recipes.verbs import VERBS, verb_groups

ROOT = Path(__file__).parents[2]
PACKAGES = ("addp_core", "pretrain", "gen", "cls", "det", "seg", "tools")
FOLDERS = (*PACKAGES, "tests", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
README_BYTES = 10_000
EXAMPLE_KEYS = {"flowers"}  # the benchmark that the page on extending adds
FILE_SUFFIXES = (".csv", ".json", ".jsonl", ".md", ".pth", ".py", ".safetensors", ".txt", ".yaml")
DETECTRON2_KEYS = ("dataloader", "model.backbone", "train.init_checkpoint", "train.output_dir", "train.amp")

every_page = pytest.mark.parametrize("page", PAGES)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: str) -> list[str]:
    """Return what is in backticks outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def command_lines(page: str) -> list[list[str]]:
    """Return the commands in blocks of bash, split into words, with continued lines joined."""
    lines = []
    for block in blocks(page, "bash"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = iter(shlex.split(line, comments=True))
            while command := list(itertools.takewhile(lambda word: word != "&&", words)):
                lines.append(command)
    return lines


def after_addp(commands: list[list[str]]) -> list[list[str]]:
    """Return what follows `addp` or `-m addp_core` in these commands."""
    return [
        words[i + 1 :]
        for words in commands
        for i, word in enumerate(words)
        if word in ("addp", "addp_core") and (i == 0 or words[i - 1] == "-m")
    ]


def split_verb(words: list[str]) -> tuple[str, list[str]]:
    verb = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    return verb, words[len(verb.split()) :]


def resolve(name: str) -> object:
    """Return the object with a dotted name, such as addp_core.method.addp.ADDP."""
    module = name
    parts: list[str] = []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            assert module, f"{name} does not exist"
            parts.insert(0, last)
    return functools.reduce(getattr, parts, found)


def has_name_or_skip(module: str, name: str) -> bool:
    """Return whether a module of the project has a name; skip the test if a framework for it is not installed."""
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in PACKAGES:
            raise
        pytest.skip(f"{name} of {module} needs {error.name}, which is not installed")


# ---------------------------------------------------------------- files and modules


@every_page
def test_every_file_exists(page):
    pattern = rf"(?:{'|'.join(FOLDERS)})/[\w./-]*"
    paths = [word for code in inline_code(page) for word in code.split() if re.fullmatch(pattern, word)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_outside_of_the_site_lead_to_files(page):
    """`make docs` checks the links of docs/."""
    links = [link for link in re.findall(r"\]\(([^)#]+)", read(page)) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


@every_page
def test_every_module_that_a_command_runs_exists(page):
    for words in command_lines(page):
        for before, name in itertools.pairwise(words):
            if before == "-m" and name.split(".")[0] in PACKAGES:
                assert (ROOT / f"{name.replace('.', '/')}.py").exists() or (ROOT / name).is_dir(), name
            if before == "--config-file":
                assert (ROOT / "det/native/configs" / f"{name}.py").exists(), name


@every_page
def test_every_make_target_exists(page):
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE)
    named = [words[1] for words in command_lines(page) if words[0] == "make"]
    named += [code.split()[1] for code in inline_code(page) if code.startswith("make ")]
    assert sorted(set(named) - set(targets)) == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_gpu_tests_without_a_gpu_fail_with_one_line():
    """`make -n` prints the target's commands; the first of its own looks for a GPU."""
    commands = subprocess.run(["make", "-n", "gpu-test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    check = next(line for line in commands.splitlines() if "cuda.is_available" in line)
    script = shlex.split(check)[2]
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "make gpu-test: PyTorch sees no GPU here, so nothing was tested\n"


def test_the_architecture_page_names_every_module_of_the_core_and_every_package():
    text = " ".join(inline_code("docs/architecture.md"))
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "addp_core").rglob("*.py")}
    modules = {path for path in core if not Path(path).name.startswith("__")}
    packages = {
        f"{path.parent.relative_to(ROOT)}/"
        for name in PACKAGES[1:]
        for path in (ROOT / name).rglob("__init__.py")
        if path.parent.parent != ROOT
    }
    assert {name for name in modules | packages if name not in text} == set()


def test_the_architecture_page_names_what_is_defined():
    sources = [path.read_text(encoding="utf-8") for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    codes = [code for code in inline_code("docs/architecture.md") if not (ROOT / code).exists()]
    names = {part for code in codes for part in code.split("(")[0].split(".")}
    identifiers = {name for name in names if name.isidentifier() and not name.startswith("__")}
    assert {name for name in identifiers if not any(re.search(rf"\b{name}\b", text) for text in sources)} == set()


# ---------------------------------------------------------------- verbs, keys and commands


@every_page
def test_every_verb_exists(page):
    found = re.findall(r"(?:^|[`\s])addp ((?:(?:det|seg) )?[a-z]+)", "\n".join(inline_code(page)))
    assert sorted({verb for verb in found if verb not in VERBS and verb not in verb_groups()}) == []


def test_every_verb_has_a_section():
    headings = [line for page in PAGES for line in read(page).splitlines() if line.startswith("## ")]
    assert [verb for verb in VERBS if not any(f"`addp {verb}`" in heading for heading in headings)] == []


@every_page
def test_every_command_in_a_block_is_understood(page):
    """Verb, recipe, keys and values exist and fit together: a command fails for want of data only."""
    for words in after_addp(command_lines(page)):
        verb, arguments = split_verb(words)
        recipe, settings = split(arguments)
        module = importlib.import_module(VERBS[verb][0])
        is_of_reader = recipe is not None and recipe.startswith("my_")
        (show_recipe if is_of_reader else load_recipe)(module, None if is_of_reader else recipe, settings)


@every_page
def test_every_command_in_the_text_is_understood(page):
    """As above, but required keys may be missing."""
    for words in after_addp([shlex.split(code) for code in inline_code(page) if code.startswith("addp ")]):
        verb, arguments = split_verb(words)
        if verb in (*verb_groups(), "--help", "<verb>") or "--help" in arguments:
            continue
        recipe, settings = split([argument for argument in arguments if "<" not in argument and argument != "..."])
        show_recipe(importlib.import_module(VERBS[verb][0]), recipe, settings)


def test_many_commands_were_checked():
    """If the form of the pages changes, the tests above must not pass because they find nothing."""
    assert sum(len(after_addp(command_lines(page))) for page in PAGES) > 70


@functools.cache
def known_keys() -> dict[str, bool]:
    """Return every key of every verb, and whether its value is a mapping with keys of its own."""
    modules = {importlib.import_module(module) for module, _ in VERBS.values()}
    keys = [pair for module in modules for pair in all_keys(module.Recipe)]
    return {name: isinstance(key.default, dict) for name, key in keys}


@every_page
def test_every_dotted_key_exists(page):
    """`train.batch`, `data.cache=ram`, `data.flowers`: in inline code, keys with a section are keys of some verb."""
    keys = known_keys()
    sections = {name.split(".")[0] for name in keys if "." in name}
    unknown = []
    for code in inline_code(page):
        for word in code.split():
            key = re.split(r"[=:]", word)[0]
            if not re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", key) or key.split(".")[0] not in sections | {"set"}:
                continue
            parts = key.split(".")
            prefixes = [".".join(parts[:i]) for i in range(1, len(parts))]
            is_entry = any(keys.get(prefix) for prefix in prefixes)
            is_example = EXAMPLE_KEYS & set(parts) or key.startswith(DETECTRON2_KEYS)
            is_file = Path(key).suffix in FILE_SUFFIXES
            is_module = (ROOT / f"{key.replace('.', '/')}.py").exists()
            if key not in keys and not (is_entry or is_example or is_file or is_module):
                unknown.append(key)
    assert unknown == []


# ---------------------------------------------------------------- blocks of Python and YAML


@every_page
def test_python_blocks_import_what_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                assert [alias.name for alias in node.names if not has_name_or_skip(node.module, alias.name)] == []


@every_page
def test_yaml_blocks_are_recipes(page, tmp_path):
    for number, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        verb = "bench" if block.startswith("pretrain:") else "sweep" if "arms:" in block else "pretrain"
        show_recipe(importlib.import_module(VERBS[verb][0]), str(path))


# ---------------------------------------------------------------- the whole


def test_the_readme_is_short():
    assert len(read("README.md").encode()) <= README_BYTES


def test_the_api_page_has_every_public_name():
    names = re.findall(r"^::: ([\w.]+)", read("docs/api.md"), flags=re.MULTILINE)
    objects = [resolve(name) for name in names]
    assert [name for name in addp_core.__all__ if getattr(addp_core, name) not in objects] == []


def test_the_site_builds(tmp_path):
    """As `make docs`, strictly: broken links, anchors and names fail."""
    pytest.importorskip("mkdocstrings")
    config = importlib.import_module("mkdocs.config")
    build = importlib.import_module("mkdocs.commands.build")
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} == {path.stem for path in tmp_path.glob("*.html")} - {
        "404"
    }


def test_version_in_changelog_and_citation():
    assert f"## [{addp_core.__version__}]" in read("CHANGELOG.md")
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == addp_core.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_pre_commit_runs_the_commands_of_make_lint():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    commands = [re.sub(r"^\.venv/bin/(python -m )?", "", hook["entry"]) for hook in repository["hooks"]]
    lint = re.search(r"^lint:.*?\n((?:\t.*\n)+)", read("Makefile"), flags=re.MULTILINE)
    assert [command for command in commands if command not in lint[1]] == []
