"""`precision=auto`: what it stands for, and that a run keeps it."""

import logging

import pytest
import torch
import toy_stage
import yaml
from tiny import tiny_addp
from torch import nn

from addp_core.base.errors import UserError
from addp_core.training import precision
from addp_core.training.precision import BF16_WIDTH, has_native_bf16, matrix_width, resolve_precision

CPU = torch.device("cpu")


def stored_precision(out):
    return yaml.safe_load((out / "recipe.yaml").read_text())["train"]["precision"]


@pytest.fixture
def native(monkeypatch):
    """A CPU that multiplies bf16 natively."""
    monkeypatch.setattr(precision, "_cpu_flags", lambda: {"fpu", "avx512_bf16"})


def test_auto_needs_a_native_device_and_a_wide_network(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "addp")
    for flags, width, expected in (
        ({"avx512_bf16"}, BF16_WIDTH, "bf16"),
        ({"amx_bf16"}, 768, "bf16"),
        ({"avx512_bf16"}, BF16_WIDTH - 1, "fp32"),
        ({"avx512f"}, 768, "fp32"),
    ):
        monkeypatch.setattr(precision, "_cpu_flags", lambda flags=flags: flags)
        assert resolve_precision("auto", CPU, width, "train.precision") == expected
        assert f"train.precision=auto: {expected} (" in caplog.messages[-1]
    assert resolve_precision("bf16", CPU, 8) == "bf16"  # what is asked for


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_multiply_bf16_from_ampere(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_native_bf16(torch.device("cuda", 0)) is expected


def test_the_width_is_that_of_most_weights():
    wide = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 768), nn.Linear(768, 10), nn.LayerNorm(768))
    assert matrix_width(wide) == 768
    assert matrix_width(nn.Conv2d(3, 64, 3), nn.Linear(8, 4)) == 27  # 64 x 3 * 3 * 3
    assert matrix_width(nn.LayerNorm(8)) == 0
    assert matrix_width(tiny_addp()) < BF16_WIDTH


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path, monkeypatch, native, caplog):
    monkeypatch.setattr(precision, "BF16_WIDTH", 1)
    out = tmp_path / "run"
    toy_stage.stopped_run(out, step=3)
    assert stored_precision(out) == "bf16"
    monkeypatch.setattr(precision, "_cpu_flags", set)  # another machine
    toy_stage.run([f"out={out}"])
    assert stored_precision(out) == "bf16"
    assert any("does not multiply bf16 natively" in message for message in caplog.messages)
    assert toy_stage.run([f"out={out}"]) == out / "model.safetensors"  # it has finished
    with pytest.raises(UserError, match=r"train\.precision=fp32 \(was bf16\)"):
        toy_stage.run([f"out={out}", "train.precision=fp32"])


def test_small_networks_stay_in_fp32(tmp_path, native):
    toy_stage.stopped_run(tmp_path / "run", step=1)
    assert stored_precision(tmp_path / "run") == "fp32"
