"""The learning-rate schedule and the optimizer's parameter groups."""

import re

import pytest
import timm
import torch
from toy_stage import Net, run

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
        check_layer_decay(type(model), TrainConfig(layer_decay=0.5, **settings))
    check_layer_decay(type(model), TrainConfig(layer_decay=1.0, **settings))


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.optimizer=adahessian"], "train.optimizer: found 'adahessian', expected one without second"),
        (["train.betas=[0.9,1.5]"], "train.betas: found [0.9,1.5], expected a list of 2 in brackets, each a number"),
        (["train.lr=0.1", "train.min_lr=0.2"], "train.min_lr: found 0.2, expected at most the peak learning rate, 0.1"),
        (
            ["train.lr=null", "train.base_lr=0.1", "train.batch=64", "train.min_lr=0.05"],
            "train.min_lr: found 0.05, expected at most the peak learning rate, 0.025",
        ),
    ],
)
def test_settings_that_no_run_could_follow(tmp_path, settings, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        run([f"out={tmp_path}", *settings])


def test_the_rate_at_the_end_does_not_matter_to_a_constant_schedule():
    assert TrainConfig(lr=0.1, min_lr=0.2, schedule="constant").peak_lr == 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without CUDA")
@pytest.mark.parametrize("optimizer", ["bnbadam", "fusedsgd"])
def test_an_optimizer_that_this_machine_lacks_is_found_before_anything_is_written(tmp_path, optimizer):
    with pytest.raises(UserError, match=f"^train.optimizer={optimizer}: CUDA required"):
        run([f"out={tmp_path}", f"train.optimizer={optimizer}"])
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("optimizer", ["adan", "adanw", "cadan"])
def test_optimizers_with_three_decay_rates_have_those_of_timm(tmp_path, optimizer):
    assert run([f"out={tmp_path}", f"train.optimizer={optimizer}", "train.steps=2"]).exists()
    assert make_optimizer(Net(0, True), TrainConfig(optimizer=optimizer)).defaults["betas"] == (0.98, 0.92, 0.99)
