"""Configs of detectron2's model zoo over our encoders, quick enough for a CPU."""

from pathlib import Path

import detectron2
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator

import det

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
