"""The versions that pyproject.toml allows, that `make setup` and `make test-oldest` install and that doctor expects."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BOUNDED = [*PROJECT["dependencies"], *(line for name in EXTRAS if name != "all" for line in EXTRAS[name])]
UNTESTED_BOUNDS = {"app", "trackers", "docs"}  # extras that `make test-oldest` does not install


def pins(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("line", BOUNDED)
def test_every_requirement_has_a_lower_bound_only(line):
    """An upper bound needs a known break, written beside it and here."""
    assert [specifier.operator for specifier in Requirement(line).specifier] == [">="]


def test_the_oldest_versions_are_the_lower_bounds():
    tested = [line for name in EXTRAS if name not in UNTESTED_BOUNDS | {"all"} for line in EXTRAS[name]]
    bounds = {canonicalize_name(r.name): r for r in map(Requirement, [*PROJECT["dependencies"], *tested])}
    oldest = {canonicalize_name(r.name): r for r in pins("constraints-oldest.txt")}
    assert {name: str(r.specifier).replace("==", ">=") for name, r in oldest.items()} == {
        name: str(r.specifier) for name, r in bounds.items()
    }
    assert {name: str(r.marker) for name, r in oldest.items()} == {name: str(r.marker) for name, r in bounds.items()}


@pytest.mark.parametrize("line", BOUNDED)
def test_the_pinned_versions_are_allowed(line):
    requirement = Requirement(line)
    pinned = [r for r in pins("constraints.txt") if canonicalize_name(r.name) == canonicalize_name(requirement.name)]
    if not pinned:
        pytest.skip("constraints.txt does not pin it")
    for pin in pinned:
        [version] = [specifier.version for specifier in pin.specifier]
        assert version in requirement.specifier
