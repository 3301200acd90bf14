"""Speed of training steps of the tasks that an encoder is transferred to, beside other ViTs of the same size.

* `det`: forward and backward pass of ViTDet's encoder, beside detectron2's own ViT.
* `seg`: UperNet's training step over the encoder with relative positions, beside the same heads over mmseg's own BEiT.
* `seg_plain`: the same without relative positions, beside mmseg's own VisionTransformer.
* `finetune`: a training step of a classifier, beside timm's own ViT.

All sides get the same noise as images and random weights. Each lives in a process of its own, for its peak memory, and
they run in turns.
"""

import importlib.util
import logging
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.base.errors import UserError
from addp_core.base.tables import text_table
from addp_core.networks.classifier import Classifier, finetuning_norm
from addp_core.networks.config import VIT_SIZES
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.training.compute import accelerate_model, autocast
from addp_core.training.optimization import make_optimizer
from addp_core.training.precision import matrix_width, resolve_precision
from addp_core.training.stage import TrainConfig
from addp_core.training.timing import PartTimer, peak_memory, reset_peak_memory, used_memory
from det.config import vitdet_attention
from tools.speed.recipe import IMAGE_SIZE, Recipe
from tools.speed.spread import spread

log = logging.getLogger("addp")

PATCH, CLASSES, DROP_PATH = 16, 1000, 0.1
Loss = Callable[[], Tensor]
Built = tuple[nn.Module, Loss, torch.optim.Optimizer | None]  # a model, its loss, and what then changes its weights

TITLES = {
    "det": "ViTDet's encoder, forward and backward",
    "seg": "UperNet, relative positions, training step",
    "seg_plain": "UperNet, no relative positions, training step",
    "finetune": "fine-tuning step",
}


def vitdet_encoder(recipe: Recipe, device: torch.device) -> Built:
    """Build ViTDet's encoder."""
    side = recipe.dense_size
    encoder = Encoder(EncoderConfig(**VIT_SIZES[recipe.model]), (side, side), PATCH, vitdet_attention()).to(device)
    images = torch.rand(recipe.dense_batch, 3, side, side, device=device)
    return encoder, lambda: encoder.forward_maps(images, [-1])[0].float().square().mean(), None


def detectron2_encoder(recipe: Recipe, device: torch.device) -> Built:
    """Build detectron2's own ViT as its ViTDet does."""
    from detectron2.modeling import ViT

    shape, side, attention = VIT_SIZES[recipe.model], recipe.dense_size, vitdet_attention()
    encoder = ViT(
        img_size=side,
        patch_size=PATCH,
        embed_dim=shape["width"],
        depth=shape["depth"],
        num_heads=shape["heads"],
        window_size=attention.window,
        window_block_indexes=[i for i, window in enumerate(attention.windows(shape["depth"])) if window],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        out_feature="map",
    ).to(device)
    images = torch.rand(recipe.dense_batch, 3, side, side, device=device)
    return encoder, lambda: encoder(images)["map"].float().square().mean(), None


def upernet(recipe: Recipe, device: torch.device, relative: str, backbone: str = "") -> Built:
    """Build UperNet as `addp seg train` does; with `backbone`, over this one of mmseg's.

    relative: relative positions of our encoder, "table" or "none".
    """
    from seg import cost
    from seg.launch import build_model
    from seg.mmseg_config import fill_model, import_mmseg

    import_mmseg()
    from mmseg.structures import SegDataSample

    side, batch, shape = recipe.dense_size, max(recipe.dense_batch, 2), VIT_SIZES[recipe.model]
    settings: Any = {"model": recipe.model, "crop": side, "batch": batch, "relative": relative}
    cfg, segmentor = cost.read_segmentor(cost.Recipe(**settings))
    fill_model(cfg, segmentor)
    if backbone:
        own: Any = {"init_values": 0.1} if backbone == "BEiT" else {"with_cls_token": True}
        cfg.model.backbone = {
            "type": backbone,
            "img_size": (side, side),
            "patch_size": PATCH,
            "embed_dims": shape["width"],
            "num_layers": shape["depth"],
            "num_heads": shape["heads"],
            "out_indices": cfg.model.backbone.out_indices,
            "drop_path_rate": DROP_PATH,
            **own,
        }
    model: Any = build_model(cfg).to(device)
    images = torch.rand(batch, 3, side, side, device=device)
    samples = [SegDataSample(metainfo={"img_shape": (side, side), "ori_shape": (side, side)}) for _ in images]
    for sample in samples:
        sample.gt_sem_seg = cost.random_labels(side, device)

    def loss() -> Tensor:
        return sum(value for name, value in model.loss(images, samples).items() if "loss" in name)

    return model, loss, torch.optim.AdamW(model.parameters(), lr=1e-6)


def classifier(recipe: Recipe, device: torch.device) -> Built:
    """Build the classifier of `addp finetune`."""
    side = recipe.size or IMAGE_SIZE
    encoder = Encoder(EncoderConfig(**VIT_SIZES[recipe.model], drop_path=DROP_PATH), (side, side), PATCH)
    model = Classifier(encoder, CLASSES, "avg", finetuning_norm(encoder)).to(device)
    return model, classification_loss(model, recipe, device), make_optimizer(model, TrainConfig(lr=1e-6))


def timm_classifier(recipe: Recipe, device: torch.device) -> Built:
    """Build timm's own ViT of the same size."""
    side = recipe.size or IMAGE_SIZE
    name = f"vit_{recipe.model}_patch{PATCH}_224"
    model = timm.create_model(
        name, img_size=side, num_classes=CLASSES, drop_path_rate=DROP_PATH, global_pool="avg", class_token=True
    ).to(device)
    return model, classification_loss(model, recipe, device), make_optimizer(model, TrainConfig(lr=1e-6))


def classification_loss(model: nn.Module, recipe: Recipe, device: torch.device) -> Loss:
    """Return the loss of random classes."""
    side = recipe.size or IMAGE_SIZE
    images = torch.rand(recipe.batch, 3, side, side, device=device)
    labels = torch.arange(recipe.batch, device=device) % CLASSES
    return lambda: F.cross_entropy(model(images), labels)


SIDES: dict[str, dict[str, Callable[[Recipe, torch.device], Built]]] = {
    "det": {"addp": vitdet_encoder, "detectron2": detectron2_encoder},
    "seg": {"addp": partial(upernet, relative="table"), "mmseg": partial(upernet, relative="table", backbone="BEiT")},
    "seg_plain": {
        "addp": partial(upernet, relative="none"),
        "mmseg": partial(upernet, relative="none", backbone="VisionTransformer"),
    },
    "finetune": {"addp": classifier, "timm": timm_classifier},
}


class _Worker:
    """A model and its step, in a process of its own; there is one a process, which `_start` makes."""

    def __init__(self, task: str, side: str, recipe: Recipe, device: torch.device):
        torch.manual_seed(0)
        self.device, self.parts = device, PartTimer(device)
        self.model, self.loss, self.optimizer = SIDES[task][side](recipe, device)
        self.model.train()
        if side == "addp":
            accelerate_model(self.model)  # as the verbs do; other projects are timed as they are
        self.precision = resolve_precision(recipe.precision, device, matrix_width(self.model))
        self.built = used_memory(device)
        reset_peak_memory(device)

    def step(self) -> float:
        with self.parts("step"):
            with autocast(self.precision, self.device):
                loss = self.loss()
            loss.backward()
            if self.optimizer:
                self.optimizer.step()
            self.model.zero_grad()
        return self.parts.take()["step"]


_worker: _Worker


def _start(*args: Any) -> str:
    """Build the worker of this process; return its precision."""
    global _worker
    _worker = _Worker(*args)
    return _worker.precision


def _step(repeat: int) -> float:
    torch.manual_seed(repeat)
    return _worker.step()


def _memory() -> int:
    """Return the peak of bytes beyond those of the model as it was built."""
    return peak_memory(_worker.device) - _worker.built


def chosen_tasks(recipe: Recipe) -> list[str]:
    """Return the tasks that the recipe measures."""
    chosen = {"det": recipe.det, "seg": recipe.seg, "seg_plain": recipe.seg, "finetune": recipe.finetune}
    return [task for task in SIDES if chosen[task]]


def measure_transfer(recipe: Recipe, device: torch.device, tasks: list[str]) -> dict[str, Any]:
    """Return, for each task and side: precision, seconds of a step, peak memory, and how many times its speed ours has.

    A side whose package is not installed is left out. Raises UserError if the system kills a measuring process.
    """
    return {task: _measure(task, recipe, device) for task in tasks}


def _measure(task: str, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    sides = [name for name in SIDES[task] if name == "addp" or importlib.util.find_spec(name)]
    for name in set(SIDES[task]) - set(sides):
        log.warning("%s: %s is not installed, and is left out", task, name)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn"))) for name in sides}
        try:
            report: dict[str, dict[str, Any]] = {
                name: {"precision": pool.submit(_start, task, name, recipe, device).result()}
                for name, pool in pools.items()
            }
            for repeat in range(-recipe.warmup, recipe.repeats):
                for name, pool in pools.items():
                    value = pool.submit(_step, repeat).result()
                    log.info("%s, %s, repeat %d: %.3f s", task, name, repeat + 1, value)
                    if repeat >= 0:
                        seconds[name].append(value)
            for name, pool in pools.items():
                report[name] |= {"seconds": spread(seconds[name]), "peak_memory_bytes": pool.submit(_memory).result()}
        except BrokenProcessPool as error:
            raise UserError(
                f"{task}: a measuring process was killed, most likely because memory ran out; expected a smaller "
                "dense_size, dense_batch or batch"
            ) from error
    for name in sides[1:]:
        ratios = [theirs / ours for ours, theirs in zip(seconds["addp"], seconds[name], strict=True)]
        report[name]["addp_times_this"] = spread(ratios)
    return report


def transfer_table(report: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Return the report as text for a terminal. recipe: the settings."""
    text = ""
    for task, sides in report.items():
        side = recipe["size"] if task == "finetune" else recipe["dense_size"]
        side = side[0] if isinstance(side, (list, tuple)) else side or IMAGE_SIZE
        rows = [[f"{TITLES[task]}, {recipe['model']}, {side} px, {sides['addp']['precision']}", *sides]]
        for label, statistic in (("seconds, median", "median"), ("  lowest", "low"), ("  highest", "high")):
            rows.append([label, *(f"{of['seconds'][statistic]:.4g}" for of in sides.values())])
        memory = [f"{of['peak_memory_bytes'] / 2**30:.2f}" for of in sides.values()]
        rows.append(["peak memory beyond the model, GiB", *memory])
        ratios = [of["addp_times_this"] for of in sides.values() if "addp_times_this" in of]
        cells = [f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" for ratio in ratios]
        rows += [["addp: times its speed", "", *cells]] if cells else []
        text += f"\n{text_table(rows)}"
    return text
