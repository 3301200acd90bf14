"""Configs of detectron2's model zoo over our encoders, quick enough for a CPU."""

import json
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

import det
from addp_core.recipes.cli import main
from det.model import Detections, Detector, load_detector, save_detector

ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def zoo_config(name: str, source: Path | str, out: Path | str = "", **encoder) -> CfgNode:
    """Return a config of the zoo over the encoder `source`, with what makes it quick on a CPU."""
    cfg = get_cfg()
    det.add_encoder_config(cfg)
    cfg.merge_from_file(str(ZOO / name))
    cfg.MODEL.BACKBONE.NAME = "EncoderPyramid"
    cfg.MODEL.ENCODER.merge_from_other_cfg(CfgNode({"source": str(source), "img_size": 64, **encoder}))
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = "cpu", str(out), ""
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 10
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("zoo_train",), ("zoo_val",)
    cfg.INPUT.MASK_FORMAT = "bitmask"  # some toy masks are run-length encoded
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = (60, 68), 60, 90
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 2
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.TEST.EVAL_PERIOD = 2, 1e-3, 0
    return cfg


class Trainer(DefaultTrainer):
    """detectron2's trainer with its own COCO evaluation."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def trained_in(out: Path, cfg: CfgNode) -> Trainer:
    """Train as detectron2's `default_setup` leaves a run, with datasets that only the user's script registers."""
    out.mkdir()
    (out / "config.yaml").write_text(cfg.dump().replace("zoo_", "theirs_"))
    trainer = Trainer(cfg)
    trainer.train()
    return trainer


def check_that_the_run_is_read(
    out: Path, trainer: Trainer, pretrained: list[Path], toy_coco: Path, capsys
) -> tuple[Detections, Instances, str]:
    """Check that what detectron2 trained gives the same boxes and average precision here, without its pretrained files.

    Returns what is found in an image here and by detectron2, and the messages of `addp det eval`.
    """
    cfg = trainer.cfg.clone()
    expected = trainer.test(cfg, trainer.model)
    cfg.MODEL.WEIGHTS = str(out / "model_final.pth")
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    instances = DefaultPredictor(cfg)(image.permute(1, 2, 0).numpy()[:, :, ::-1])["instances"]  # takes BGR
    for file in pretrained:
        file.unlink()
    (found,) = load_detector(out).detect([image])
    torch.testing.assert_close(found.boxes, instances.pred_boxes.tensor)
    torch.testing.assert_close(found.scores, instances.scores)
    capsys.readouterr()
    assert main(["det", "eval", f"model={out}", f"data={toy_coco}", "json=true"]) == 0
    captured = capsys.readouterr()
    assert 100 * json.loads(captured.out)["box_AP"] == pytest.approx(expected["bbox"]["AP"], abs=1e-6)
    return found, instances, captured.err


def exported_and_back(model: Detector, folder: Path) -> tuple[nn.Module, Detector]:
    """Export a detector to detectron2; return it as its lazyconfig_train_net.py loads it, and as we do."""
    save_detector(model, folder / "ours.safetensors")
    out = folder / "d2"
    assert main(["export", f"model={folder / 'ours.safetensors'}", f"out={out}", "layout=detectron2"]) == 0
    cfg = LazyConfig.load(str(out / "config.yaml"))
    theirs = instantiate(cfg.model).eval()
    DetectionCheckpointer(theirs).load(cfg.train.init_checkpoint)
    again = load_detector(out)
    assert all(torch.equal(v, model.rcnn.state_dict()[name]) for name, v in again.model.state_dict().items())
    return theirs, again


def model_from_export(out: Path) -> nn.Module:
    """Return Mask R-CNN of the zoo with the encoder that `addp export layout=detectron2` wrote to a folder."""
    cfg = get_cfg()
    det.add_encoder_config(cfg)
    cfg.merge_from_file(str(ZOO / MASK))
    cfg.merge_from_file(str(out / "config.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
