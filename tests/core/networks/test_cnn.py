"""CNNs of timm as encoders: their maps, on the decoder's grid and in stages, and in ADDP's denoiser."""

import math

import pytest
import timm
import torch
from tiny import TOKENIZER, TOKENS, nested_masks, random_tensor, tiny_cnn_addp

from addp_core.base.rng import generator
from addp_core.method.sampler import sample
from addp_core.networks.cnn import CnnConfig, CnnEncoder, CnnGridEncoder, cnn_stages
from addp_core.weights.loading import load_addp
from addp_core.weights.saving import save_model, save_published

CNNS = ("test_resnet", "test_convnext", "test_efficientnet")  # timm's, of a few hundred thousand parameters


def test_the_dilated_resnet_is_the_plain_one_at_every_second_position():
    config = CnnConfig("resnet50", width=8)
    plain, dilated = CnnEncoder(config, (64, 96)).eval(), CnnGridEncoder(config, (64, 96), (4, 6)).eval()
    dilated.body.load_state_dict(plain.body.state_dict())
    images = random_tensor(2, 3, 64, 96)
    with torch.no_grad():
        (expected,), (found,) = (model.forward_maps(images, (-1,)) for model in (plain, dilated))
        assert dilated(images).shape == (2, 24, 8)
    assert found.shape == (2, 2048, 4, 6)
    torch.testing.assert_close(found[..., ::2, ::2], expected)
    assert (plain.patch_size, dilated.patch_size) == (32, 16)


@pytest.mark.parametrize("arch", CNNS)
def test_stages_are_those_of_timm(arch):
    encoder = CnnEncoder(CnnConfig(arch), (64, 96)).eval()
    plain = timm.create_model(arch, features_only=True).eval()
    plain.load_state_dict(encoder.body.state_dict(), strict=False)  # their names differ for some models
    maps = encoder.forward_maps(random_tensor(2, 3, 64, 96), (0, 1, 2, -1))
    strides = [64 // features.shape[-2] for features in maps]
    assert strides == plain.feature_info.reduction()[-4:] == list(encoder.config.strides)
    assert [features.shape[1] for features in maps] == plain.feature_info.channels()[-4:]
    (tokens,) = encoder.forward_tokens(random_tensor(2, 3, 64, 96), (-1,))
    torch.testing.assert_close(tokens, maps[-1].flatten(2).transpose(1, 2))


def test_stages_of_a_resnet_are_bit_for_bit_those_of_timm():
    encoder = CnnEncoder(CnnConfig("test_resnet"), (64, 64)).eval()
    plain = timm.create_model("test_resnet", features_only=True).eval()
    plain.load_state_dict(encoder.body.state_dict())
    images = random_tensor(2, 3, 64, 64)
    for ours, theirs in zip(encoder.forward_maps(images, range(4)), plain(images)[-4:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("arch", CNNS)
def test_a_cnn_trains_generates_and_is_stored(arch, tmp_path):
    model, images = tiny_cnn_addp(arch), torch.rand(3, 3, 8, 12, generator=generator("images"))
    loss = model.train()(images, generator("step"))["loss"]
    loss.backward()
    assert math.isfinite(loss.item())
    assert [name for name, p in model.denoiser.named_parameters() if p.grad is None] == []
    model.eval()
    assert sample(model, 2, steps=3).shape == (2, 3, 8, 12)
    save_model(model, tmp_path / "model.safetensors")
    again = load_addp(tmp_path / "model.safetensors")
    assert again.config == model.config
    ids, (mask, _) = model.tokenizer.encode(images), nested_masks()
    assert torch.equal(again.logits(images, ids, mask), model.logits(images, ids, mask))
    with pytest.raises(ValueError, match=f"arch: found {arch}; the published layout only has ViTs"):
        save_published(model, tmp_path / "addp.pth")


def test_the_decoder_sees_the_cnn_at_reliable_positions_alone():
    model, images = tiny_cnn_addp().eval(), torch.rand(3, 3, 8, 12, generator=generator("images"))
    ids, (mask, _) = model.tokenizer.encode(images), nested_masks()
    features = model.denoiser.encode(images, ids, mask)
    assert features.shape == (3, TOKENS, 16)
    visible = model.denoiser.encode(images, ids, mask, visible_only=True)
    torch.testing.assert_close(visible.flatten(0, 1), features[~mask])
    no_masks = torch.ones_like(mask)
    other = torch.rand(3, 3, 8, 12, generator=generator("other"))
    torch.testing.assert_close(model.logits(images, ids, no_masks), model.logits(other, ids, no_masks))
    assert not torch.allclose(model.logits(images, ids, mask), model.logits(other, ids, mask))


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = CnnEncoder(CnnConfig("test_resnet"), (32, 32)).train()
        encoder.checkpointing = checkpointing
        encoder.forward_features(random_tensor(2, 3, 32, 32)).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_stages_of_resnet50():
    assert cnn_stages("resnet50") == ((4, 256), (8, 512), (16, 1024), (32, 2048))
    assert CnnEncoder(CnnConfig("test_resnet"), (33, 64)).grid == (2, 2)  # CNNs round up


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet5", "arch: found 'resnet5', expected a CNN of timm, such as resnet50; did you mean 'resnet50'"),
        ("vit_tiny_patch16_224", "arch: found 'vit_tiny_patch16_224', which is no CNN of timm that can be dilated"),
        ("densenet121", "arch: found 'densenet121', which is no CNN of timm that can be dilated"),
        ("vgg11_bn", "arch: found 'vgg11_bn', which is no CNN of timm that can be dilated and has stochastic depth"),
    ],
)
def test_other_models_are_refused(arch, message):
    with pytest.raises(ValueError) as error:
        CnnConfig(arch)
    assert message in str(error.value)


def test_a_cnn_takes_no_ids():
    message = "process.ids_to: found encoder\\+decoder, but test_resnet takes pixels alone; expected decoder or none"
    with pytest.raises(ValueError, match=message):
        tiny_cnn_addp(ids_to="encoder+decoder")
    assert TOKENIZER.stride == 2  # the finest map has stride 8: it is resampled to the grid in these tests
