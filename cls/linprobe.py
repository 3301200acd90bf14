"""`addp linprobe`: what a linear layer makes of a frozen encoder's features (App. D.2).

mode=full is the published protocol: random crops, LARS, a batch norm without affine parameters before the head.
mode=fast computes the features of each image once and sweeps learning rates over them, block by block (heads.py).
"""

import logging
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from addp_core.data.config import DataConfig
from addp_core.data.images import eval_transform, pretrain_transform
from addp_core.data.sources import ImageSource
from addp_core.data.stream import Batch, Stream
from addp_core.networks.classifier import Classifier, normalize
from addp_core.networks.encoder import Encoder
from addp_core.recipes.config import dump
from addp_core.recipes.keys import with_defaults
from addp_core.training.engine import Draw, Stage, TrainConfig, prepare_out, train
from addp_core.weights.checkpoint import save_model
from addp_core.weights.start import NORMALISATION, Start
from cls import heads
from cls.data import check_batch, evaluation_share, held, open_splits
from cls.evaluation import score
from cls.features import Features, Pooling, block_number, cut
from cls.results import keep_best

log = logging.getLogger("addp")

HEAD_STD = 0.01  # of a new head: LARS moves weights in proportion to their size, which must not be next to nothing

ProbeData = with_defaults(DataConfig, scale=(0.08, 1.0))
ProbeTrain = with_defaults(
    TrainConfig,
    epochs=90.0,
    batch=1024,
    optimizer="lars",
    weight_decay=0.0,
    base_lr=0.1,
    warmup_epochs=10.0,
    clip_grad=None,
)


@dataclass(kw_only=True)
class Recipe(Start):
    """Keys of `addp linprobe`."""

    out: Annotated[str, "run folder"]
    data: ProbeData = field(default_factory=ProbeData)
    val: Annotated[str, "images to validate on (default: the `val` split of data)"] = ""
    mode: Annotated[
        Literal["full", "fast"],
        "full: the published training of one head, as `train` says; fast: features computed once, many heads, as "
        "`fast` says (of `train` only seed and precision)",
    ] = "full"
    pooling: Annotated[Pooling, "full: what the head sees: the mean of the patches, or the class token"] = "avg"
    block: Annotated[int, "full: the block whose features are probed, from 1, or from the end as -1"] = -1
    fast: heads.FastConfig = field(default_factory=heads.FastConfig)
    train: ProbeTrain = field(default_factory=ProbeTrain)
    eval_crop: Annotated[
        float | None,
        Gt(0),
        Le(1),
        "share of the shorter side that validation crops (default: 0.875 up to 224 px, else 1)",
    ] = None
    eval_batch: Annotated[int, Ge(1), "images at a time in validation and for features, on each process"] = 64


def run(recipe: Recipe) -> None:
    """Probe, or continue; ends with results.json and `<out>/model.safetensors`, a classifier."""
    text = dump(recipe)
    if prepare_out(recipe.out, text):
        heads.show(Path(recipe.out), recipe.mode)
        return
    train_set, val_set = open_splits(recipe.data, recipe.val)
    torch.manual_seed(recipe.train.seed)
    encoder = recipe.encoder(recipe.data.hw)
    if recipe.mode == "fast":
        heads.run(recipe, encoder, train_set, val_set, text)
        return
    classifier = build(recipe, encoder, train_set.classes)
    share = evaluation_share(recipe.data.hw, recipe.eval_crop)
    stage = ProbeStage(classifier, recipe, held(val_set, recipe.data, share), share)
    transform = pretrain_transform(recipe.data)
    stream = Stream(train_set, transform, recipe.data, seed=recipe.train.seed, batch=recipe.train.micro_batch)
    train(stage, stream, recipe.train, recipe.out, text)
    heads.show(Path(recipe.out), recipe.mode)


def build(recipe: Recipe, encoder: Encoder, classes: tuple[str, ...]) -> Classifier:
    """The classifier at the start: the encoder up to the block that is probed, and a new head."""
    cut(encoder, block_number(encoder, recipe.block))
    mean, std = NORMALISATION[recipe.normalisation]
    model = Classifier(encoder, len(classes), recipe.pooling, "batch", classes, mean, std, recipe.eval_crop)
    nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)
    return model


class Probe(nn.Module):
    """What is trained of a classifier, and all that checkpoints hold: its norm's statistics and its head."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.fc_norm, self.head = classifier.fc_norm, classifier.head

    def forward(self, features: Tensor) -> Tensor:
        """Float[B,W] -> logits Float[B,C]."""
        return self.head(self.fc_norm(features))


class ProbeStage(Stage):
    """A head over the frozen encoder.

    Its loss is that of the whole batch: the features of all micro-steps and processes are put together first (they are
    small and need no gradient), so that the batch norm sees what it would see without accumulation.
    """

    name = "linprobe"

    def __init__(self, classifier: Classifier, recipe: Recipe, val_set: ImageSource, share: float):
        self.classifier, self.recipe, self.val_set = classifier, recipe, val_set
        self.model = Probe(classifier)
        self.features = Features(classifier.encoder, [len(classifier.encoder.blocks)], [recipe.pooling])
        self.frozen = [self.features]
        self.transform = eval_transform(recipe.data.hw, share)
        self.held: list[tuple[Tensor, Tensor]] = []  # (features, labels) of the batch so far

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """The loss comes in the last micro-step, as many times as there are, since the engine takes their mean."""
        check_batch(batch, self.classifier.num_classes)
        images = normalize(batch.images, self.classifier.mean, self.classifier.std)
        self.held.append((self.features(images)[:, 0, 0, 0], batch.labels))
        parts = self.recipe.train.accumulate
        if (draw.micro + 1) % parts:
            zero = torch.zeros((), device=images.device)
            return {"loss": zero.clone().requires_grad_(), "train_top1": zero}
        features, labels = (gather(torch.cat(tensors)) for tensors in zip(*self.held, strict=True))
        self.held.clear()
        logits = model(features).float()
        top1 = 100 * (logits.argmax(1) == labels).float().mean()
        return {"loss": parts * cross_entropy(logits, labels), "train_top1": parts * top1}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Top-1 and top-5 of the validation images in per cent; keeps the best head so far."""
        recipe, classifier = self.recipe, self._with(model)
        scores = score(
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
        if PartialState().is_main_process:
            keep_best(classifier, step, scores, Path(recipe.out))
        return scores.figures

    def export(self, model: nn.Module, path: Path) -> None:
        save_model(self._with(model), path)

    def _with(self, probe: nn.Module) -> Classifier:
        """The classifier with the head at hand, which may be the one with averaged weights; nothing is copied."""
        classifier = copy(self.classifier)
        classifier._modules = {**self.classifier._modules, "fc_norm": probe.fc_norm, "head": probe.head}
        return classifier
