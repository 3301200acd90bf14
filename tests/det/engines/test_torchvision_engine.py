"""The engine torchvision: what it trains, how it sees images, and what it returns."""

import json

import pytest
import torch
from pycocotools import mask as coco_mask
from tiny_detectors import CATEGORIES, sample_with_boxes, tiny_detector, tiny_encoder

from addp_core.training.optimization import make_optimizer
from addp_core.training.stage import TrainConfig
from addp_core.weights.encoders import load_encoder
from det.drawing import draw_detections


def test_without_windows_and_relative_positions_the_map_equals_the_recognition_encoders_tokens():
    encoder = tiny_encoder()
    images = torch.randn(2, 3, 32, 32)
    tokens = load_encoder(encoder.state_dict(), 32, encoder_heads=2).forward_features(images)
    (map_,) = encoder.forward_maps(images, [-1])
    assert torch.allclose(map_.flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-6)


def test_every_trained_parameter_gets_a_gradient_with_and_without_objects():
    model = tiny_detector().train()
    box = (3, 4, 20, 25)
    for samples in ([sample_with_boxes(box), sample_with_boxes()], [sample_with_boxes(), sample_with_boxes()]):
        model.zero_grad()
        losses = model(samples)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_layer_decay_falls_from_the_heads_to_the_stem():
    model = tiny_detector()
    groups = make_optimizer(model, TrainConfig(layer_decay=0.5, weight_decay=0.1)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    net = "backbone.net."
    assert scales[net + "pos_embed"] == (0.125, 0)
    assert scales[net + "patch_embed.proj.weight"] == (0.125, 0.1)
    assert scales[net + "blocks.0.attn.qkv.weight"] == (0.25, 0.1)
    assert scales[net + "blocks.1.attn.qkv.bias"] == (0.5, 0)
    assert scales["backbone.simfp_2.0.weight"] == (1, 0.1)
    assert scales["roi_heads.box_head.0.1.weight"] == (1, 0)
    assert net + "norm.weight" not in scales


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_detector().train()
        model.backbone.net.checkpointing = checkpointing
        torch.manual_seed(1)
        sum(model([sample_with_boxes((3, 4, 20, 25))]).values()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_boxes_keep_their_precision_under_bfloat16():
    model, sample = tiny_detector(samples=128).train(), sample_with_boxes((3, 4, 20, 25))
    anchors, proposals = [], []
    sample.boxes += 0.1234567  # bfloat16 cannot represent these digits
    model.rpn.anchor_generator.register_forward_hook(lambda module, inputs, output: anchors.extend(output))
    model.roi_heads.box_roi_pool.register_forward_hook(lambda module, inputs, output: proposals.extend(inputs[1]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([sample])
        (detections,) = model.eval().detect([sample.image])
    assert all(loss.isfinite() for loss in losses.values())
    assert {boxes.dtype for boxes in (*anchors, *proposals)} == {torch.float32}
    assert (proposals[0] == sample.boxes[0]).all(1).any()  # the ground truth is among the proposals, unrounded
    for boxes in (*proposals, detections.boxes):
        assert not torch.equal(boxes, boxes.bfloat16().float())


@pytest.mark.parametrize(("name", "white"), [("imagenet", (1 - 0.485) / 0.229), ("half", 1.0)])
def test_torchvision_normalizes_images_as_the_architecture_says(name, white):
    model, inputs_seen = tiny_detector(normalisation=name).eval(), []
    model.backbone.register_forward_hook(lambda module, inputs, output: inputs_seen.extend(inputs[0]))
    model.detect([torch.full((3, 32, 32), 255, dtype=torch.uint8)])
    torch.testing.assert_close(inputs_seen[0][0], torch.full((32, 32), white))


def test_detections_on_images_of_any_size_are_in_their_pixels():
    model = tiny_detector().eval()
    images = [torch.randint(256, (3, *hw), dtype=torch.uint8) for hw in ((20, 61), (90, 7), (32, 32))]
    for image, detections in zip(images, model.detect(images), strict=True):
        height, width = image.shape[-2:]
        n = len(detections.boxes)
        assert n == len(detections.scores) == len(detections.labels) == len(detections.masks) > 0
        assert detections.boxes[:, 0::2].min() >= 0
        assert detections.boxes[:, 0::2].max() <= width
        assert detections.boxes[:, 1::2].max() <= height
        assert detections.mask(0).shape == (height, width)
        assert set(detections.labels.tolist()) <= {0, 1}
        assert detections.scores.tolist() == sorted(detections.scores.tolist(), reverse=True)
        (result, *_) = detections.to_results(5, CATEGORIES)
        assert result["image_id"] == 5
        assert result["category_id"] in (2, 7)
        assert coco_mask.decode(result["segmentation"]).shape == (height, width)
        json.dumps(result)


def test_an_image_may_have_no_detections():
    image = torch.zeros(3, 40, 30, dtype=torch.uint8)
    (detections,) = tiny_detector(score=0.999).eval().detect([image])
    assert len(detections.boxes) == len(detections.masks) == 0
    assert detections.to_results(1, CATEGORIES) == []
    assert torch.equal(draw_detections(image, detections, CATEGORIES), image)


def test_a_detector_learns_to_locate_an_object():
    """It overfits one image: a white box on black."""
    model = tiny_detector()
    sample = sample_with_boxes((8, 6, 24, 22))
    sample.image[:] = sample.masks[0] * 255
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for step in range(60):
        torch.manual_seed(step)
        sum(model.train()([sample]).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    (detections,) = model.eval().detect([sample.image])
    assert detections.labels[0] == 0
    assert detections.scores[0] > 0.7
    assert (detections.boxes[0] - sample.boxes[0]).abs().max() < 3
    predicted, truth = detections.mask(0), sample.masks[0].bool()
    assert (predicted & truth).sum() / (predicted | truth).sum() > 0.5


def test_boxes_alone_train_and_are_detected_without_masks():
    model = tiny_detector(masks=False).train()
    assert not any("mask" in name for name in model.state_dict())
    sample = sample_with_boxes((3, 4, 20, 25))
    sample.masks = None
    losses = model([sample, sample])
    assert losses.keys() == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    (detections,) = model.eval().detect([sample.image])
    assert len(detections.boxes) > 0
    assert detections.masks is None
    assert "segmentation" not in detections.to_results(5, CATEGORIES)[0]


def test_images_are_padded_after_normalization_and_no_proposal_lies_in_the_padding():
    model, inputs_seen, proposals = tiny_detector().train(), [], []
    model.backbone.register_forward_hook(lambda module, inputs, output: inputs_seen.extend(inputs[0]))
    model.rpn.register_forward_hook(lambda module, inputs, output: proposals.extend(output[0]))
    sample = sample_with_boxes((3, 4, 14, 9))
    sample.image, sample.masks = sample.image[:, :10, :20], sample.masks[:, :10, :20]
    model([sample])
    assert inputs_seen[0].shape == (3, 32, 32)
    assert (inputs_seen[0][:, 10:] == 0).all()
    assert (inputs_seen[0][:, :, 20:] == 0).all()
    assert (inputs_seen[0][:, :10, :20] != 0).float().mean() > 0.9
    assert len(proposals[0]) > 0
    assert proposals[0][:, 2].max() <= 20
    assert proposals[0][:, 3].max() <= 10


def test_the_interpolation_of_the_architecture_resizes_images_in_evaluation():
    image, seen = torch.randint(256, (3, 50, 64), dtype=torch.uint8), {}
    for name in ("bicubic", "bilinear"):
        model = tiny_detector(interpolation=name).eval()
        model.backbone.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: inputs[0]}))
        model.detect([image])
    assert not torch.equal(seen["bicubic"], seen["bilinear"])
