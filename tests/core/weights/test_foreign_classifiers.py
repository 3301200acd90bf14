"""Foreign ViTs with heads: the classifier equals the model that wrote the file, and the encoder stays readable."""

import pytest
import torch
from checks import assert_user_error, same_weights
from timm.data import IMAGENET_INCEPTION_MEAN
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from addp_core import load_classifier, load_encoder, save_model

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 5}
CLOSE = {"atol": 1e-4, "rtol": 1e-3}
BUILD = {
    "timm: norm, class token": lambda: VisionTransformer(**SHAPE),
    "MAE: average, fc_norm": lambda: VisionTransformer(**SHAPE, global_pool="avg", fc_norm=True),
    "DeiT III": lambda: VisionTransformer(**SHAPE, init_values=0.1, no_embed_class=True),
    "BEiT": lambda: Beit(**SHAPE, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True),
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def perturbed(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("name", BUILD)
def test_logits_equal_those_of_the_model_that_wrote_the_file(tmp_path, name):
    vit = perturbed(BUILD[name]())
    torch.save({"model": vit.state_dict()}, tmp_path / "c.pth")
    model = load_classifier(tmp_path / "c.pth")
    torch.testing.assert_close(model(IMAGES), vit(IMAGES), **CLOSE)
    assert (model.num_classes, model.encoder.image_size) == (5, (32, 32))
    save_model(model, tmp_path / "ours.safetensors")
    assert same_weights(load_classifier(tmp_path / "ours.safetensors"), model)
    assert load_classifier(tmp_path / "c.pth", 64).encoder.grid == (8, 8)
    assert same_weights(load_encoder(tmp_path / "c.pth", 32), model.encoder)


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_a_linear_probe_of_mae_has_a_batch_norm_before_its_head(pooling):
    vit = VisionTransformer(**SHAPE, global_pool=pooling)
    vit.head = nn.Sequential(nn.BatchNorm1d(192, affine=False, eps=1e-6), vit.head)
    vit.head[0].running_mean.normal_()
    vit.head[0].running_var.uniform_(0.5, 2)
    perturbed(vit)
    torch.testing.assert_close(load_classifier(vit.state_dict())(IMAGES), vit(IMAGES), **CLOSE)


def test_normalization_is_chosen_as_the_file_does_not_store_it(tmp_path, caplog):
    state = VisionTransformer(**SHAPE).state_dict()
    load_classifier(state)
    assert "took the class token after norm" in caplog.text
    assert "took ImageNet's mean and std (normalisation=half takes 0.5)" in caplog.text
    model = load_classifier(state, normalisation="half")
    assert model.mean == IMAGENET_INCEPTION_MEAN
    save_model(model, tmp_path / "c.safetensors")
    assert_user_error(
        lambda: load_classifier(tmp_path / "c.safetensors", normalisation="imagenet"), "normalisation", "leave"
    )


def test_files_without_a_usable_head_are_refused():
    state = VisionTransformer(**SHAPE).state_dict()
    without_head = {key: value for key, value in state.items() if not key.startswith("head.")}
    assert_user_error(lambda: load_classifier(without_head), "ViT encoder", "expected a classifier", "head")
    without_norm = {key: value for key, value in state.items() if not key.startswith("norm.")}
    assert_user_error(lambda: load_classifier(without_norm), "without a norm before its head")
    two_norms = state | {"fc_norm.weight": torch.ones(192), "fc_norm.bias": torch.zeros(192)}
    assert_user_error(lambda: load_classifier(two_norms), "two norms")
    narrow = state | {"head.weight": state["head.weight"][:, :9]}
    assert_user_error(lambda: load_classifier(narrow), "head.weight", "expected (5, 192)")
