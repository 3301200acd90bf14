"""The switches for speed change results by rounding only."""

import pytest
import torch
import toy_stage
from tiny import random_tensor, tiny_addp

from addp_core.base.rng import generator
from addp_core.method.sampler import sample
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig
from addp_core.training import compute
from addp_core.training.compute import accelerate_model, autocast, turn_off_tf32
from addp_core.training.processes import process_state


@torch.no_grad()
def test_accelerated_tokenizer_gives_the_same_results():
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(width=32, multipliers=(1, 2), blocks=1, codebook=16, dim=8)).eval()
    images = torch.rand(2, 3, 64, 48, generator=generator("images"))
    h, codes = tokenizer.encoder(images), random_tensor(2, 8, 32, 24, seed="codes")
    expected = tokenizer.decode(codes)
    accelerate_model(tokenizer)
    found = tokenizer.encoder(images[:1])
    assert (found - h[:1]).abs().max() < 1e-3 * h.std()
    assert (tokenizer.decode(codes) - expected).abs().max() < 1e-3 * expected.std()
    assert tokenizer.encode(images).shape == (2, 32 * 24)


def test_accelerated_sampling_gives_the_same_images():
    model = tiny_addp()
    before = sample(model, 2, steps=3, temperature=0.0, top_p=0.0)
    accelerate_model(model)
    torch.testing.assert_close(sample(model, 2, steps=3, temperature=0.0, top_p=0.0), before, atol=1e-4, rtol=0)


def test_memory_setting_is_skipped_without_glibc(monkeypatch):
    monkeypatch.setattr(compute.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(compute.ctypes, "CDLL", None)
    compute.keep_freed_memory()


def tf32_flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture
def tf32_on():
    """A process that allows TF32 everywhere; the flags are restored afterwards."""
    before = tf32_flags()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_fp32_does_not_use_tf32_and_other_precisions_may(tf32_on):
    device = torch.device("cpu")
    with autocast("fp32", device):
        assert tf32_flags() == (False, False)
        assert not torch.is_autocast_enabled("cpu")
        with autocast("bf16", device):
            assert tf32_flags() == (False, True)  # PyTorch's defaults
            assert torch.is_autocast_enabled("cpu")
        assert tf32_flags() == (False, False)
    assert tf32_flags() == (True, True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_uses_tf32_only_below_fp32(tf32_on, tmp_path, monkeypatch, precision):
    seen = []
    loss = toy_stage.ToyStage.loss
    monkeypatch.setattr(toy_stage.ToyStage, "loss", lambda *args: seen.append(tf32_flags()) or loss(*args))
    toy_stage.run([f"out={tmp_path / 'run'}", "train.steps=1", "train.warmup_steps=0", f"train.precision={precision}"])
    assert seen == [(False, False) if precision == "fp32" else (True, True)]
    assert tf32_flags() == (True, True)


def test_commands_without_a_precision_do_not_use_tf32(tf32_on):
    turn_off_tf32.cache_clear()
    process_state()
    assert tf32_flags() == (False, False)
