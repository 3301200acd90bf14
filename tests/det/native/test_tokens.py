"""Detectors of detectron2's own way over an encoder that reads token ids: the zoo's configs, LazyConfigs, export."""

# ruff: noqa: E402 (modules that need detectron2 are imported after the check that it is installed)

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from addp_core.networks.classifier import normalize
from addp_core.recipes.cli import main
from addp_core.weights.encoders import load_encoder

pytest.importorskip("detectron2", reason="detectron2 is not installed; `addp doctor` shows the command to install it")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("toy_sets")]  # deprecated names of torch

from checks import assert_user_error
from detectron2.modeling import build_backbone
from tiny_detectors import VITDET_4_BLOCKS, tiny_detectron2_architecture
from transfers import write_tiny_mage
from zoo import MASK, check_that_the_run_is_read, exported_and_back, model_from_export, trained_in, zoo_config

from det.config import describe_encoder
from det.model import build_detector, load_detector
from det.native.train_net import run


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder with a run of `addp predictor` for images of 32 pixels, and its tokenizer of stride 8."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tiny_mage(folder, depth=4, stride=8, side=4)
    return folder


def test_a_zoo_config_over_tokens_is_trained_and_evaluated_without_the_pretrained_files(
    root, toy_coco, tmp_path, capsys
):
    moved = tmp_path / "pretrained"
    moved.mkdir()
    source, tokenizer = moved / "mage.safetensors", moved / "tokenizer.safetensors"
    source.write_bytes((root / "mage" / "model.safetensors").read_bytes())
    tokenizer.write_bytes((root / "tokenizer.safetensors").read_bytes())
    out = tmp_path / "out"
    trainer = trained_in(out, zoo_config(MASK, source, out, tokenizer=str(tokenizer), input="token"))
    check_that_the_run_is_read(out, trainer, [source, tokenizer], toy_coco, capsys)
    assert load_encoder(out / "model_final.pth", 32, attention=VITDET_4_BLOCKS).kind == "token_encoder"


def backbone_config(root: Path, **encoder):
    """Return a config of an `EncoderBackbone` over the ids of the tokenizer in `root`."""
    cfg = zoo_config(MASK, **{"source": root / "mage", "img_size": 32, **encoder})
    cfg.MODEL.BACKBONE.NAME = "EncoderBackbone"
    return cfg


@pytest.mark.parametrize("normalisation", ["imagenet", "half"])
def test_the_backbones_map_is_the_features_of_classification(root, normalisation):
    plain = {"window": 0, "relative": "none", "class_token": True}
    cfg = backbone_config(root, attention=plain)
    if normalisation == "half":
        cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [127.5] * 3
    backbone = build_backbone(cfg).eval()
    expected = load_encoder(root / "mage", 32, normalisation=normalisation)
    images = normalize(torch.rand(2, 3, 32, 32), expected.mean, expected.std)
    torch.testing.assert_close(backbone.encoder.mean, expected.mean)
    assert torch.equal(backbone.encoder.tokenize(images), expected.tokenize(images))
    torch.testing.assert_close(backbone(images)["last_feat"], expected.forward_maps(images, [-1])[0])
    assert backbone(torch.randn(1, 3, 40, 64))["last_feat"].shape == (1, 32, 5, 8)  # of any size


def test_a_detector_over_tokens_is_exported_to_detectron2_and_back(root, tmp_path):
    encoder = load_encoder(root / "mage", 32, attention=VITDET_4_BLOCKS, dynamic=True)
    architecture = tiny_detectron2_architecture(encoder)
    architecture = type(architecture)(**{**vars(architecture), **describe_encoder(encoder)})
    torch.manual_seed(0)
    model = build_detector(architecture, encoder).eval()
    theirs, _ = exported_and_back(model, tmp_path)
    images = torch.randn(1, 3, 32, 32)
    found, expected = (m.backbone(images) for m in (theirs, model.rcnn))
    assert all(torch.equal(found[name], map_) for name, map_ in expected.items())


def test_an_encoder_over_tokens_is_exported_as_the_weights_of_a_detector(root, tmp_path):
    out = tmp_path / "d2"
    assert main(["export", f"model={root / 'mage'}", f"out={out}", "layout=detectron2", "img_size=64"]) == 0
    assert "tokens" in yaml.safe_load((out / "config.yaml").read_text())["MODEL"]["ENCODER"]
    model = model_from_export(out)
    expected = load_encoder(root / "mage", 64).tokenizer.state_dict()
    found = model.backbone.net.encoder.tokenizer.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_train_net_over_tokens(root, toy_coco, tmp_path):
    overrides = {
        "model.backbone.net.encoder.source": root / "mage",
        "model.backbone.net.encoder.img_size": 48,
        "model.backbone.square_pad": 48,
        "model.roi_heads.batch_size_per_image": 8,
        "dataloader.coco.root": shutil.copytree(toy_coco, tmp_path / "coco"),  # detectron2 registers a folder once
        "dataloader.train.total_batch_size": 2,
        "dataloader.train.num_workers": 0,
        "dataloader.train.mapper.augmentations.0.target_height": 48,
        "dataloader.train.mapper.augmentations.0.target_width": 48,
        "dataloader.train.mapper.augmentations.1.crop_size": "[48,48]",
        "dataloader.test.num_workers": 0,
        "dataloader.test.mapper.augmentations.0.max_size": 48,
        "train.output_dir": tmp_path / "out",
        "train.max_iter": 1,
        "train.warmup": 0,
    }
    run(["--config-file", "mask_rcnn_vitdet_tiny_100ep", *(f"{key}={value}" for key, value in overrides.items())])
    assert load_detector(tmp_path / "out").architecture.token_encoder.tokenizer.stride == 8
    assert load_detector(tmp_path / "out" / "model_final.pth").architecture.token_encoder.tokenizer.stride == 8


def test_mistakes_are_told_in_one_line(root):
    mistakes = {
        "input=token: .* is a size, which has no tokenizer": {"source": "tiny", "init": "random", "input": "token"},
        "reads token ids; expected an encoder of pixels": {"input": "pixels"},
    }
    for message, options in mistakes.items():
        error = assert_user_error(lambda options=options: build_backbone(backbone_config(root, **options)))
        assert re.search(message, error)
    arch = {"width": 32, "depth": 1, "heads": 2}
    cfg = backbone_config(root, source="", arch=arch, tokens={"tokenizer": {"codebook": 24}})
    assert_user_error(lambda: build_backbone(cfg), "MODEL.ENCODER.tokens.vocabulary: Field required")
