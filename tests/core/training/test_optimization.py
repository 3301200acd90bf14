"""The learning-rate schedule and the optimizer's parameter groups."""

import pytest
import timm
import torch
from toy_stage import Net

from addp_core.base.errors import UserError
from addp_core.training.optimization import check_layer_decay, learning_rate, make_optimizer
from addp_core.training.stage import TrainConfig


def vit() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=4)


def test_learning_rate_rises_linearly_and_falls_along_half_a_cosine():
    config = TrainConfig(batch=512, base_lr=1e-3, min_lr=1e-4)
    rates = [learning_rate(step, 100, 10, config) for step in range(101)]
    assert config.peak_lr == 2e-3
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1e-3)
    assert rates[10] == 2e-3
    assert rates[55] == pytest.approx((2e-3 + 1e-4) / 2)
    assert rates[100] == pytest.approx(1e-4)
    assert learning_rate(99, 100, 2.5, TrainConfig(lr=0.3, schedule="constant")) == 0.3
    assert learning_rate(1, 100, 2.5, TrainConfig(lr=0.3)) == pytest.approx(0.3 / 2.5)


@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        (Net(0, True), {}, "Net does not name its layers"),
        (vit(), {"optimizer": "lars", "weight_decay": 0.0}, "lars without weight decay has one rate for all layers"),
    ],
)
def test_layer_decay_without_effect_is_refused(model, settings, expected):
    with pytest.raises(UserError, match=rf"train\.layer_decay: found 0\.5, expected null: {expected}"):
        check_layer_decay(model, TrainConfig(layer_decay=0.5, **settings))
    check_layer_decay(model, TrainConfig(layer_decay=1.0, **settings))


def test_vectors_are_not_decayed_and_layer_decay_scales_learning_rates():
    model = vit()
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.5, betas=(0.8, 0.9), weight_decay=0.1))
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = {name: group_of[id(p)] for name, p in model.named_parameters()}
    assert groups["blocks.0.attn.qkv.weight"]["weight_decay"] == 0.1
    for vector in ("blocks.0.attn.qkv.bias", "blocks.2.norm1.weight", "pos_embed", "cls_token", "head.bias"):
        assert groups[vector]["weight_decay"] == 0, vector
    assert groups["head.weight"]["lr_scale"] == 1
    assert groups["blocks.1.mlp.fc1.weight"]["lr_scale"] == 2 * groups["blocks.0.mlp.fc1.weight"]["lr_scale"]
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    sgd = make_optimizer(Net(0, True), TrainConfig(optimizer="sgd", momentum=0.7, weight_decay=0.1))
    assert sgd.defaults["momentum"] == 0.7
    assert {group["weight_decay"]: len(group["params"]) for group in sgd.param_groups} == {0.0: 4, 0.1: 2}
