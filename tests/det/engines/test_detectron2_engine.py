"""The engine detectron2, and the verbs of detection with it."""

import dataclasses
import json
import shutil

import pytest
import torch
from pycocotools import mask as coco_mask
from tiny_detectors import NARROW, VITDET_4_BLOCKS, tiny_detectron2_architecture

from addp_core.recipes.config import load
from addp_core.weights.encoders import load_encoder
from addp_core.weights.files import MODEL_FILE
from det import eval as det_eval
from det import predict as det_predict
from det import train as det_train
from det.augment import DetectionSample
from det.config import CocoConfig
from det.model import build_detector

pytest.importorskip("detectron2", reason="detectron2 is not installed; `addp doctor` shows the command to install it")
pytestmark = pytest.mark.filterwarnings("ignore")  # detectron2 uses deprecated names of torch


def test_detectron2_normalizes_images_as_the_architecture_says(encoder_file):
    encoder = load_encoder(encoder_file, 32, attention=VITDET_4_BLOCKS, dynamic=True)
    for name, mean in {"imagenet": 255 * 0.485, "half": 127.5}.items():
        architecture = dataclasses.replace(tiny_detectron2_architecture(encoder), normalisation=name)
        assert float(build_detector(architecture, encoder).rcnn.pixel_mean[0]) == pytest.approx(mean)


def test_a_batch_with_an_image_without_objects_trains(encoder_file):
    encoder = load_encoder(encoder_file, 32, attention=VITDET_4_BLOCKS, dynamic=True)
    model = build_detector(tiny_detectron2_architecture(encoder), encoder).train()
    image, mask = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), torch.zeros(1, 32, 32, dtype=torch.uint8)
    mask[:, 8:20, 8:24] = 1
    sample = DetectionSample(image, torch.tensor([[8.0, 8, 24, 20]]), torch.tensor([1]), mask)
    empty = DetectionSample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), mask[:0])
    for samples in ([sample, empty], [empty]):
        model.zero_grad()
        losses = model(samples)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        without_gradient = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without_gradient == []
    assert float(losses["loss_rpn_cls"]) > 0


def test_detections_are_in_pixels_of_the_image(encoder_file):
    encoder = load_encoder(encoder_file, 32, attention=VITDET_4_BLOCKS, dynamic=True)
    model = build_detector(tiny_detectron2_architecture(encoder), encoder).eval()
    model.rcnn.roi_heads.box_predictor.test_score_thresh = 0.0
    images = [torch.randint(0, 256, (3, *hw), dtype=torch.uint8) for hw in ((50, 90), (20, 16))]
    for detections, image in zip(model.detect(images), images, strict=True):
        height, width = image.shape[-2:]
        n = len(detections.boxes)
        assert 0 < n == len(detections.scores) == len(detections.labels) == len(detections.masks)
        assert detections.scores.diff().le(0).all()
        assert detections.boxes.min() >= 0
        assert detections.boxes[:, 2].max() <= width
        assert detections.boxes[:, 3].max() <= height
        assert coco_mask.decode(detections.masks).shape[:2] == (height, width)


def test_verbs_train_continue_evaluate_and_predict(toy_coco, encoder_file, tmp_path, capsys):
    out = tmp_path / "run"
    settings = {
        "model": encoder_file,
        "out": out,
        "engine": "detectron2",
        "data": {"root": str(toy_coco), "size": 48, "workers": 0},
        "attention": dataclasses.asdict(VITDET_4_BLOCKS),
        "detector": {**dataclasses.asdict(NARROW), "scales": list(NARROW.scales)},
        "train": {"steps": 3, "batch": 2, "lr": 1e-3, "warmup_steps": 1, "layer_decay": 0.8, "checkpoint_every": 2},
    }
    recipe = load(det_train.Recipe, None, [f"{key}={value}" for key, value in settings.items()])
    det_train.run(recipe)
    trained = (out / MODEL_FILE).read_bytes()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"} < {*metrics[0]}
    assert metrics[-1]["box_AP"] < 0.05  # after six images

    shutil.rmtree(out / "checkpoints" / "step-3")  # as if killed after step 2
    (out / MODEL_FILE).unlink()
    (out / "finished.json").unlink()
    det_train.run(recipe)
    assert (out / MODEL_FILE).read_bytes() == trained

    capsys.readouterr()
    data = CocoConfig(root=str(toy_coco))
    det_eval.run(det_eval.Recipe(model=str(out), data=data, json=True))
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["box_AP"] == pytest.approx(metrics[-1]["box_AP"])
    predictions = tmp_path / "predictions"
    det_predict.run(det_predict.Recipe(model=str(out), images=str(toy_coco / "val2017"), out=str(predictions)))
    assert len(list(predictions.glob("*.png"))) == 3


def test_boxes_alone_train_and_are_detected_without_masks(encoder_file):
    encoder = load_encoder(encoder_file, 32, attention=VITDET_4_BLOCKS, dynamic=True)
    detector = dataclasses.replace(NARROW, masks=False, score=0.0)
    architecture = dataclasses.replace(tiny_detectron2_architecture(encoder), detector=detector)
    model = build_detector(architecture, encoder).train()
    assert not any("mask" in name for name in model.state_dict())
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    losses = model([DetectionSample(image, torch.tensor([[8.0, 8, 24, 20]]), torch.tensor([1]), None)])
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    (detections,) = model.eval().detect([image])
    assert len(detections.boxes) > 0
    assert detections.masks is None


def test_images_are_padded_after_normalization_and_no_proposal_lies_in_the_padding(encoder_file):
    encoder = load_encoder(encoder_file, 32, attention=VITDET_4_BLOCKS, dynamic=True)
    model, inputs_seen, proposals = build_detector(tiny_detectron2_architecture(encoder), encoder).train(), [], []
    model.rcnn.backbone.register_forward_hook(lambda module, inputs, output: inputs_seen.extend(inputs[0]))
    model.rcnn.proposal_generator.register_forward_hook(lambda module, inputs, output: proposals.extend(output[0]))
    image, mask = torch.randint(1, 100, (3, 10, 20), dtype=torch.uint8), torch.zeros(1, 10, 20, dtype=torch.uint8)
    mask[:, 4:9, 3:14] = 1
    model([DetectionSample(image, torch.tensor([[3.0, 4, 14, 9]]), torch.tensor([1]), mask)])
    assert inputs_seen[0].shape == (3, 32, 32)
    assert (inputs_seen[0][:, 10:] == 0).all()
    assert (inputs_seen[0][:, :10, 20:] == 0).all()
    boxes = proposals[0].proposal_boxes.tensor
    assert len(boxes) > 0
    assert boxes[:, 2].max() <= 20
    assert boxes[:, 3].max() <= 10
