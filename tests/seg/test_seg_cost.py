"""`addp seg cost`: seconds of a test crop and of a training step."""

import json

import pytest
from toy_segmentation import TINY_CONFIG

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from addp_core.recipes.cli import main


def test_seconds_per_crop(capsys):
    assert main(["seg", "cost", TINY_CONFIG, "crop=32", "steps=1", "json=true"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert costs["crop"] == 32
    assert all(costs[part]["seconds_per_crop"] > 0 for part in ("test", "train"))
