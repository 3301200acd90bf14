"""Home folders in paths, and the user's cache where there is none."""

import pwd
import tempfile
from pathlib import Path

import pytest

from addp_core.base.errors import UserError
from addp_core.base.paths import expand_home, user_cache


@pytest.fixture
def homeless(monkeypatch):
    """A process in a container: its number is no user's, and the environment names no home folder."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_home_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert expand_home("~/photos") == Path("/home/me/photos")
    assert expand_home("photos/~x") == Path("photos/~x")
    assert user_cache("tars") == Path("/home/me/.cache/addp/tars")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/elsewhere")
    assert user_cache("tars") == Path("/home/me/elsewhere/addp/tars")


def test_users_without_a_home_folder():
    with pytest.raises(
        UserError, match=r"~nobody-of-this-name/x: ~nobody-of-this-name has no home folder .*; expected"
    ):
        expand_home("~nobody-of-this-name/x")


@pytest.mark.usefixtures("homeless")
def test_a_process_without_a_home_folder_has_a_cache():
    assert user_cache("tars").is_relative_to(tempfile.gettempdir())
    with pytest.raises(UserError, match="~/photos: ~ has no home folder"):
        expand_home("~/photos")
