"""`addp finetune`: the encoder and a new head trained on labelled images, with timm's augmentation (App. D.2).

Validation runs every `train.evaluate_every` steps; the best weights so far are kept in model-best.safetensors, the last
ones in model.safetensors. Both feed `addp robustness` and `addp export`.
"""

import csv
import io
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import PartialState
from annotated_types import Ge, Gt, Interval, Le, Lt
from timm.data import (
    Mixup,
    create_transform,
)
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import group_parameters
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.data.config import DataConfig
from addp_core.data.images import eval_transform
from addp_core.data.sources import ImageSource
from addp_core.data.stream import Batch, Stream
from addp_core.networks.classifier import Classifier
from addp_core.recipes.config import dump
from addp_core.recipes.keys import with_defaults
from addp_core.training.engine import train
from addp_core.training.processes import process_state
from addp_core.training.run_folder import log_write_errors, prepare_out
from addp_core.training.stage import MicroStep, Stage, TrainConfig
from addp_core.weights.files import read_tensors
from addp_core.weights.pretrained import NORMALISATION, EncoderKeys
from addp_core.weights.reading import read_weights
from addp_core.weights.saving import save_model
from cls.data import cache_for_evaluation, check_batch_labels, evaluation_crop, open_splits
from cls.evaluation import Scores, evaluate_classifier
from cls.results import keep_best

log = logging.getLogger("addp")

CONFUSION = "confusion.csv"


@dataclass
class AugmentConfig:
    """timm's augmentation; crop and mirror are in `data`."""

    auto: Annotated[str, "RandAugment or AutoAugment as timm writes it; empty: none"] = "rand-m9-mstd0.5-inc1"
    color_jitter: Annotated[float, Ge(0), "strength, where `auto` is empty"] = 0.0
    erase: Annotated[float, Interval(ge=0, le=1), "probability of random erasing"] = 0.25
    mixup: Annotated[float, Ge(0), "alpha; 0: off"] = 0.8
    cutmix: Annotated[float, Ge(0), "alpha; 0: off"] = 1.0
    mix_probability: Annotated[float, Interval(ge=0, le=1), "of mixing a batch at all"] = 1.0
    switch_probability: Annotated[float, Interval(ge=0, le=1), "of CutMix rather than Mixup, where both are on"] = 0.5
    smoothing: Annotated[float, Ge(0), Lt(1), "label smoothing"] = 0.1
    repeats: Annotated[int, Ge(1), "times that an image is shown in a row, each time augmented anew"] = 1

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


FinetuneData = with_defaults(DataConfig, size=224, scale=(0.08, 1.0))
FinetuneTrain = with_defaults(
    TrainConfig,
    batch=1024,
    betas=(0.9, 0.999),
    base_lr=1e-3,
    min_lr=1e-6,
    layer_decay=0.65,
    warmup_epochs=5.0,
    clip_grad=None,
)


@dataclass(kw_only=True)
class Recipe(EncoderKeys):
    """Keys of `addp finetune`."""

    out: Annotated[str, "run folder"]
    data: FinetuneData = field(default_factory=FinetuneData)
    val: Annotated[str, "images to validate on (default: the `val` split of data)"] = ""
    pooling: Annotated[Literal["avg", "token"], "what the head sees: the mean of the patches, or the class token"] = (
        "avg"
    )
    drop_path: Annotated[float, Interval(ge=0, lt=1), "stochastic depth of the last block, growing from 0"] = 0.1
    dropout: Annotated[float, Interval(ge=0, lt=1), "in attention and MLP"] = 0.0
    checkpointing: Annotated[bool, "compute activations twice rather than keep them (compute only)"] = False
    loss: Annotated[Literal["ce", "bce"], "cross-entropy, or binary cross-entropy of each class"] = "ce"
    bce_threshold: Annotated[float | None, Gt(0), Le(1), "bce: mixed targets above it count as 1 (default: as is)"] = (
        None
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: FinetuneTrain = field(default_factory=FinetuneTrain)
    eval_crop: Annotated[
        float | None,
        Gt(0),
        Le(1),
        "share of the shorter side that validation crops (default: 0.875 up to 224 px, else 1)",
    ] = None
    eval_batch: Annotated[int, Ge(1), "images at a time in validation, on each process"] = 64
    confusion: Annotated[bool, "write confusion.csv and images/confusion.png at each validation"] = False


def run(recipe: Recipe) -> None:
    """Fine-tune, or continue; ends with `<out>/model.safetensors` and its scores in results.json."""
    text = dump(recipe)
    if prepare_out(recipe.out, text):
        if recipe.confusion and not (Path(recipe.out) / CONFUSION).exists():
            log.info("confusion: is written at validations, and this run has had its last; nothing is done")
        return
    world = process_state().num_processes
    rows = recipe.train.micro_batch // world  # Mixup pairs the images of a process
    if recipe.augment.mixes and rows % 2:
        where = f"a micro-step on each of {world} processes" if world > 1 else "a micro-step"
        raise UserError(
            f"train.batch: {rows} images of {where} cannot be mixed in pairs; expected a multiple of "
            f"{2 * world * recipe.train.accumulate}, or augment.mixup=0 augment.cutmix=0"
        )
    train_set, val_set = open_splits(recipe.data, recipe.val)
    model = build(recipe, train_set.classes)
    log.info(
        "layers (rate falls by train.layer_decay=%s a layer)\n%s",
        recipe.train.layer_decay,
        layer_table(model, recipe.train),
    )
    share = evaluation_crop(recipe.data.hw, recipe.eval_crop)
    stage = FinetuneStage(model, recipe, cache_for_evaluation(val_set, recipe.data, share), share)
    stream = Stream(
        train_set,
        train_transform(recipe),
        recipe.data,
        seed=recipe.train.seed,
        batch=recipe.train.micro_batch,
        repeats=recipe.augment.repeats,
    )
    train(stage, stream, recipe.train, recipe.out, text)


def build(recipe: Recipe, classes: tuple[str, ...]) -> Classifier:
    """The classifier at the start: the encoder that the recipe names and a head for these classes."""
    torch.manual_seed(recipe.train.seed)
    mean, std = NORMALISATION[recipe.normalisation]
    encoder = recipe.encoder(recipe.data.hw, dropout=recipe.dropout, drop_path=recipe.drop_path)
    about = {"class_names": classes, "mean": mean, "std": std, "crop": recipe.eval_crop}
    model = Classifier(encoder, len(classes), recipe.pooling, **about)
    if recipe.init == "pretrained":
        _take_head(model, recipe.model)
    model.set_grad_checkpointing(recipe.checkpointing)
    return model


def _take_head(model: Classifier, source: str) -> None:
    """The head of a classifier of the same classes goes on; another one is dropped, and said to be."""
    weights = read_weights(source)
    if weights.kind == "classifier":
        file = weights.architecture
        if tuple(file.class_names) == model.class_names and (file.pooling, file.norm) == (model.pooling, model.norm):
            model.head.load_state_dict(weights.part("head."))
            model.fc_norm.load_state_dict(weights.part("fc_norm."))
            log.info("%s: its head knows the same %d classes and goes on", source, model.num_classes)
            return
        classes = file.classes
    elif weights.kind == "encoder":  # perhaps of a foreign classifier, whose classes have no names
        classes = len(read_tensors(source).get("head.weight", ()))
    else:
        return
    if classes and process_state().is_main_process:
        log.warning("%s: its head for %d classes is dropped; a new one for %d", source, classes, model.num_classes)


def layer_table(model: nn.Module, config: TrainConfig) -> str:
    """A line a layer: its id, factor on the rate, peak rate, number of parameters, the modules in it."""
    layers: dict[int, list[str]] = {}
    for name, layer in group_parameters(model, model.group_matcher(), reverse=True).items():
        layers.setdefault(layer, []).append(name)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lines = ["layer  factor    lr        parameters  modules"]
    for layer, names in sorted(layers.items()):
        trained = [name for name in names if name in parameters]
        factor = (config.layer_decay or 1.0) ** (max(layers) - layer)
        modules = dict.fromkeys(_module(name) for name in trained)
        count = sum(parameters[name].numel() for name in trained)
        lines.append(f"{layer:5d}  {factor:<8.4g}  {factor * config.peak_lr:<8.3g}  {count:10,d}  {', '.join(modules)}")
    return "\n".join(lines)


def _module(name: str) -> str:
    """encoder.blocks.3.attn.qkv.weight -> blocks.3"""
    parts = name.removeprefix("encoder.").split(".")
    return ".".join(parts[: 2 if parts[0] == "blocks" else 1])


def train_transform(recipe: Recipe):
    """timm's training transform: an RGB Pillow image -> Float[3,h,w], normalised."""
    mean, std = NORMALISATION[recipe.normalisation]
    return create_transform(
        recipe.data.hw,
        is_training=True,
        scale=recipe.data.scale,
        ratio=recipe.data.ratio,
        hflip=0.5 if recipe.data.flip else 0.0,
        color_jitter=recipe.augment.color_jitter or None,
        auto_augment=recipe.augment.auto or None,
        interpolation="bicubic",
        re_prob=recipe.augment.erase,
        re_mode="pixel",
        mean=mean,
        std=std,
    )


class FinetuneStage(Stage):
    """What the engine trains, and how it is validated."""

    name = "finetune"

    def __init__(self, model: Classifier, recipe: Recipe, val_set: ImageSource, share: float):
        self.model, self.recipe, self.val_set = model, recipe, val_set
        self.transform = eval_transform(recipe.data.hw, share)
        augment = recipe.augment
        self.mixup = None
        if augment.mixes:
            self.mixup = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mix_probability,
                switch_prob=augment.switch_probability,
                label_smoothing=augment.smoothing,
                num_classes=model.num_classes,
            )
        smoothing = 0.0 if self.mixup else augment.smoothing  # Mixup smooths its targets itself
        if recipe.loss == "bce":
            self.criterion: nn.Module = BinaryCrossEntropy(smoothing, target_threshold=recipe.bce_threshold)
        else:
            self.criterion = SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(smoothing)

    def loss(self, model: nn.Module, batch: Batch, micro_step: MicroStep) -> dict[str, Tensor]:
        check_batch_labels(batch, self.model.num_classes)
        images, targets = self.mixup(batch.images, batch.labels) if self.mixup else (batch.images, batch.labels)
        logits = model(images)
        return {"loss": self.criterion(logits.float(), targets)}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Top-1 and top-5 of the validation images in per cent; keeps the best weights so far."""
        recipe, out = self.recipe, Path(self.recipe.out)
        scores = evaluate_classifier(
            model,
            self.val_set,
            self.transform,
            self.model.num_classes,
            mean=self.model.mean,
            std=self.model.std,
            batch=recipe.eval_batch,
            precision=recipe.train.precision,
            workers=recipe.data.workers,
            max_errors=recipe.data.max_errors,
        )
        if PartialState().is_main_process:
            if recipe.confusion:
                write_confusion(scores, self.model.class_names, out)
            keep_best(model, step, scores, out)
        return scores.metrics

    def export(self, model: nn.Module, path: Path) -> None:
        save_model(model, path)


def write_confusion(scores: Scores, names: tuple[str, ...], out: Path) -> None:
    """confusion.csv (rows: the true class, columns: the answer) and a picture of it, as far as the disk has room."""
    from matplotlib.figure import Figure

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true\\answer", *names])
    writer.writerows([name, *row] for name, row in zip(names, scores.confusion.tolist(), strict=True))
    with log_write_errors(out / CONFUSION):
        write_atomically(out / CONFUSION, text.getvalue().encode())
    share = scores.confusion / scores.confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(max(4.0, 0.3 * len(names)), 12.0)
    figure = Figure(figsize=(side + 1, side))
    axes = figure.add_subplot(title=f"top-1 {scores.metrics['top1']:.1f} %", xlabel="answer", ylabel="true class")
    figure.colorbar(axes.imshow(share.numpy(), vmin=0, vmax=1, cmap="viridis"), label="share of the true class")
    if len(names) <= 40:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    figure.tight_layout()
    with log_write_errors(out / "images" / "confusion.png"):
        figure.savefig(out / "images" / "confusion.png", dpi=100)
