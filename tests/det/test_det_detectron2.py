"""Detection on detectron2: the encoder as its backbone, the configs, its own trainer, and the verbs' engine."""

# ruff: noqa: E402 (what needs detectron2 is imported after the look for it)

import dataclasses
import json
import logging
import shutil
import signal
from pathlib import Path

import pytest
import torch
from pycocotools import mask as coco_mask

from addp_core.base.errors import UserError
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.config import load
from addp_core.weights.checkpoint import MODEL_FILE, load_encoder, save_model
from det import eval as det_eval
from det import predict as det_predict
from det import train as det_train
from det.pyramid import FeaturePyramid
from tools.toy import toy

pytest.importorskip("detectron2", reason="detectron2 is not installed (it has no index release; see README)")
pytestmark = pytest.mark.filterwarnings("ignore")  # detectron2's own, of torch's deprecated names

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import SimpleFeaturePyramid, build_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from det.augment import Scene
from det.config import Category, CocoConfig, DetectorConfig, DetectorFile
from det.engines.detectron2 import build
from det.model import load_detector
from det.native import train_net
from det.native.backbone import EncoderBackbone
from det.native.lazy import cosine, parameter_groups

VITDET = AttentionConfig(window=2, global_blocks=2, relative="decomposed", class_token=False)
SMALL = DetectorConfig(channels=16, scales=(1.0, 0.5), convs=16, fc=32, proposals=50, samples=16)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    toy.run(toy.Recipe(out=str(out), only=["coco"], coco_train=8, coco_val=3, scene=48))
    return out / "coco"


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(0)
    save_model(Encoder(EncoderConfig(32, 4, 2), (32, 32), 8), path)
    return path


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """With all its weights away from where they start, so that none of them can hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return module


# -------------------- backbone and pyramid


def test_plain_backbone_gives_the_recognition_encoders_patch_tokens(encoder_file):
    images = torch.randn(2, 3, 48, 64)
    backbone = EncoderBackbone(encoder=load_encoder(encoder_file, 32, attention=AttentionConfig(), dynamic=True))
    expected = load_encoder(encoder_file, (48, 64)).forward_features(images)[:, 1:]
    tokens = backbone(images)["last_feat"]
    assert tokens.shape == (2, 32, 6, 8)
    torch.testing.assert_close(tokens.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=0)


def test_backbone_is_registered(encoder_file):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "EncoderBackbone"
    attention = {"window": 2, "global_blocks": 2, "relative": "decomposed", "class_token": False}
    cfg.MODEL.ENCODER = CfgNode({"source": str(encoder_file), "img_size": 32, "dynamic": True, "attention": attention})
    backbone = build_backbone(cfg)
    assert backbone.size_divisibility == backbone.output_shape()["last_feat"].stride == 8
    assert backbone.encoder.attention == VITDET
    assert backbone(torch.randn(1, 3, 40, 24))["last_feat"].shape == (1, 32, 5, 3)


def test_maps_equal_our_own_pyramids(encoder_file):
    encoder = shaken(load_encoder(encoder_file, 64, attention=VITDET, dynamic=True))
    theirs = shaken(
        SimpleFeaturePyramid(
            EncoderBackbone(encoder=encoder), "last_feat", 24, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), "LN"
        )
    ).eval()
    theirs.top_block.in_feature = "p4"
    ours = FeaturePyramid(load_encoder(encoder_file, 64, attention=VITDET, dynamic=True), 24).eval()
    ours.load_state_dict({name.replace("net.encoder.", "net."): v for name, v in theirs.state_dict().items()})
    images = torch.randn(1, 3, 48, 80)  # neither square nor whole windows
    with torch.no_grad():
        pairs = list(zip(ours(images).values(), theirs(images).values(), strict=True))
    assert [tuple(map_.shape[-2:]) for map_, _ in pairs] == [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    for found, expected in pairs:
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_checkpointing_changes_no_gradient(encoder_file):
    gradients = []
    for checkpointing in (False, True):
        encoder = load_encoder(encoder_file, 32, attention=VITDET, dynamic=True)
        backbone = EncoderBackbone(encoder=encoder, checkpointing=checkpointing).train()
        backbone(torch.ones(1, 3, 32, 32))["last_feat"].square().sum().backward()
        gradients.append(encoder.blocks[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


# -------------------- configs


@pytest.mark.parametrize(("name", "drop_path", "decay"), [("b", 0.1, 0.8), ("l", 0.4, 0.9)])
def test_configs_are_the_papers(name, drop_path, decay):
    cfg = LazyConfig.load(str(train_net.find_config(f"mask_rcnn_vitdet_{name}_100ep")))
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
    cfg = LazyConfig.load(str(train_net.find_config("mask_rcnn_vitdet_b_100ep")))
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
    rate = cosine(iterations=1000, warmup=100)
    found = [rate(step / 1000) for step in (0, 50, 100, 550, 1000 - 1e-6)]
    assert found == pytest.approx([0.001, 0.5005, 1.0, 0.5, 0.0], abs=1e-3)
    with pytest.raises(UserError, match=r"train.warmup: found 50, expected fewer"):
        cosine(iterations=50, warmup=50)


def test_rates_and_weight_decay(encoder_file):
    encoder = load_encoder(encoder_file, 32, attention=AttentionConfig(relative="decomposed"), dynamic=True)
    model = build(_file(encoder), encoder)
    options = {}
    for group in parameter_groups(model, base_lr=1.0, layer_decay=0.5):
        for parameter in group["params"]:
            options[id(parameter)] = group["lr"], group.get("weight_decay", "as the optimizer's")
    table = {name: options.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert not options
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
    assert {name: table[name] for name in expected} == expected


# -------------------- the verbs' engine


def _file(encoder: Encoder, size: int = 32) -> DetectorFile:
    categories = (Category(1, "one"), Category(3, "three"))
    return DetectorFile("detectron2", encoder.config, encoder.attention, 8, size, SMALL, categories)


def test_images_are_normalised_as_the_file_says(encoder_file):
    encoder = load_encoder(encoder_file, 32, attention=VITDET, dynamic=True)
    for name, mean in {"imagenet": 255 * 0.485, "half": 127.5}.items():
        model = build(dataclasses.replace(_file(encoder), normalisation=name), encoder)
        assert float(model.rcnn.pixel_mean[0]) == pytest.approx(mean)


def test_a_batch_with_an_image_without_objects_trains(encoder_file):
    encoder = load_encoder(encoder_file, 32, attention=VITDET, dynamic=True)
    model = build(_file(encoder), encoder).train()
    image, mask = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), torch.zeros(1, 32, 32, dtype=torch.uint8)
    mask[:, 8:20, 8:24] = 1
    scene = Scene(image, torch.tensor([[8.0, 8, 24, 20]]), torch.tensor([1]), mask)
    empty = Scene(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), mask[:0])
    for scenes in ([scene, empty], [empty]):
        model.zero_grad()
        losses = model(scenes)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
    assert float(losses["loss_rpn_cls"]) > 0


def test_detections_are_in_pixels_of_the_image(encoder_file):
    encoder = load_encoder(encoder_file, 32, attention=VITDET, dynamic=True)
    model = build(_file(encoder), encoder).eval()
    model.rcnn.roi_heads.box_predictor.test_score_thresh = 0.0
    images = [torch.randint(0, 256, (3, *hw), dtype=torch.uint8) for hw in ((50, 90), (20, 16))]
    for found, image in zip(model.detect(images), images, strict=True):
        height, width = image.shape[-2:]
        assert 0 < len(found.scores) == len(found.labels) == len(found.masks) == len(found.boxes)
        assert found.scores.diff().le(0).all()
        assert found.boxes.min() >= 0
        assert found.boxes[:, 2].max() <= width
        assert found.boxes[:, 3].max() <= height
        assert coco_mask.decode(found.masks).shape[:2] == (height, width)


def test_verbs_train_continue_evaluate_and_predict(coco, encoder_file, tmp_path, capsys):
    out = tmp_path / "run"
    settings = {
        "model": encoder_file,
        "out": out,
        "engine": "detectron2",
        "data": {"root": str(coco), "size": 48, "workers": 0},
        "attention": dataclasses.asdict(VITDET),
        "detector": {**dataclasses.asdict(SMALL), "scales": list(SMALL.scales)},
        "train": {"steps": 3, "batch": 2, "lr": 1e-3, "warmup_steps": 1, "layer_decay": 0.8, "checkpoint_every": 2},
    }
    recipe = load(det_train.Recipe, None, [f"{key}={value}" for key, value in settings.items()])
    det_train.run(recipe)
    trained = (out / MODEL_FILE).read_bytes()
    figures = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"} < {*figures[0]}
    assert figures[-1]["box_AP"] < 0.05  # it has seen six images

    shutil.rmtree(out / "checkpoints" / "step-3")  # as if killed after step 2
    (out / MODEL_FILE).unlink()
    (out / "finished.json").unlink()
    det_train.run(recipe)
    assert (out / MODEL_FILE).read_bytes() == trained

    capsys.readouterr()
    data = CocoConfig(root=str(coco))
    det_eval.run(det_eval.Recipe(model=str(out), data=data, json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["box_AP"] == pytest.approx(figures[-1]["box_AP"])
    det_predict.run(det_predict.Recipe(model=str(out), images=str(coco / "images"), out=str(tmp_path / "seen")))
    assert len(list((tmp_path / "seen").glob("*.png"))) == 11


# -------------------- detectron2's own trainer


@pytest.fixture
def small(coco, encoder_file, tmp_path) -> list[str]:
    """A command line of train_net that takes seconds; it writes into tmp_path."""
    overrides = {
        "model.backbone.net.encoder.source": encoder_file,
        "model.backbone.net.encoder.img_size": 48,
        "model.backbone.square_pad": 48,
        "model.roi_heads.batch_size_per_image": 8,
        "dataloader.coco.root": coco,
        "dataloader.train.total_batch_size": 2,
        "dataloader.train.num_workers": 0,
        "dataloader.train.mapper.augmentations.0.target_height": 48,
        "dataloader.train.mapper.augmentations.0.target_width": 48,
        "dataloader.train.mapper.augmentations.1.crop_size": "[48,48]",
        "dataloader.test.num_workers": 0,
        "dataloader.test.mapper.augmentations.0.max_size": 48,
        "train.output_dir": tmp_path / "out",
        "train.max_iter": 4,
        "train.warmup": 1,
        "train.checkpointer.period": 2,
        "train.log_period": 2,
    }
    config = ["--config-file", "mask_rcnn_vitdet_tiny_100ep"]
    yield [*config, *(f"{key}={value}" for key, value in overrides.items())]
    for name in ("detectron2", "fvcore"):  # detectron2's handlers of this run
        logging.getLogger(name).handlers.clear()


def test_trains_stops_continues_evaluates_and_exports(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    load = train_net.train_loader

    def load_and_interrupt(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return load(*arguments)

    monkeypatch.setattr(train_net, "train_loader", load_and_interrupt)
    with pytest.raises(SystemExit) as stopped:
        train_net.run(small)
    assert stopped.value.code == 0
    assert (out / "last_checkpoint").read_text() == "model_0000000.pth"
    monkeypatch.setattr(train_net, "train_loader", load)

    train_net.run(["--resume", *small])
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1, 3]
    assert lines[-1]["bbox/AP"] < 1  # percent: it has seen next to nothing
    assert lines[-1]["segm/AP"] < 1
    final = torch.load(out / "model_final.pth", weights_only=True)["model"]

    model = load_detector(out)  # what `addp det eval` and `predict` read
    assert [category.id for category in model.file.categories] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert all(torch.equal(value, final[name.removeprefix("rcnn.")]) for name, value in model.state_dict().items())
    (found,) = model.detect([torch.zeros(3, 40, 30, dtype=torch.uint8)])
    assert len(found.boxes) == len(found.masks)

    results = out / "evaluation" / "coco_instances_results.json"
    before = results.read_text()
    results.unlink()
    train_net.run(["--eval-only", *small, f"train.init_checkpoint={out}"])
    assert results.read_text() == before


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def test_wrong_input_is_one_line(small, tmp_path, capfd):
    torch.save({"model": {"a": torch.zeros(1)}, "bomb": Bomb()}, tmp_path / "bomb.pth")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    table = Encoder(EncoderConfig(32, 4, 2), (32, 32), 8, AttentionConfig(relative="table"))
    torch.nn.init.zeros_(table.pos_embed)
    torch.nn.init.normal_(table.blocks[0].relative.relative_position_bias_table)
    save_model(table, tmp_path / "beit.safetensors")
    weights = ["--eval-only", *small]
    cases = {
        "refused, unpickling it could run code": [*weights, f"train.init_checkpoint={tmp_path / 'bomb.pth'}"],
        "tensors are not this config's": [*weights, f"train.init_checkpoint={tmp_path / 'other.pth'}"],
        "train.init_checkpoint: missing": weights,
        "no such file or config; the configs are mask_rcnn_vitdet_b_100ep": ["--config-file", "nope"],
        "data.root: nowhere is not a folder": [*small, "dataloader.coco.root=nowhere"],
        "encoder.attention.relative=decomposed: model.backbone.net.encoder.source has its positions": [
            *small,
            f"model.backbone.net.encoder.source={tmp_path / 'beit.safetensors'}",
        ],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit) as left:
            train_net.run(arguments)
        assert left.value.code == 2
        captured = capfd.readouterr()
        assert message in captured.err.splitlines()[-1]
        assert "boom" not in captured.out
