"""The keys of an image dataset."""

import pytest

from addp_core.base.errors import UserError
from addp_core.data.config import DataConfig
from addp_core.recipes import config as recipes


def load(*settings: str) -> DataConfig:
    return recipes.load(DataConfig, None, list(settings))


def test_values_are_read():
    assert load("size=[64,32]").hw == (64, 32)
    assert load("workers=null").workers is None
    assert load("max_errors=0.5", "cache=ram").cache == "ram"


@pytest.mark.parametrize(
    "setting", ["size=4", "size=[64,4]", "scale=[0,1]", "scale=[0.5,0.2]", "scale=[0.5,1.1]", "ratio=[0,1]"]
)
def test_impossible_values_are_rejected(setting):
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        load(setting)


def test_an_address_with_credentials_never_becomes_a_config():
    with pytest.raises(UserError, match=r"data\.source: the address holds credentials") as error:
        DataConfig(source="https://user:secret@host/x.tar")
    assert "secret" not in str(error.value)
