"""Files of CNNs: ours from pretraining and transfer, and ResNets of timm and torchvision."""

import pytest
import timm
import torch
import torchvision
from checks import assert_user_error, same_weights
from tiny import random_tensor, tiny_cnn_addp

from addp_core import load_addp, load_encoder, save_model
from addp_core.method.addp import ADDP, ADDPConfig
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.classifier import Classifier
from addp_core.networks.cnn import CnnConfig, CnnEncoder
from addp_core.weights.loading import load_classifier

ATTENTION = AttentionConfig(window=2, class_token=False)


@pytest.fixture(scope="module")
def model() -> ADDP:
    return tiny_cnn_addp(image_size=(32, 32)).eval()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cnn") / "model.safetensors"
    save_model(model, path)
    return path


def test_the_encoder_of_a_pretrained_file_is_its_body_at_full_stride(model, path):
    encoder = load_encoder(path, 64, drop_path=0.1)
    assert isinstance(encoder, CnnEncoder)
    assert encoder.config == CnnConfig("test_resnet", 16, drop_path=0.1)
    assert (encoder.image_size, encoder.patch_size, encoder.grid) == ((64, 64), 32, (2, 2))
    assert same_weights(encoder.body, model.denoiser.encoder.body)
    assert encoder.forward_features(random_tensor(2, 3, 64, 64)).shape == (2, 4, 96)
    assert load_encoder(path, None).image_size == (32, 32)


def test_a_transferred_encoder_is_read_from_any_of_our_files(path, tmp_path):
    encoder = load_encoder(path, 64)
    save_model(encoder, tmp_path / "encoder.safetensors")
    save_model(Classifier(encoder, 3, norm="none"), tmp_path / "classifier.safetensors")
    torch.save({"model": encoder.state_dict()}, tmp_path / "encoder.pth")
    for name in ("encoder.safetensors", "classifier.safetensors", "encoder.pth"):
        assert same_weights(load_encoder(tmp_path / name, 64), encoder), name


def test_random_weights_take_the_architecture_alone(path):
    torch.manual_seed(0)
    encoder = load_encoder(path, 64, init="random")
    assert not same_weights(encoder, load_encoder(path, 64))
    assert load_encoder("test_resnet", 64, init="random").config == CnnConfig("test_resnet")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_resnets_of_others(library, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18") if library == "timm" else torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    images = random_tensor(2, 3, 64, 64)
    classifier = load_classifier(tmp_path / "resnet.pth", 64)
    torch.testing.assert_close(classifier(images), theirs.eval()(images))
    encoder = load_encoder(tmp_path / "resnet.pth", 64)
    assert encoder.config.arch == "resnet18"
    assert same_weights(encoder, classifier.encoder)
    moco = {f"module.base_encoder.{key}": value for key, value in theirs.state_dict().items()}
    moco |= {key.replace("base", "momentum"): value + 1 for key, value in moco.items()}
    torch.save({"state_dict": moco}, tmp_path / "moco.pth")
    assert same_weights(load_encoder(tmp_path / "moco.pth", 64), encoder)


def test_resnet50_is_told_by_its_blocks(tmp_path):
    state = {key: torch.empty(value.shape) for key, value in timm.create_model("resnet50").state_dict().items()}
    assert load_encoder(state, 64).config.arch == "resnet50"
    short = {key: value for key, value in state.items() if not key.startswith("layer3.5.")}
    assert_user_error(lambda: load_encoder(short), "a ResNet with 3, 4, 5, 3 blocks in its stages", "resnet101")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention": ATTENTION},
            "is a test_resnet, which has neither windows nor relative positions",
        ),
        ({"encoder_heads": 2}, "encoder_heads: found 2, but"),
        ({"dropout": 0.1}, "dropout: found 0.1, but"),
        ({"tokenizer_norm": True}, "has none; expected an ADDP checkpoint, or tokenizer_norm=false"),
        ({"patch_size": 16}, "patch_size: found 16, but"),
        ({"input": "token"}, "input=token:"),
    ],
)
def test_options_of_vits_are_refused(path, options, message):
    assert_user_error(lambda: load_encoder(path, 64, **options), message, str(path))


def test_names_of_timm(tmp_path):
    assert_user_error(
        lambda: load_encoder("resnet50"), "resnet50: a model of timm, without weights here; expected init=random"
    )
    expected = "'densenet121', which is no CNN of timm that can be dilated"
    assert_user_error(lambda: load_encoder("densenet121", init="random"), expected)


def test_a_size_and_a_process_may_be_changed(model, path):
    again = load_addp(path, image_size=(32, 64))
    assert again.config.image_size == (32, 64)
    assert isinstance(model.config, ADDPConfig)
    assert same_weights(again.denoiser.encoder, model.denoiser.encoder)
