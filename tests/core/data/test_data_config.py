"""The keys of an image dataset."""

import pytest

from addp_core.base.errors import UserError
from addp_core.data.config import DataConfig
from addp_core.recipes import config as recipes


def test_config_checks():
    load = lambda *settings: recipes.load(DataConfig, None, list(settings))  # noqa: E731
    assert load("size=[64,32]").hw == (64, 32)
    assert load("workers=null").workers is None
    for setting in ("size=4", "size=[64,4]", "scale=[0,1]", "scale=[0.5,0.2]", "scale=[0.5,1.1]", "ratio=[0,1]"):
        with pytest.raises(UserError, match=setting.partition("=")[0]):
            load(setting)
    assert recipes.load(DataConfig, None, recipes_text := ["max_errors=0.5", "cache=ram"]).cache == "ram", recipes_text
