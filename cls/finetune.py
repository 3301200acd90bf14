"""`addp finetune`: train the encoder and a new head on labeled images, with timm's augmentation (App. D.2).

Validation runs every `train.evaluate_every` steps. The best checkpoint so far is kept in model-best.safetensors, the
last one in model.safetensors; `addp robustness` and `addp export` read both.
"""

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup, create_transform
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import group_parameters
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.data.images import eval_transform
from addp_core.data.sources import ImageSource
from addp_core.data.stream import Batch
from addp_core.networks.classifier import Classifier, finetuning_norm
from addp_core.training.batch_norm import average_statistics, synchronize_batch_norms
from addp_core.training.engine import train
from addp_core.training.processes import process_state
from addp_core.training.run_folder import prepare_out
from addp_core.training.stage import MicroStep, Stage, TrainConfig
from addp_core.weights.files import read_tensors
from addp_core.weights.pretrained import NORMALISATION
from addp_core.weights.reading import read_weights
from addp_core.weights.saving import save_model
from cls.augment import CroppedFirst
from cls.data import LabeledStream, cache_for_evaluation, evaluation_crop, open_splits
from cls.evaluation import evaluate_classifier
from cls.recipe import AugmentConfig as AugmentConfig
from cls.recipe import FinetuneRecipe as Recipe
from cls.results import CONFUSION, METRICS, write_confusion, write_results

log = logging.getLogger("addp")


def run(recipe: Recipe) -> None:
    """Fine-tune, or continue; end with `<out>/model.safetensors` and its metrics in results.json."""
    transform = train_transform(recipe)  # a wrong policy is found before anything is read
    datasets = functools.cache(
        lambda: open_splits(recipe.data, recipe.val, recipe.val_share, recipe.train.seed, recipe.label_share)
    )
    if prepare_out(recipe.out, recipe, lambda: dict(zip(("train", "val"), datasets(), strict=True))):
        if recipe.confusion and not (Path(recipe.out) / CONFUSION).exists():
            log.info("confusion: the matrix is written at validations, and this run has finished; nothing to do")
        return
    check_mixing(recipe, process_state().num_processes)
    train_set, val_set = datasets()
    model = build_classifier(recipe, train_set.classes)
    log.info(
        "layers (the learning rate is multiplied by train.layer_decay=%s from each layer to the one below)\n%s",
        recipe.train.layer_decay,
        layer_table(model, recipe.train),
    )
    crop = evaluation_crop(recipe.data.hw, recipe.eval_crop)
    stage = FinetuneStage(model, recipe, cache_for_evaluation(val_set, recipe.data, crop), crop)
    stream = LabeledStream(
        train_set,
        CroppedFirst(transform) if recipe.data.resize == "torch" else transform,
        recipe.data,
        seed=recipe.train.seed,
        batch=recipe.train.micro_batch,
        repeats=recipe.augment.repeats,
    )
    train(stage, stream, recipe.train, recipe.out, recipe)


def check_mixing(recipe: Recipe, processes: int) -> None:
    """Raise UserError if images are mixed and a process has an odd number of them: Mixup mixes them in pairs."""
    images = recipe.train.micro_batch // processes
    if recipe.augment.mixes and images % 2:
        where = f"a micro-step on each of {processes} processes" if processes > 1 else "a micro-step"
        raise UserError(
            f"train.batch: {images} images of {where} cannot be mixed in pairs; expected a multiple of "
            f"{2 * processes * recipe.train.accumulate}, or augment.mixup=0 augment.cutmix=0"
        )


def build_classifier(recipe: Recipe, class_names: tuple[str, ...]) -> Classifier:
    """Return the initial classifier: the encoder that the recipe names, and a head for these classes."""
    torch.manual_seed(recipe.train.seed)
    mean, std = NORMALISATION[recipe.normalisation]
    encoder = recipe.load_encoder(recipe.data.hw, dropout=recipe.dropout, drop_path=recipe.drop_path)
    model = Classifier(
        encoder,
        len(class_names),
        recipe.pooling,
        finetuning_norm(encoder),
        class_names=class_names,
        mean=mean,
        std=std,
        crop=recipe.eval_crop,
    )
    if recipe.init == "pretrained":
        _load_head(model, recipe.model, recipe.weights)
    model.set_grad_checkpointing(recipe.checkpointing)
    return model


def _load_head(model: Classifier, checkpoint: str, wanted: str) -> None:
    """Load the head of a checkpoint with the same classes; warn if it has a head for other classes, and drop that."""
    weights = read_weights(checkpoint, wanted=wanted)
    if weights.kind == "classifier":
        file = weights.architecture
        if tuple(file.class_names) == model.class_names and (file.pooling, file.norm) == (model.pooling, model.norm):
            model.head.load_state_dict(weights.part("head."))
            model.fc_norm.load_state_dict(weights.part("fc_norm."))
            log.info("%s: continuing with its head for the same %d classes", checkpoint, model.num_classes)
            return
        classes = file.classes
    elif weights.kind == "encoder":  # possibly of a foreign classifier, whose classes have no names
        classes = len(read_tensors(checkpoint, wanted).get("head.weight", ()))
    else:
        return
    if classes and process_state().is_main_process:
        log.warning(
            "%s: dropping its head for %d classes; training a new one for %d", checkpoint, classes, model.num_classes
        )


def layer_table(model: Classifier, config: TrainConfig) -> str:
    """Return a line for each layer: id, factor on the learning rate, its peak, number of parameters, modules."""
    layers: dict[int, list[str]] = {}
    for name, layer in group_parameters(model, model.group_matcher(), reverse=True).items():
        layers.setdefault(layer, []).append(name)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lines = ["layer  factor    lr        parameters  modules"]
    for layer, names in sorted(layers.items()):
        trained = [name for name in names if name in parameters]
        factor = (config.layer_decay or 1.0) ** (max(layers) - layer)
        modules = dict.fromkeys(_module_name(name) for name in trained)
        count = sum(parameters[name].numel() for name in trained)
        lines.append(f"{layer:5d}  {factor:<8.4g}  {factor * config.peak_lr:<8.3g}  {count:10,d}  {', '.join(modules)}")
    return "\n".join(lines)


def _module_name(parameter: str) -> str:
    """encoder.blocks.3.attn.qkv.weight -> blocks.3"""
    parts = parameter.removeprefix("encoder.").removeprefix("body.").split(".")
    return ".".join(parts[: 2 if parts[0] == "blocks" else 1])


def train_transform(recipe: Recipe) -> Any:
    """Return timm's training transform: an RGB Pillow image -> Float[3,h,w], normalized.

    Raises UserError if timm does not know the policy `augment.auto`.
    """
    mean, std = NORMALISATION[recipe.normalisation]
    height, width = recipe.data.hw
    low, high = (ratio * width / height for ratio in recipe.data.ratio)  # timm's is not relative to the size
    try:
        return create_transform(
            recipe.data.hw,
            is_training=True,
            scale=recipe.data.scale,
            ratio=(low, high),
            hflip=0.5 if recipe.data.flip else 0.0,
            color_jitter=recipe.augment.color_jitter or None,  # type: ignore[arg-type]  # None: no jitter
            auto_augment=recipe.augment.auto or None,
            interpolation="bicubic",
            re_prob=recipe.augment.erase,
            re_mode="pixel",
            mean=mean,
            std=std,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:  # of timm's parser of policies
        raise UserError(
            f"augment.auto: found {recipe.augment.auto!r}, expected a policy in timm's notation, such as "
            "rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0, or nothing"
        ) from error


class FinetuneStage(Stage):
    """Training and validation of a classifier."""

    name = "finetune"
    metrics, best_metric = METRICS, "top1"
    model: Classifier

    def __init__(self, model: Classifier, recipe: Recipe, val_set: ImageSource, crop: float):
        self.model, self.recipe, self.val_set = model, recipe, val_set
        synchronize_batch_norms(model)  # a ViT has none
        self.transform = eval_transform(recipe.data.hw, crop)
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
        images, targets = self.mixup(batch.images, batch.labels) if self.mixup else (batch.images, batch.labels)
        logits = model(images)
        return {"loss": self.criterion(logits.float(), targets)}

    def after_step(self, model: nn.Module, micro_step: MicroStep, accelerator: Accelerator) -> dict[str, Tensor]:
        """Average the moving statistics of a CNN between the processes."""
        average_statistics(model, accelerator)
        return {}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return top-1 and top-5 on the validation images in percent."""
        recipe = self.recipe
        self.scores = evaluate_classifier(
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
        return self.scores.metrics

    def after_evaluation(self, step: int, metrics: dict[str, float], best: dict[str, Any] | None) -> None:
        """Write the confusion matrix, and the metrics of this and the best checkpoint so far to results.json."""
        out = Path(self.recipe.out)
        if self.recipe.confusion:
            write_confusion(self.scores, self.model.class_names, out)
        write_results(self.scores, step, best, out)

    def export(self, model: nn.Module, path: Path) -> None:
        save_model(model, path)
