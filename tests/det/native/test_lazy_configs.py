"""The LazyConfigs and what they call: the detector, the schedule and the parameter groups."""

# ruff: noqa: E402 (modules that need detectron2 are imported after the check that it is installed)

import pytest
from tiny_detectors import tiny_detectron2_architecture

from addp_core.base.errors import UserError
from addp_core.networks.attention import AttentionConfig
from addp_core.weights.encoders import load_encoder
from det.model import build_detector

pytest.importorskip("detectron2", reason="detectron2 is not installed; `addp doctor` shows the command to install it")
pytestmark = pytest.mark.filterwarnings("ignore")  # detectron2 uses deprecated names of torch

from detectron2.config import LazyConfig, instantiate

from det.native.lazy import cosine, parameter_groups
from det.native.train_net import find_config


@pytest.mark.parametrize(("name", "drop_path", "decay"), [("b", 0.1, 0.8), ("l", 0.4, 0.9)])
def test_configs_hold_the_papers_hyperparameters(name, drop_path, decay):
    cfg = LazyConfig.load(str(find_config(f"mask_rcnn_vitdet_{name}_100ep")))
    encoder, optimizer, mapper = cfg.model.backbone.net.encoder, cfg.optimizer, cfg.dataloader.train.mapper
    assert (encoder.img_size, encoder.drop_path, optimizer.params.layer_decay) == (1024, drop_path, decay)
    attention = instantiate(encoder.attention)
    assert attention == AttentionConfig(window=14, global_blocks=4, relative="decomposed", class_token=False)
    assert (optimizer.lr, optimizer.weight_decay, tuple(optimizer.betas)) == (1.6e-4, 0.1, (0.9, 0.999))
    assert (cfg.dataloader.train.total_batch_size, cfg.train.warmup, cfg.train.amp.enabled) == (128, 250, True)
    assert abs(cfg.train.max_iter * 128 / 118_287 - 100) < 0.01
    flip, scale, crop = mapper.augmentations
    assert (scale.min_scale, scale.max_scale, scale.target_height, scale.target_width) == (0.1, 2.0, 1024, 1024)
    assert (flip.horizontal, tuple(crop.crop_size), mapper.recompute_boxes) == (True, (1024, 1024), True)


def test_config_builds_vitdets_detector():
    cfg = LazyConfig.load(str(find_config("mask_rcnn_vitdet_b_100ep")))
    cfg.model.backbone.net.encoder.update(source="tiny", init="random")
    model = instantiate(cfg.model)
    blocks = model.backbone.net.encoder.blocks
    assert [block.window for block in blocks] == [0 if i in (2, 5, 8, 11) else 14 for i in range(12)]
    assert [len(blocks[i].relative.rel_pos_h) for i in (0, 2)] == [2 * 14 - 1, 2 * 64 - 1]
    shapes = {name: (map_.stride, map_.channels) for name, map_ in model.backbone.output_shape().items()}
    assert shapes == {f"p{i}": (2**i, 256) for i in range(2, 7)}
    assert model.backbone.padding_constraints == {"size_divisiblity": 32, "square_size": 1024}
    assert len(model.proposal_generator.rpn_head.conv) == 2
    box, mask = model.roi_heads.box_head, model.roi_heads.mask_head
    assert [name for name, _ in box.named_children()][:6] == ["conv1", "conv2", "conv3", "conv4", "flatten", "fc1"]
    assert len(box.fcs) == 1
    assert all(type(layer.norm).__name__ == "LayerNorm" for layer in (box.conv1, mask.mask_fcn1))


def test_schedule_rises_then_follows_a_cosine():
    factor = cosine(iterations=1000, warmup=100)
    found = [factor(step / 1000) for step in (0, 50, 100, 550, 1000 - 1e-6)]
    assert found == pytest.approx([0.001, 0.5005, 1.0, 0.5, 0.0], abs=1e-3)
    with pytest.raises(UserError, match=r"train.warmup: found 50, expected fewer"):
        cosine(iterations=50, warmup=50)


def test_learning_rates_and_weight_decay_of_the_parameter_groups(encoder_file):
    encoder = load_encoder(encoder_file, 32, attention=AttentionConfig(relative="decomposed"), dynamic=True)
    model = build_detector(tiny_detectron2_architecture(encoder), encoder)
    by_parameter = {}
    for group in parameter_groups(model, base_lr=1.0, layer_decay=0.5):
        for parameter in group["params"]:
            by_parameter[id(parameter)] = group["lr"], group.get("weight_decay", "as the optimizer's")
    by_name = {name: by_parameter.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert not by_parameter
    net = "rcnn.backbone.net.encoder."
    expected = {
        f"{net}patch_embed.proj.weight": (0.5**5, "as the optimizer's"),
        f"{net}patch_embed.proj.bias": (0.5**5, 0.0),
        f"{net}pos_embed": (0.5**5, 0.0),
        f"{net}cls_token": (0.5**5, 0.0),
        f"{net}blocks.0.attn.qkv.weight": (0.5**4, "as the optimizer's"),
        f"{net}blocks.3.norm2.weight": (0.5, 0.0),
        f"{net}blocks.3.mlp.fc1.weight": (0.5, "as the optimizer's"),
        "rcnn.backbone.simfp_3.0.weight": (1.0, "as the optimizer's"),
        "rcnn.backbone.simfp_3.0.norm.weight": (1.0, 0.0),
        "rcnn.roi_heads.box_predictor.cls_score.bias": (1.0, 0.0),
        "rcnn.roi_heads.box_head.fc1.weight": (1.0, "as the optimizer's"),
    }
    assert {name: by_name[name] for name in expected} == expected
