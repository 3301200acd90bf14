"""The switches for speed change results by rounding only."""

import torch
from tiny import random_tensor, tiny_addp

from addp_core.base.rng import generator
from addp_core.method.sampler import sample
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig
from addp_core.training import compute
from addp_core.training.compute import accelerate_model


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
