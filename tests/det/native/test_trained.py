"""Detectors between detectron2 and us: `addp export layout=detectron2`, and what detectron2's trainers wrote."""

# ruff: noqa: E402 (modules that need detectron2 are imported after the check that it is installed)

from pathlib import Path

import pytest
import torch
import yaml

from addp_core.base.errors import UserError
from addp_core.recipes.cli import main

pytest.importorskip("detectron2", reason="detectron2 is not installed; `addp doctor` shows the command to install it")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("toy_sets")]  # deprecated names of torch

from detectron2.config import LazyConfig
from detectron2.data.datasets import load_coco_json
from omegaconf import OmegaConf
from tiny_detectors import VITDET_4_BLOCKS, tiny_detector, tiny_detectron2_architecture
from zoo import (
    MASK,
    RETINANET,
    check_that_the_run_is_read,
    exported_and_back,
    model_from_export,
    trained_in,
    zoo_config,
)

from addp_core.weights.encoders import load_encoder
from det.model import build_detector, load_detector, save_detector
from det.native.export import lazy_model
from det.native.safe_lazy import read_yaml


@pytest.mark.parametrize("name", [MASK, RETINANET])
def test_what_detectron2_trained_is_evaluated_and_predicts_as_in_detectron2(
    name, encoder_file, toy_coco, tmp_path, capsys
):
    source = tmp_path / "pretrained.safetensors"
    source.write_bytes(encoder_file.read_bytes())
    out = tmp_path / "out"
    trainer = trained_in(out, zoo_config(name, source, out))
    found, instances, messages = check_that_the_run_is_read(out, trainer, [source], toy_coco, capsys)
    assert "tell its 10 categories; took those of the dataset" in messages
    assert (found.masks is not None) == (name == MASK)
    if name == MASK:
        assert all(torch.equal(found.mask(i), mask) for i, mask in enumerate(instances.pred_masks))

    images = f"images={toy_coco / 'val2017'}"
    assert main(["det", "predict", f"model={out / 'model_final.pth'}", images, f"out={tmp_path / 'drawn'}"]) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 3


def detector_of_detectron2(encoder_file: Path):
    encoder = load_encoder(encoder_file, 32, attention=VITDET_4_BLOCKS, dynamic=True)
    torch.manual_seed(0)
    model = build_detector(tiny_detectron2_architecture(encoder), encoder).eval()
    model.rcnn.roi_heads.box_predictor.test_score_thresh = 0.05
    return model


def test_an_exported_detector_is_the_same_in_detectron2_and_back(encoder_file, tmp_path):
    model = detector_of_detectron2(encoder_file)
    theirs, again = exported_and_back(model, tmp_path)
    inputs = [{"image": torch.rand(3, 32, 24) * 255}]
    with torch.no_grad():
        (found,), (expected,) = (m.inference(inputs, do_postprocess=False) for m in (theirs, model.rcnn))
    assert len(expected) > 0
    for field in ("scores", "pred_classes", "pred_masks"):
        torch.testing.assert_close(found.get(field), expected.get(field))
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)

    assert again.architecture.categories == model.architecture.categories
    assert load_encoder(tmp_path / "d2" / "model_final.pth", 32, attention=VITDET_4_BLOCKS).patch_size == 8


def test_an_exported_encoder_is_the_weights_of_a_config_of_the_zoo(encoder_file, tmp_path, caplog):
    out = tmp_path / "d2"
    assert main(["export", f"model={encoder_file}", f"out={out}", "layout=detectron2", "img_size=64"]) == 0
    model = model_from_export(out)
    expected = load_encoder(encoder_file, 64, attention=model.backbone.net.encoder.attention)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.backbone.net.encoder.state_dict()[name], value), name
    with pytest.raises(UserError, match="holds a backbone without the heads of a detector"):
        load_detector(out)


def test_detectors_of_torchvision_and_unsafe_configs_are_refused_in_one_line(encoder_file, tmp_path, capsys):
    save_detector(tiny_detector(), tmp_path / "tv.safetensors")
    out = tmp_path / "d2"
    assert main(["export", f"model={tmp_path / 'tv.safetensors'}", f"out={out}", "layout=detectron2"]) == 2
    assert "expected one that was trained with engine=detectron2" in capsys.readouterr().err.splitlines()[-1]

    model = detector_of_detectron2(encoder_file)
    out.mkdir(exist_ok=True)
    torch.save({"model": model.rcnn.state_dict()}, out / "model_final.pth")
    lazy = lazy_model(model.architecture, model.rcnn.backbone.net.encoder.architecture)
    LazyConfig.save(OmegaConf.create({"model": lazy}), str(out / "config.yaml"))
    assert load_detector(out).names_assumed
    config = read_yaml(out / "config.yaml")
    config["model"]["backbone"]["top_block"] = {"_target_": "os.system", "command": "echo boom"}
    (out / "config.yaml").write_text(yaml.dump(config))
    with pytest.raises(UserError, match=r"refused to call os\.system"):
        load_detector(out)
    (out / "config.yaml").write_text("model: !!python/object/apply:os.system ['echo boom']\n")
    with pytest.raises(UserError, match="not a config of plain values"):
        load_detector(out)
    torch.save({"model": {"roi_heads.x": torch.zeros(1)}}, out / "model_final.pth")
    (out / "config.yaml").write_text("MODEL: {}\n")
    with pytest.raises(UserError, match="does not tell the architecture of our encoder"):
        load_detector(out)


def test_registered_names_of_coco_read_a_toy_set_with_its_names(tmp_path):
    toy = ["toy", f"out={tmp_path}", "only=[coco]", "coco_train=3", "coco_val=1", "scene=48", "coco_names=true"]
    assert main(toy) == 0
    annotations = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    records = load_coco_json(str(annotations), str(tmp_path / "coco" / "train2017"), "coco_2017_train")
    assert len(records) == 3
    assert Path(records[0]["file_name"]).is_file()
