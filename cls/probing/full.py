"""The full mode of `addp linprobe`: one head trained over a frozen encoder on random crops (App. D.2)."""

import logging
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from addp_core.base.errors import UserError
from addp_core.data.images import eval_transform, pretrain_transform
from addp_core.data.sources import ImageSource
from addp_core.data.stream import Batch
from addp_core.networks.classifier import Classifier, normalize
from addp_core.networks.pooled_features import PooledFeatures
from addp_core.training.engine import train
from addp_core.training.stage import MicroStep, Stage
from addp_core.weights.fitting import AnyEncoder
from addp_core.weights.frozen import resolve_block
from addp_core.weights.pretrained import NORMALISATION
from addp_core.weights.saving import save_model
from cls.data import LabeledStream, cache_for_evaluation, evaluation_crop
from cls.evaluation import evaluate_classifier
from cls.probing.features import truncate
from cls.probing.recipe import Recipe
from cls.probing.report import print_results
from cls.results import METRICS, write_results

log = logging.getLogger("addp")

HEAD_STD = 0.01  # of a new head's weights: LARS scales its updates with the norm of the weights, which must not vanish


def run_full(recipe: Recipe, encoder: AnyEncoder, train_set: ImageSource, val_set: ImageSource) -> None:
    """Train the head, or continue; end with results.json and the classifier in the run folder."""
    classifier = build_classifier(recipe, encoder, train_set.classes)
    crop = evaluation_crop(recipe.data.hw, recipe.eval_crop)
    stage = LinearProbeStage(classifier, recipe, cache_for_evaluation(val_set, recipe.data, crop), crop)
    transform = pretrain_transform(recipe.data)
    stream = LabeledStream(train_set, transform, recipe.data, seed=recipe.train.seed, batch=recipe.train.micro_batch)
    train(stage, stream, recipe.train, recipe.out, recipe)
    print_results(Path(recipe.out), recipe.mode)


def check_batch_norm(recipe: Recipe) -> None:
    """Raise UserError if `batch_norm` does not divide the batch; say if it exceeds the batch."""
    images, batch = recipe.batch_norm, recipe.train.batch
    if images is not None and images < batch and batch % images:
        raise UserError(
            f"batch_norm: found {images}, expected a divisor of train.batch={batch}, or batch_norm=null for statistics "
            "over the whole batch"
        )
    if images is not None and images > batch:
        log.info("batch_norm=%d: a batch has %d images, which share their statistics", images, batch)


def build_classifier(recipe: Recipe, encoder: AnyEncoder, class_names: tuple[str, ...]) -> Classifier:
    """Return the initial classifier: the encoder up to the block that is probed, and a new head."""
    truncate(encoder, resolve_block(encoder, recipe.block))
    mean, std = NORMALISATION[recipe.normalisation]
    options = (class_names, mean, std, recipe.eval_crop, recipe.norm)
    model = Classifier(encoder, len(class_names), recipe.pooling, "batch", *options)
    nn.init.trunc_normal_(cast(nn.Linear, model.head).weight, std=HEAD_STD)
    return model


class LinearProbe(nn.Module):
    """The trained part of a classifier, and all that checkpoints hold: its head, and the statistics of its norm.

    Args:
        classifier: that it is a part of.
        batch_norm: images that share their statistics in training; None for the whole batch.
    """

    def __init__(self, classifier: Classifier, batch_norm: int | None = None):
        super().__init__()
        self.fc_norm, self.head, self.batch_norm = classifier.fc_norm, classifier.head, batch_norm

    def forward(self, features: Tensor) -> Tensor:
        """Float[B,W] -> logits Float[B,C]."""
        if self.training and self.batch_norm is not None and self.batch_norm < len(features):
            return self.head(self._normalize_in_parts(features, self.batch_norm))
        return self.head(self.fc_norm(features))

    def _normalize_in_parts(self, features: Tensor, images: int) -> Tensor:
        """Apply the batch norm of training to each `images` rows, as to those of one GPU in the published code.

        The running statistics follow the mean over the parts; in the published code, they are those of rank 0.
        """
        norm, parts = cast(nn.BatchNorm1d, self.fc_norm), features.float().unflatten(0, (-1, images))
        variance, mean = torch.var_mean(parts, 1, correction=0, keepdim=True)
        with torch.no_grad():
            momentum = cast(float, norm.momentum)
            cast(Tensor, norm.running_mean).lerp_(mean.mean(0)[0], momentum)
            cast(Tensor, norm.running_var).lerp_(variance.mean(0)[0] * images / (images - 1), momentum)
            cast(Tensor, norm.num_batches_tracked).add_(1)
        return ((parts - mean) * (variance + norm.eps).rsqrt()).flatten(0, 1)


class LinearProbeStage(Stage):
    """A head over the frozen encoder.

    The loss is computed on the whole batch: the features of all micro-steps and processes are gathered first (they are
    small and need no gradient), so that the batch norm sees the same batch with and without accumulation.
    """

    name = "linprobe"
    metrics, best_metric = METRICS, "top1"

    def __init__(self, classifier: Classifier, recipe: Recipe, val_set: ImageSource, crop: float):
        self.classifier, self.recipe, self.val_set = classifier, recipe, val_set
        self.model = LinearProbe(classifier, recipe.batch_norm)
        blocks = [classifier.encoder.depth]
        self.features = PooledFeatures(classifier.encoder, blocks, [recipe.pooling], norm=recipe.norm)
        self.frozen = [self.features]
        self.transform = eval_transform(recipe.data.hw, crop)
        self.accumulated: list[tuple[Tensor, Tensor]] = []  # (features, labels) of the batch's micro-steps so far

    def loss(self, model: nn.Module, batch: Batch, micro_step: MicroStep) -> dict[str, Tensor]:
        """Return the loss of the whole batch in the last micro-step, and zero in the others.

        It is multiplied by the number of micro-steps, because the engine averages over them.
        """
        images = normalize(batch.images, self.classifier.mean, self.classifier.std)
        self.accumulated.append((self.features(images)[:, 0, 0, 0], batch.labels))
        micro_steps = self.recipe.train.accumulate
        if (micro_step.index + 1) % micro_steps:
            zero = torch.zeros((), device=images.device)
            return {"loss": zero.clone().requires_grad_(), "train_top1": zero}
        features, labels = (self._gather(torch.stack(tensors)) for tensors in zip(*self.accumulated, strict=True))
        self.accumulated.clear()
        logits = model(features).float()
        top1 = 100 * (logits.argmax(1) == labels).float().mean()
        return {"loss": micro_steps * cross_entropy(logits, labels), "train_top1": micro_steps * top1}

    def _gather(self, rows: Tensor) -> Tensor:
        """Gather [k,b,...], b rows of each of k micro-steps, from the p processes: [kpb,...] in the batch's order.

        The order, and so the parts of the batch norm, do not depend on the number of processes and micro-steps.
        """
        processes = PartialState().num_processes
        return gather(rows).unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 2)

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return top-1 and top-5 on the validation images in percent."""
        recipe, classifier = self.recipe, self._classifier_with(model)
        self.scores = evaluate_classifier(
            classifier,
            self.val_set,
            self.transform,
            classifier.num_classes,
            mean=classifier.mean,
            std=classifier.std,
            batch=recipe.eval_batch,
            precision=recipe.train.precision,
            workers=recipe.data.workers,
            max_errors=recipe.data.max_errors,
        )
        return self.scores.metrics

    def after_evaluation(self, step: int, metrics: dict[str, float], best: dict[str, Any] | None) -> None:
        """Write the metrics of this and the best head so far to results.json."""
        write_results(self.scores, step, best, Path(self.recipe.out))

    def export(self, model: nn.Module, path: Path) -> None:
        save_model(self._classifier_with(model), path)

    def _classifier_with(self, probe: nn.Module) -> Classifier:
        """Return the classifier with the head of `probe`, whose weights may be averaged (EMA), without a copy."""
        classifier = copy(self.classifier)
        trained = {"fc_norm": cast(nn.Module, probe.fc_norm), "head": cast(nn.Module, probe.head)}
        classifier._modules = {**self.classifier._modules, **trained}
        return classifier
