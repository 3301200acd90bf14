"""The tokenizer."""

import pytest
import torch
from tiny import BATCH, HEIGHT, TOKENIZER, TOKENS, WIDTH
from torch.nn import functional as F

from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig, Upsample


def test_tokenizer_round_trip_shapes(model, images):
    ids = model.tokenizer.encode(images)
    assert ids.shape == (BATCH, TOKENS)
    assert ids.dtype == torch.long
    codes = model.tokenizer.lookup(ids)
    assert codes.shape == (BATCH, TOKENIZER.dim, 4, 6)
    assert torch.equal(codes[1, :, 2, 3], model.tokenizer.quantize.embedding.weight[ids[1, 2 * 6 + 3]])  # row-major
    assert model.tokenizer.decode(codes).shape == (BATCH, 3, HEIGHT, WIDTH)


def test_lookup_needs_a_fitting_grid(model):
    with pytest.raises(ValueError, match="found 23 ids, expected 4 x 6"):
        model.tokenizer.lookup(torch.zeros(1, 23, dtype=torch.long))


def test_encode_finds_the_nearest_codes(model, images):
    h = model.tokenizer.encoder(images).flatten(2).transpose(1, 2)
    distances = torch.cdist(h, model.tokenizer.quantize.embedding.weight.expand(BATCH, -1, -1))
    assert torch.equal(model.tokenizer.encode(images), distances.argmin(-1))


def test_upsample_matches_interpolation_and_convolution():
    torch.manual_seed(0)
    up = Upsample(5).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.double)
    expected = up.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(up(x), expected)


def test_published_tokenizer_has_the_published_size():
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig())
    assert sum(p.numel() for p in tokenizer.parameters()) / 1e6 == pytest.approx(54.5, abs=0.05)


@pytest.mark.parametrize("bad", [{"width": 33}, {"multipliers": ()}])
def test_impossible_tokenizers_are_rejected(bad):
    with pytest.raises(ValueError, match="found"):
        TokenizerConfig(**bad)


def test_image_sizes_must_be_multiples_of_the_stride():
    assert TokenizerConfig().grid((256, 192)) == (16, 12)
    with pytest.raises(ValueError, match="multiples of the tokenizer's stride 16"):
        TokenizerConfig().grid((250, 192))
