"""What the tests of gen/ share."""

from collections.abc import Callable

import pytest

from addp_core.recipes.cli import main


@pytest.fixture
def expect_user_error(capsys) -> Callable[..., None]:
    """Run a command that must exit with 2; the last line on stderr must contain all `parts`."""

    def check(arguments: list[str], *parts: str) -> None:
        capsys.readouterr()
        assert main(arguments) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(part in line for part in parts), line

    return check
