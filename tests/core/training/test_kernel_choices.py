"""The faster implementation of each shape is measured once, and a run goes on with those that it began with."""

import json

import pytest
import torch
from tiny import random_tensor

from addp_core.networks.kernels import DIRECT, HAS_WINOGRAD, WINOGRAD
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig
from addp_core.training import kernel_choices as module
from addp_core.training.compute import accelerate_model, autocast
from addp_core.training.kernel_choices import SWITCH, KernelChoices, kernel_choices

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(SWITCH, raising=False)
    yield tmp_path / "addp" / "kernels"
    monkeypatch.undo()
    kernel_choices().begin({})


def test_choices_are_measured_once_and_stored(cache, monkeypatch):
    slow = random_tensor(400, 400)
    candidates = {DIRECT: lambda: slow @ slow @ slow, WINOGRAD: lambda: slow[:1]}
    assert KernelChoices().faster("a", candidates) == WINOGRAD
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == {"a": WINOGRAD}
    file.write_text(json.dumps({"a": DIRECT, "b": "unknown"}))
    choices = KernelChoices()
    assert choices.table == {"a": DIRECT}
    choices.begin({"a": WINOGRAD})  # what a checkpoint holds comes before the cache
    assert choices.faster("a", {}) == WINOGRAD


def test_nothing_is_measured_where_the_result_would_not_last(cache, monkeypatch):
    monkeypatch.setattr(module, "has_matrix_unit", lambda: False)
    choices = KernelChoices()
    choices.begin(None)  # a run from before there was a choice
    assert choices.faster("a", {}) == DIRECT
    for name, value in ((SWITCH, "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
        choices.begin({})
        assert choices.faster("a", {}) == WINOGRAD
        monkeypatch.delenv(name)
    assert not cache.exists()


@pytest.mark.skipif(not HAS_WINOGRAD, reason="this build of torch has no NNPACK")
@torch.no_grad()
def test_both_implementations_decode_the_same_images_up_to_rounding():
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(width=32, multipliers=(1, 2), blocks=1, codebook=16, dim=8)).eval()
    codes = random_tensor(2, 8, 24, 20, seed="codes")
    exact = tokenizer.decode(codes)
    accelerate_model(tokenizer)
    errors = {}
    for name in (DIRECT, WINOGRAD):
        choices = kernel_choices()
        choices.begin({})
        choices.measures, choices.table, choices.default = False, {}, name
        with autocast("bf16", CPU):
            errors[name] = ((tokenizer.decode(codes).float() - exact).std() / exact.std()).item()
    assert errors[WINOGRAD] < errors[DIRECT] < 0.03
