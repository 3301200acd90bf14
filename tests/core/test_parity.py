"""Parity of the public functions with the published implementation (tests/golden), in float32, on the CPU and on a GPU.

Tolerances: ids are equal; the largest error of a float tensor is below 1e-3 of its standard deviation; relative errors
are below 1e-4 for the loss and below 1e-3 for gradient norms.
"""

import pytest
import torch
from golden_weights import GOLDEN, HEADS, SPEC, golden_state
from safetensors.torch import load_file

from addp_core import load_addp, load_encoder, sample
from addp_core.method.diffusion import map_tokens
from addp_core.networks.tokenizer import to_feature_map
from addp_core.training.compute import tf32_for

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    with tf32_for("fp32"):
        yield torch.device(request.param)


@pytest.fixture(scope="module")
def golden(device):
    return {name: value.to(device) for name, value in load_file(GOLDEN / "outputs.safetensors").items()}


@pytest.fixture(scope="module")
def state():
    return {"model": golden_state()}


@pytest.fixture(scope="module")
def model(state, device):
    return load_addp(state, **HEADS).to(device)


@pytest.fixture(scope="module")
def images(golden):
    return golden["image"].float()


@pytest.fixture(scope="module")
def ids(golden):
    return golden["indices"].long()


@pytest.fixture(scope="module")
def corrupted(model, ids, golden):
    return model.corrupt(ids, golden["mask_t"], golden["mask_next"])


def close(found, expected, name):
    error = (found - expected).abs().max() / expected.std()
    assert error < 1e-3, f"{name}: found a largest error of {error:.2e} standard deviations, expected less than 1e-3"


@torch.no_grad()
def test_tokenizer(model, golden, images, ids):
    h = model.tokenizer.encoder(images).permute(0, 2, 3, 1).flatten(1, 2)
    close(h[:, ::8], golden["h"], "h")
    assert torch.equal(model.tokenizer.encode(images), ids)
    close(model.tokenizer.decode(model.tokenizer.lookup(ids))[..., ::4, ::4], golden["recon"], "recon")


@torch.no_grad()
def test_predictor(model, golden, ids):
    guess = model.predictor(ids, golden["mask_next"])
    codes = to_feature_map(map_tokens(guess, model.tokenizer.quantize.embedding.weight, "weighted"), (16, 16))
    close(codes[:, ::16], golden["z_pred"], "z_pred")
    assert torch.allclose(guess.sum(-1), guess.new_ones(()), atol=1e-5)


def test_corruption(corrupted, golden):
    close(to_feature_map(corrupted.target, (16, 16))[:, ::8], golden["target"], "target")
    close(corrupted.images[..., ::4, ::4], golden["x_t"], "x_t")


def test_logits_loss_and_gradients(model, golden, corrupted, ids):
    mask = golden["mask_t"]
    features = model.denoiser.encode(corrupted.images, ids, mask)
    close(features.detach(), golden["latent"], "latent")
    logits = model.logits(corrupted.images, ids, mask)
    assert logits.shape == (2, 256, 2025)
    close(logits[:, ::8, :1024].detach(), golden["logits"], "logits")

    loss = model.loss(logits, corrupted.target, mask)
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-4)
    masked_only = model.denoiser(corrupted.images, ids, mask, corrupted.target)
    assert masked_only.item() == pytest.approx(loss.item(), rel=1e-6)

    model.zero_grad()
    masked_only.backward()
    named = dict(model.denoiser.named_parameters())
    for name, expected in SPEC["grad_norms"].items():
        parameter = named.get(f"encoder.{name}", named.get(f"decoder.{name}"))
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize(("schedule", "steps"), [("cosine", 6), ("linear", 8)])
def test_sampler(model, golden, schedule, steps):
    images = sample(model, 1, steps=steps, schedule=schedule, temperature=0.0, top_p=0.0)
    expected = golden[f"sample_{schedule}{steps}"].clamp(0, 1)
    assert (images[..., ::4, ::4] - expected).abs().max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("size", [256, 224])
def test_recognition_encoder(state, golden, images, size):
    encoder = load_encoder(state, img_size=size, encoder_heads=HEADS["encoder_heads"]).to(images.device)
    features = encoder.forward_features((images[..., :size, :size] - MEAN.to(images)) / STD.to(images))
    close(features, golden[f"vit_features_{size}"], f"vit_features_{size}")
