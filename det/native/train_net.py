"""ViTDet over the suite's encoder with nothing but detectron2's own trainer, data loading and evaluation.

    python -m det.native.train_net --config-file mask_rcnn_vitdet_b_100ep [--num-gpus 8] [--resume] [--eval-only] \
        [key=value]

A config is a LazyConfig: one of det/native/configs/ by its name, or a file. `model.backbone.net.encoder.source` names
what the encoder starts from, `train.init_checkpoint` a whole detector (for --eval-only). `addp det train` reads the
same COCO files by YAML recipes and continues bit for bit; this is for those who know detectron2.
"""

import argparse
import logging
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import (
    AMPTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig
from torch import nn
from torch.multiprocessing import ProcessExitedException

from addp_core.base.errors import UserError
from addp_core.base.rng import seed_for
from addp_core.networks.encoder import Encoder
from addp_core.training.engine import Signals
from addp_core.weights.checkpoint import MODEL_FILE, read_tensors
from addp_core.weights.start import check_positions
from det.config import Category, DetectorConfig, DetectorFile
from det.engines.detectron2 import build
from det.model import save_detector

log = logging.getLogger("detectron2.addp")

CONFIGS = Path(__file__).parent / "configs"
RCNN = "rcnn."  # begins the names in the files of `addp det train`


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's, for its own checkpoints alone, read as plain tensors: nothing in them could run code."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        return torch.load(filename, map_location="cpu", weights_only=True)


class StopOnSignal(HookBase):
    """Where a signal has come to any process, writes a checkpoint after the iteration and leaves: with 0 for
    requeueing, with 1 for an interrupt.
    """

    def __init__(self, signals: Signals, checkpointer: SafeCheckpointer):
        self.signals, self.checkpointer = signals, checkpointer

    def after_step(self) -> None:
        wishes = comm.all_gather((self.signals.stop, self.signals.interrupt))
        if any(map(any, wishes)) and self.trainer.iter + 1 < self.trainer.max_iter:
            self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
            log.info("stopped by a signal after iteration %d; --resume continues", self.trainer.iter)
            raise SystemExit(1 if any(interrupt for _, interrupt in wishes) else 0)


def train(cfg: DictConfig, resume: bool) -> None:
    """Train to `train.max_iter`, or continue; ends with model_final.pth and, for `addp det eval` and `predict`,
    model.safetensors.
    """
    model = instantiate(cfg.model).to(cfg.train.device)
    if cfg.train.init_checkpoint:
        load_weights(model, cfg.train.init_checkpoint)
    start = "model.backbone.net.encoder"
    check_positions(model.backbone.net.encoder, f"{start}.source", f"{start}.attention.relative")
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    parallel = create_ddp_model(model, **cfg.train.ddp)
    if cfg.train.amp.enabled:
        trainer = AMPTrainer(parallel, None, optimizer, precision=getattr(torch, cfg.train.amp.dtype))
    else:
        trainer = SimpleTrainer(parallel, None, optimizer)
    checkpointer = SafeCheckpointer(parallel, cfg.train.output_dir, trainer=trainer)
    main = comm.is_main_process()
    with Signals() as signals:
        trainer.register_hooks(
            [
                hooks.IterationTimer(),
                hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
                hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
                hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, parallel)),
                hooks.PeriodicWriter(
                    default_writers(cfg.train.output_dir, cfg.train.max_iter), period=cfg.train.log_period
                )
                if main
                else None,
                StopOnSignal(signals, checkpointer),
            ]
        )
        start = 0
        if resume and checkpointer.has_checkpoint():
            checkpointer.resume_or_load("", resume=True)
            start = trainer.iter + 1
        trainer.reset_data_loader(lambda: train_loader(cfg, start))
        trainer.train(start, cfg.train.max_iter)
    if main:
        export(cfg, model)


def train_loader(cfg: DictConfig, start: int) -> Any:
    """The loader from iteration `start` on. detectron2 shuffles from the seed alone: a continued run would see its
    first images a second time.
    """
    options = dict(cfg.dataloader.train)
    dataset = options["dataset"] = instantiate(options["dataset"])
    options["sampler"] = TrainingSampler(len(dataset), seed=seed_for(cfg.train.seed, "sampler", start))
    seed_all_rng(seed_for(cfg.train.seed, "continue", start, comm.get_rank()) % 2**31)
    return instantiate(options)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """detectron2's figures, in percent; also printed."""
    figures = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    print_csv_format(figures)
    return figures


def evaluate_only(cfg: DictConfig) -> None:
    """Figures of the detector `train.init_checkpoint`."""
    if not cfg.train.init_checkpoint:
        raise UserError("train.init_checkpoint: missing; expected the detector to evaluate")
    model = instantiate(cfg.model).to(cfg.train.device)
    load_weights(model, cfg.train.init_checkpoint)
    evaluate(cfg, create_ddp_model(model, **cfg.train.ddp))


def load_weights(model: nn.Module, source: str) -> None:
    """A whole detector: a checkpoint of this program, or a run of either or its file. UserError where it does not
    fit.
    """
    state = {name.removeprefix(RCNN): value for name, value in read_tensors(source).items()}
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    strange = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if strange:
        names = ", ".join(strange[:3])
        raise UserError(
            f"train.init_checkpoint={source}: {len(strange)} tensors are not this config's ({names}); expected a "
            "detector of the same config; what the encoder starts from is model.backbone.net.encoder.source"
        )
    model.load_state_dict(state)


def export(cfg: DictConfig, model: nn.Module) -> None:
    """model.safetensors with its architecture, unless the config is not ViTDet's Mask R-CNN any more."""
    rcnn, path = cfg.model, Path(cfg.train.output_dir) / MODEL_FILE
    metadata = MetadataCatalog.get(instantiate(cfg.dataloader.test.dataset.names))
    ids = metadata.thing_dataset_id_to_contiguous_id
    detector = DetectorConfig(
        channels=rcnn.backbone.out_channels,
        scales=tuple(rcnn.backbone.scale_factors),
        convs=rcnn.roi_heads.mask_head.conv_dims[0],
        fc=rcnn.roi_heads.box_head.fc_dims[0],
        proposals=rcnn.proposal_generator.post_nms_topk[1],
        samples=rcnn.roi_heads.batch_size_per_image,
        score=rcnn.roi_heads.box_predictor.test_score_thresh,
        detections=rcnn.roi_heads.box_predictor.test_topk_per_image,
    )
    encoder: Encoder = model.backbone.net.encoder
    categories = tuple(Category(id_, metadata.thing_classes[place]) for id_, place in ids.items())
    parts = (encoder.config, encoder.attention, encoder.patch_size, rcnn.backbone.square_pad, detector, categories)
    file = DetectorFile("detectron2", *parts)
    whole = build(file, deepcopy(encoder)).to(cfg.train.device)
    try:
        whole.load_state_dict({RCNN + name: value for name, value in model.state_dict().items()})
    except RuntimeError:
        log.warning("%s: not written, the model is not the config's Mask R-CNN; model_final.pth holds it", path)
        return
    save_detector(whole, path)


def main(args: argparse.Namespace) -> None:
    """What each process does; leaves with 2 where the input is wrong."""
    try:
        cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
        if not torch.cuda.is_available():
            cfg.train.device, cfg.train.amp.enabled = "cpu", False
            cfg.train.ddp.update(fp16_compression=False, device_ids=None)
        default_setup(cfg, args)
        if args.eval_only:
            evaluate_only(cfg)
        else:
            train(cfg, args.resume)
    except UserError as error:
        if comm.is_main_process():
            sys.stderr.write(f"addp: {error}\n")
        raise SystemExit(2) from error


def find_config(name: str) -> Path:
    """A config by its name or path. UserError where there is none."""
    known = {path.stem: path for path in CONFIGS.glob("*.py")}
    if name in known or Path(name).is_file():
        return known.get(name, Path(name))
    raise UserError(f"--config-file {name}: no such file or config; the configs are {', '.join(sorted(known))}")


def run(argv: list[str] | None = None) -> None:
    """The command line. Leaves by SystemExit unless all went well: 2 where the input is wrong, 0 or 1 on a signal."""
    args = default_argument_parser(__doc__).parse_args(argv)
    machines = {"num_machines": args.num_machines, "machine_rank": args.machine_rank, "dist_url": args.dist_url}
    try:
        args.config_file = str(find_config(args.config_file))
        launch(main, args.num_gpus, **machines, args=(args,))
    except UserError as error:
        sys.stderr.write(f"addp: {error}\n")
        raise SystemExit(2) from error
    except ProcessExitedException as error:  # one of several
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    run()
