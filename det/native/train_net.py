"""Trains ViTDet over the suite's encoder with detectron2's own trainer, data loading and evaluation.

    python -m det.native.train_net --config-file mask_rcnn_vitdet_b_100ep [--num-gpus 8] [--resume] [--eval-only] \
        [key=value]

--config-file takes the name of a LazyConfig in det/native/configs/, or a file. `model.backbone.net.encoder.source` is
the checkpoint of the encoder; `train.init_checkpoint` is that of a detector (for --eval-only), or of an encoder too.

This program is for those who work with detectron2. `addp det train` reads the same COCO files, is configured by YAML
recipes and continues an interrupted run bit for bit.
"""

import argparse
import contextlib
import logging
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

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
from addp_core.networks.encoder import TransformerEncoder
from addp_core.training.signals import STOP_SIGNALS, StopSignals
from addp_core.weights.architectures import NORMALISATION
from addp_core.weights.files import MODEL_FILE, read_file, read_tensors
from addp_core.weights.pretrained import check_positions
from det.config import DetectorArchitecture, DetectorConfig, describe_encoder
from det.model import build_detector, mismatched_tensors, save_detector

log = logging.getLogger("detectron2.addp")

CONFIGS = Path(__file__).parent / "configs"
MODEL_PREFIX = "rcnn."  # of the tensor names in the files of `addp det train`


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, restricted to plain tensors, so that no checkpoint can run code."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        return torch.load(filename, map_location="cpu", weights_only=True)


class StopOnSignal(HookBase):
    """If any process has received a signal, saves a checkpoint after the iteration and exits: with 0 for requeueing,
    with 1 after an interrupt.
    """

    def __init__(self, signals: StopSignals, checkpointer: SafeCheckpointer):
        self.signals, self.checkpointer = signals, checkpointer

    def after_step(self) -> None:
        requests = comm.all_gather((self.signals.stop, self.signals.interrupt))
        if any(map(any, requests)) and self.trainer.iter + 1 < self.trainer.max_iter:
            self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
            log.info("stopped by a signal after iteration %d; continue with --resume", self.trainer.iter)
            raise SystemExit(1 if any(interrupt for _, interrupt in requests) else 0)


class SignalProofLoader:
    """A data loader whose workers receive no signals: the group of processes receives what `timeout`, a terminal or
    Slurm sends, and only the training process handles it, which needs its workers to finish its step.

    The workers inherit blocked signals from this process, which blocks them while the first batch starts the workers.
    """

    def __init__(self, loader: Any):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            batches = iter(self.loader)
            first = next(batches, None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if first is not None:
            yield first
            yield from batches


def train(cfg: DictConfig, resume: bool) -> None:
    """Train to `train.max_iter`, or continue a run.

    Writes model_final.pth, and model.safetensors for `addp det eval` and `predict`.
    """
    model = instantiate(cfg.model).to(cfg.train.device)
    if cfg.train.init_checkpoint:
        load_weights(model, cfg.train.init_checkpoint)
    key = "model.backbone.net.encoder"
    check_positions(model.backbone.net.encoder, f"{key}.source", f"{key}.attention.relative")
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    parallel = create_ddp_model(model, **cfg.train.ddp)
    if cfg.train.amp.enabled:
        trainer = AMPTrainer(parallel, None, optimizer, precision=getattr(torch, cfg.train.amp.dtype))
    else:
        trainer = SimpleTrainer(parallel, None, optimizer)
    checkpointer = SafeCheckpointer(parallel, cfg.train.output_dir, trainer=trainer)
    is_main = comm.is_main_process()
    with StopSignals() as signals:
        trainer.register_hooks(
            [
                hooks.IterationTimer(),
                hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
                hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
                hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, parallel)),
                hooks.PeriodicWriter(
                    default_writers(cfg.train.output_dir, cfg.train.max_iter), period=cfg.train.log_period
                )
                if is_main
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
    if is_main:
        export(cfg, model)


def train_loader(cfg: DictConfig, start: int) -> Any:
    """Return the data loader from iteration `start` on.

    The order of images depends on `start` as well as on the seed; detectron2's sampler depends on the seed alone, so a
    continued run would see its first images a second time.
    """
    options = dict(cfg.dataloader.train)
    dataset = options["dataset"] = instantiate(options["dataset"])
    options["sampler"] = TrainingSampler(len(dataset), seed=seed_for(cfg.train.seed, "sampler", start))
    seed_all_rng(seed_for(cfg.train.seed, "continue", start, comm.get_rank()) % 2**31)
    return SignalProofLoader(instantiate(options))


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Print and return detectron2's metrics, in percent."""
    loader = SignalProofLoader(instantiate(cfg.dataloader.test))
    metrics = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    print_csv_format(metrics)
    return metrics


def evaluate_only(cfg: DictConfig) -> None:
    """Evaluate the detector `train.init_checkpoint`."""
    if not cfg.train.init_checkpoint:
        raise UserError("train.init_checkpoint: missing; expected the checkpoint of the detector to evaluate")
    model = instantiate(cfg.model).to(cfg.train.device)
    load_weights(model, cfg.train.init_checkpoint)
    evaluate(cfg, create_ddp_model(model, **cfg.train.ddp))


def move_encoder(cfg: DictConfig) -> None:
    """Make `train.init_checkpoint` the source of the encoder if it is a pretrained encoder and no detector."""
    source, net = cfg.train.init_checkpoint, cfg.model.backbone.net
    if not source or any(name.removeprefix(MODEL_PREFIX).startswith("backbone.") for name in read_tensors(source)):
        return
    log.info("train.init_checkpoint=%s: no detector; read as model.backbone.net.encoder.source", source)
    net.encoder.source, cfg.train.init_checkpoint = source, ""


def load_weights(model: nn.Module, source: str) -> None:
    """Load a complete detector from a checkpoint of this program, or from the run or the model file of either program.

    Raises UserError if its tensors do not match the model's, or its images were normalized in another way.
    """
    content = read_file(source)
    state = {name.removeprefix(MODEL_PREFIX): value for name, value in content.state.items()}
    mismatched = mismatched_tensors(model, state)
    if mismatched:
        names = ", ".join(mismatched[:3])
        raise UserError(
            f"train.init_checkpoint={source}: {len(mismatched)} tensors do not match this config's ({names}); expected "
            "a detector of the same config; for the encoder's checkpoint use model.backbone.net.encoder.source"
        )
    stated = ((content.description or {}).get("architecture") or {}).get("normalisation")
    if stated is not None and stated != normalisation_of(model):
        mean, std = ([round(255 * value, 3) for value in part] for part in NORMALISATION[stated])
        raise UserError(
            f"train.init_checkpoint={source}: was trained on images of another normalization; expected "
            f"model.pixel_mean={mean} model.pixel_std={std}"
        )
    model.load_state_dict(state)


def normalisation_of(model: Any) -> str | None:
    """Return the key of `NORMALISATION` with the mean and std of a detectron2 model; None if there is none."""
    values = [part.flatten().cpu() / 255 for part in (model.pixel_mean, model.pixel_std)]
    for key, parts in NORMALISATION.items():
        if all(torch.allclose(value, torch.tensor(part), atol=1e-4) for value, part in zip(values, parts, strict=True)):
            return key
    return None


def export(cfg: DictConfig, model: nn.Module) -> None:
    """Write model.safetensors with its architecture, unless the model is no longer ViTDet's Mask R-CNN, or the file
    could not state the mean and std of its images.
    """
    path = Path(cfg.train.output_dir) / MODEL_FILE
    encoder = cast(TransformerEncoder, cast(Any, model).backbone.net.encoder)
    normalisation = normalisation_of(model)
    if normalisation is None:
        log.warning("%s: not written; it cannot say model.pixel_mean and model.pixel_std, see model_final.pth", path)
        return
    detector = build_detector(architecture_of(cfg, encoder, normalisation), deepcopy(encoder)).to(cfg.train.device)
    try:
        detector.load_state_dict({MODEL_PREFIX + name: value for name, value in model.state_dict().items()})
    except RuntimeError:
        log.warning("%s: not written; the model is not the config's Mask R-CNN, see model_final.pth", path)
        return
    save_detector(detector, path)


def architecture_of(cfg: DictConfig, encoder: TransformerEncoder, normalisation: str) -> DetectorArchitecture:
    """Return the architecture that a config of ViTDet's Mask R-CNN describes.

    normalisation: a key of `NORMALISATION`.
    """
    rcnn = cfg.model
    metadata = MetadataCatalog.get(instantiate(cfg.dataloader.test.dataset.names))
    return DetectorArchitecture(
        engine="detectron2",
        **describe_encoder(encoder),
        size=rcnn.backbone.square_pad,
        detector=DetectorConfig(
            channels=rcnn.backbone.out_channels,
            scales=tuple(rcnn.backbone.scale_factors),
            convs=rcnn.roi_heads.mask_head.conv_dims[0],
            fc=rcnn.roi_heads.box_head.fc_dims[0],
            proposals=rcnn.proposal_generator.post_nms_topk[1],
            samples=rcnn.roi_heads.batch_size_per_image,
            score=rcnn.roi_heads.box_predictor.test_score_thresh,
            detections=rcnn.roi_heads.box_predictor.test_topk_per_image,
        ),
        categories=metadata.categories,
        normalisation=cast(Any, normalisation),
        interpolation="bilinear",  # as in detectron2's data loading
    )


def main(args: argparse.Namespace) -> None:
    """Train or evaluate in each process; exits with 2 if the user's input is wrong."""
    try:
        cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
        if not torch.cuda.is_available():
            cfg.train.device, cfg.train.amp.enabled = "cpu", False
            cfg.train.ddp.update(fp16_compression=False, device_ids=None)
        default_setup(cfg, args)
        if args.eval_only:
            evaluate_only(cfg)
        else:
            move_encoder(cfg)
            train(cfg, args.resume)
    except UserError as error:
        if comm.is_main_process():
            sys.stderr.write(f"addp: {error}\n")
        raise SystemExit(2) from error
    finally:
        end_workers()


def end_workers() -> None:
    """End the workers of loaders that are still referenced: Python's exit would wait for them forever, because they
    do not receive its signal.
    """
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports workers that were killed
    for worker in workers:
        worker.kill()


def find_config(name: str) -> Path:
    """Return the path of a config given its name or path. Raises UserError if there is none."""
    configs = {path.stem: path for path in CONFIGS.glob("*.py")}
    if name in configs or Path(name).is_file():
        return configs.get(name, Path(name))
    raise UserError(f"--config-file {name}: no such file or config; the configs are {', '.join(sorted(configs))}")


def run(argv: list[str] | None = None) -> None:
    """Run the command line; raises SystemExit unless it succeeds: 2 for wrong input, 0 or 1 after a signal."""
    args = default_argument_parser(__doc__).parse_args(argv)
    machines = {"num_machines": args.num_machines, "machine_rank": args.machine_rank, "dist_url": args.dist_url}
    try:
        args.config_file = str(find_config(args.config_file))
        with StopSignals() if args.num_gpus * args.num_machines > 1 else contextlib.nullcontext():
            launch(main, args.num_gpus, **machines, args=(args,))  # several processes stop by themselves
    except UserError as error:
        sys.stderr.write(f"addp: {error}\n")
        raise SystemExit(2) from error
    except ProcessExitedException as error:  # one of several processes
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    run()
