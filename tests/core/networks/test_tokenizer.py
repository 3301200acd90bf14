"""The tokenizer."""

import copy

import pytest
import torch
from tiny import BATCH, HEIGHT, TOKENIZER, TOKENS, WIDTH
from torch import nn
from torch.nn import functional as F

from addp_core.networks.tokenizer import GroupNorm, Tokenizer, TokenizerConfig, Upsample


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


@pytest.mark.parametrize(("pixels", "calls"), [(None, 1), (3 * HEIGHT * WIDTH, 2), (HEIGHT * WIDTH - 1, 5)])
def test_chunks_hold_as_many_images_as_have_the_pixels(pixels, calls, model):
    tokenizer = copy.deepcopy(model.tokenizer)
    images = torch.rand(5, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    counts = {"encoder": 0, "decoder": 0}
    for name in counts:
        getattr(tokenizer, name).register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    with torch.no_grad():
        expected = model.tokenizer.encode(images)
        tokenizer.chunk_pixels = pixels
        assert torch.equal(tokenizer.encode(images), expected)
        codes = tokenizer.lookup(expected)
        torch.testing.assert_close(tokenizer.decode(codes), model.tokenizer.decode(codes))
    assert counts == {"encoder": calls, "decoder": calls}


def test_encode_finds_the_nearest_codes(model, images):
    h = model.tokenizer.encoder(images).flatten(2).transpose(1, 2)
    distances = torch.cdist(h, model.tokenizer.quantize.embedding.weight.expand(BATCH, -1, -1))
    assert torch.equal(model.tokenizer.encode(images), distances.argmin(-1))


def test_ids_are_computed_in_float32_under_autocast(model):
    images = torch.rand(64, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = model.tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.tokenizer.encode(images), expected)
        in_bfloat16 = model.tokenizer.quantize.nearest_ids(model.tokenizer.encoder(images))
    assert not torch.equal(in_bfloat16, expected)  # what a training step would otherwise see


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_is_torchs_with_its_gradient(memory_format, dtype):
    torch.manual_seed(0)
    ours, reference = GroupNorm(4, 8, eps=1e-6), nn.GroupNorm(4, 8, eps=1e-6)
    x = torch.randn(3, 8, 6, 5).to(dtype).to(memory_format=memory_format)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = [norm(value) for norm, value in zip((ours, reference), inputs, strict=True)]
    assert torch.equal(*outputs)
    assert outputs[0].dtype == outputs[1].dtype
    for out in outputs:
        out.float().pow(3).mean().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-8)
    assert torch.equal(ours.weight.grad, reference.weight.grad)
    assert torch.equal(ours.bias.grad, reference.bias.grad)


def test_constant_maps_pass_no_gradient_and_others_of_the_batch_do():
    norm = GroupNorm(2, 4, eps=1e-6)
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x[0, :2] = 0  # one group of one image
    x.requires_grad_()
    (norm(x) * torch.linspace(-1, 1, 72).view(2, 4, 3, 3)).sum().backward()
    assert x.grad[0, :2].abs().max() < 1e-3
    assert x.grad[0, 2:].abs().max() > 0.1
    assert x.grad[1].abs().max() > 0.1
    assert norm.bias.grad.abs().min() > 0.1  # from the constant map too


def almost_black(kind: str, size: int) -> torch.Tensor:
    image, generator = torch.zeros(3, size, size), torch.Generator().manual_seed(0)
    if kind == "one pixel":
        image[:, size // 2, size // 2] = 1 / 255
    elif kind == "sensor noise":
        image = torch.randint(2, image.shape, generator=generator) / 255
    elif kind == "letterboxed":
        image[:, size // 4 : -size // 4] = torch.rand(3, size // 2, size, generator=generator)
    return image


@pytest.mark.parametrize("kind", ["black", "one pixel", "sensor noise", "letterboxed"])
@pytest.mark.parametrize(
    "config",
    [
        TokenizerConfig(width=32, multipliers=(1, 1, 1), blocks=1, codebook=256, dim=64, groups=8),  # demo
        TokenizerConfig(width=32, codebook=64, dim=16),  # vqgan_256 with a quarter of its width
    ],
    ids=["demo", "vqgan"],
)
def test_black_images_do_not_enlarge_the_gradient(config, kind):
    torch.manual_seed(0)
    tokenizer = Tokenizer(config)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def gradient_norm(images: torch.Tensor) -> torch.Tensor:
        tokenizer.zero_grad()
        F.mse_loss(tokenizer.decode(tokenizer.encoder(images)), images).backward()
        return torch.stack([p.grad.norm() for p in tokenizer.parameters() if p.grad is not None]).norm()

    usual = gradient_norm(images)
    images[0] = almost_black(kind, 32)
    assert gradient_norm(images) < 2 * usual


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
