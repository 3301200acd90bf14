"""Evaluation while pretraining (`evaluation`, `train.evaluate_every`): what the three stages measure on images that
they are not trained on.

    knn, probe               accuracy in percent of a k-NN classifier and of a linear probe on the encoder's features
    fid or fd                Frechet distance of generated or reconstructed images, with Inception's or other features
    precision, recall        of the same images (arXiv 1904.06991)
    val_...                  the stage's own metrics

All images are decoded once and stay in memory, a share on each process. The choice of the images, and all that is drawn
for them, is the same in every run and at every step, so that a curve shows the model alone.
"""

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from addp_core.base.cpu import usable_cores
from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.rng import generator
from addp_core.data.config import DataConfig
from addp_core.data.image_source import ImageSource
from addp_core.data.images import ImageError, eval_transform
from addp_core.data.pixels import to_float
from addp_core.data.sources import explain_missing_classes
from addp_core.data.stream import ReadErrors
from addp_core.networks.classifier import normalize
from addp_core.networks.encoder import FeatureEncoder
from addp_core.networks.pooled_features import PooledFeatures
from addp_core.training.evaluation import check_evaluation, check_unreadable
from addp_core.training.probe_keys import HeadTraining
from addp_core.training.probes import NearestNeighbors, train_best_head
from addp_core.training.processes import process_state
from addp_core.training.stage import Stage
from pretrain.recipe import EvaluationConfig

log = logging.getLogger("addp")

SEED = 0  # of the choice of images and of all that is drawn for them
VOTING = 0.75  # the share of each class whose images vote and train the probe; the others are scored
HELD_OUT = 0.1  # of the voting images, to choose the probe's learning rate
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
MIN_PER_CLASS = 4  # images; classes are left out rather than to have fewer
DECODED_AT_ONCE = 64
DRAWN_TOGETHER = 64  # images that share a mask ratio, as those of a batch do


@dataclass(frozen=True)
class Measured:
    """What a stage measures: its own metrics, and whether higher is better; whether it has an encoder to probe; whether
    it makes images to compare with real ones.
    """

    own: Mapping[str, bool]
    encoder: bool = False
    images: bool = False


class EvaluatedStage(Stage):
    """A stage of pretraining, which is evaluated if `evaluation` is set."""

    measured: Measured
    evaluation: "Evaluation | None" = None

    @property
    def metrics(self) -> Mapping[str, bool]:  # type: ignore[override]  # an attribute of other stages
        """The metrics of `evaluate`, and whether higher is better."""
        return self.evaluation.metrics if self.evaluation else {}

    @property
    def averaged_is_model(self) -> bool:
        """Return False: later stages and transfers have always read the last weights, unless told otherwise."""
        return False

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return the metrics, if there are images to evaluate on."""
        if self.evaluation is None:
            return {}
        # compiled code would be compiled again for these shapes, and training's could then be another
        with torch.compiler.set_stance("force_eager"):
            return self.measure(model, self.evaluation)

    @abstractmethod
    def measure(self, model: nn.Module, evaluation: "Evaluation") -> dict[str, float]:
        """Return the metrics. All processes call this; those of rank 0 count."""


class Evaluation:
    """The images of all evaluations of a run, and what is computed with them.

    Args:
        config: the section `evaluation`.
        source: the images.
        data: how the stage's images are cropped.
        measured: what the stage measures.
        where: the source, for messages.

    Raises:
        UserError: if the images are too few, lack the classes that k-NN and probe need, or what extracts features of
            images cannot be loaded.
    """

    def __init__(self, config: EvaluationConfig, source: ImageSource, data: DataConfig, measured: Measured, where: str):
        self.config, self.source, self.data, self.state = config, source, data, process_state()
        self.probes = [name for name, wanted in (("knn", config.knn > 0), ("probe", config.probe)) if wanted]
        self.probes = self.probes if measured.encoder else []
        if self.probes:
            _check_classes(source, where)
        self.indices = choose_images(source, config.images, config.classes)  # of all processes
        self.own = self.indices[self.state.process_index :: self.state.num_processes]
        self.share = math.ceil(len(self.indices) / self.state.num_processes)  # the most that one process has
        self.samples = min(config.samples, len(self.indices)) if measured.images else 0
        distance = {}
        if self.samples:
            self.extractor = _open_extractor(config, len(self.indices), self.state.device)
            log.info("evaluation: images are compared by the features of %s", self.extractor.label)
            self.distance = "fid" if self.extractor.is_inception else "fd"
            distance = {self.distance: False, "precision": True, "recall": True}
        self.metrics = {**measured.own, **dict.fromkeys(self.probes, True), **distance}
        self.pixels: Tensor | None = None  # UInt8[m,3,H,W] of this process's readable images
        self.labels: Tensor | None = None  # Long[n] of all processes' readable images, in the order of their indices
        self.reference: Tensor | None = None  # Float[n,D] on rank 0, features of the images compared with

    # --- images

    def batches(self) -> Iterator[Tensor]:
        """Yield this process's images, Float[b,3,H,W] in [0,1] on the device.

        All processes have to use it up together. Raises EvaluationStopped if a signal asks the run to stop.
        """
        pixels = self._read()
        for start in self._rounds(self.share, self.config.batch):
            if len(part := pixels[start : start + self.config.batch]):
                yield to_float(part.to(self.state.device))

    def rows(self, drawn: Callable[[int, torch.Generator], tuple[Tensor, ...]], purpose: str) -> list[Tensor]:
        """Draw something for each image, the same on any number of processes, and return this process's rows.

        drawn: (images, generator) -> tensors of so many rows, such as masks of one ratio.
        """
        self._read()
        starts = range(0, len(self.indices), DRAWN_TOGETHER)
        parts = [drawn(DRAWN_TOGETHER, generator(SEED, "evaluation", purpose, start)) for start in starts]
        numbers = torch.from_numpy(np.searchsorted(self.indices, self.own))
        return [torch.cat(tensors)[numbers] for tensors in zip(*parts, strict=True)]

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes' images on the CPU, in the order of the images."""
        parts = gather_object([(self.own, rows.cpu())])
        order = torch.from_numpy(np.concatenate([indices for indices, _ in parts])).argsort()
        return torch.cat([values for _, values in parts])[order]

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return reduce(values, "sum")

    def _read(self) -> Tensor:
        """Decode the images when they are needed first; unreadable ones are left out, if they are few."""
        if self.pixels is not None:
            return self.pixels
        crop, errors = eval_transform(self.data.hw), []
        images: list[Tensor] = []
        labels: list[int] = []
        readable: list[int] = []

        def decode(index: int) -> tuple[Tensor, int] | ImageError:
            try:
                image, label = self.source.open_image(index)
                return crop.pixels(image), label
            except ImageError as error:
                return error

        with ThreadPoolExecutor(usable_cores()) as pool:
            for start in self._rounds(self.share, DECODED_AT_ONCE):
                part = self.own[start : start + DECODED_AT_ONCE].tolist()
                self.source.read_ahead(part)
                for index, decoded in zip(part, pool.map(decode, part), strict=True):
                    if isinstance(decoded, ImageError):
                        errors.append((self.source.name(index), str(decoded)))
                        log.warning("skipped an unreadable image: %s (%s)", *errors[-1])
                    else:
                        images.append(decoded[0])
                        labels.append(decoded[1])
                        readable.append(index)
                self._check_errors(errors)
        self.own = np.array(readable, dtype=np.int64)
        self.labels = self.gather(torch.tensor(labels, dtype=torch.long))
        shares = gather_object([self.own])
        self.indices, self.share = np.sort(np.concatenate(shares)), max(map(len, shares))
        self.pixels = torch.stack(images) if images else torch.empty(0, 3, *self.data.hw, dtype=torch.uint8)
        return self.pixels

    def _check_errors(self, errors: ReadErrors) -> None:
        check_unreadable(errors, self.data.max_errors, len(self.indices))

    def _rounds(self, share: int, size: int) -> Iterator[int]:
        """Yield where a process's next part of at most `size` images begins; all processes yield equally often.

        share: images of the process that has the most.
        """
        for start in range(0, share, size):
            check_evaluation([], 0)
            yield start

    # --- the encoder

    def probe(self, encoder: FeatureEncoder) -> dict[str, float]:
        """Return the accuracy of k-NN and of a linear probe on the mean of the patch tokens after the last block."""
        if not self.probes:
            return {}
        pooled = PooledFeatures(encoder, [encoder.depth], ["avg"])
        parts = [pooled(normalize(x, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))[:, 0, 0, 0] for x in self.batches()]
        features = self.gather(torch.cat(parts).float() if parts else torch.empty(0, encoder.width))
        if not self.state.is_main_process:
            return {}
        assert self.labels is not None  # read with the images
        voting, scored, labels = split_classes(self.labels)
        device, classes = self.state.device, int(labels.max()) + 1
        train, train_labels = features[voting].to(device), labels[voting].to(device)
        test, test_labels = features[scored].to(device), labels[scored].to(device)
        metrics = {}
        with torch.autocast(device.type, enabled=False):
            if "knn" in self.probes:
                neighbors = NearestNeighbors(train, train_labels, classes, self.config.knn)
                metrics["knn"] = neighbors.accuracy(test, test_labels)
            if "probe" in self.probes:
                rates, training = LEARNING_RATES, HeadTraining()  # as `addp linprobe mode=fast` by default
                head, _ = train_best_head(train[:, None], train_labels, classes, rates, training, SEED, HELD_OUT)
                metrics["probe"] = head.accuracy(test, test_labels).item()
        return metrics

    # --- images that the stage makes

    def compare_generated(self, generate: Callable[[int, int], Tensor]) -> dict[str, float]:
        """Return the distances of generated images.

        generate: (first, n) -> the images `first` to `first + n - 1`, Float[n,3,H,W] in [0,1].
        """
        if not self.samples:
            return {}
        own = np.array_split(np.arange(self.samples), self.state.num_processes)[self.state.process_index]
        parts = []
        for start in self._rounds(math.ceil(self.samples / self.state.num_processes), self.config.batch):
            if len(numbers := own[start : start + self.config.batch]):
                parts.append(self._features(generate(int(numbers[0]), len(numbers))))
        return self._distances(torch.cat(gather_object(parts)))

    def compare_reconstructed(self, reconstruct: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the distances of reconstructions. reconstruct: Float[n,3,H,W] in [0,1] -> the same."""
        if not self.samples:
            return {}
        return self._distances(self._features_of_compared(reconstruct))

    def _features_of_compared(self, change: Callable[[Tensor], Tensor] = lambda images: images) -> Tensor:
        """Return the features of the real images that are compared with, spread over all, after a change."""
        self._read()
        compared = np.isin(self.own, self.indices[np.linspace(0, len(self.indices) - 1, self.samples).astype(int)])
        assert self.pixels is not None
        pixels, parts = self.pixels[torch.from_numpy(compared)], []
        for start in self._rounds(self.share, self.config.batch):
            if len(part := pixels[start : start + self.config.batch]):
                parts.append(self._features(change(to_float(part.to(self.state.device)))))
        return torch.cat(gather_object(parts))

    def _features(self, images: Tensor) -> Tensor:
        """Return the extractor's features of images Float[b,3,H,W] as 8-bit files have them, Float[b,D] on the CPU."""
        with torch.autocast(images.device.type, enabled=False):
            return self.extractor((images.float().clamp(0, 1) * 255).round().byte())[0].cpu()

    def _distances(self, features: Tensor) -> dict[str, float]:
        """Return Frechet distance, precision and recall of the features of all processes' images."""
        from addp_core.training.image_metrics import FeatureSet, frechet_distance, mean_and_covariance, precision_recall

        if self.reference is None:
            self.reference = self._features_of_compared()
        if not self.state.is_main_process:
            return {}
        made, real = features.numpy(), self.reference.numpy()
        distance = frechet_distance(FeatureSet(*mean_and_covariance(made)), FeatureSet(*mean_and_covariance(real)))
        precision, recall = precision_recall(made, real, self.state.device)
        return {self.distance: distance, "precision": float(precision), "recall": float(recall)}


def possible_metrics(config: EvaluationConfig, measured: Measured) -> dict[str, bool]:
    """Return the metrics that an evaluation may have, before its images and extractor are opened."""
    if not (config.data or config.held_out):
        return {}
    probes = [name for name, wanted in (("knn", config.knn > 0), ("probe", config.probe)) if wanted]
    compared = ["fid", "fd", "precision", "recall"] if measured.images and config.samples else []
    return {**measured.own, **dict.fromkeys(probes if measured.encoder else [], True), **dict.fromkeys(compared, True)}


def choose_images(source: ImageSource, images: int, classes: int) -> np.ndarray:
    """Return the indices, in order, of at most so many images of at most so many classes, equally many of each.

    Without labels, and where labels are known only once an image is read, they are any images.
    """
    order = torch.randperm(len(source), generator=generator(SEED, "evaluation images")).numpy()
    if not source.classes or source.labels is None:
        return np.sort(order[:images])
    labels, counts = source.labels[order], _count_classes(source, source.labels)
    drawn = torch.randperm(len(counts), generator=generator(SEED, "evaluation classes")).tolist()
    chosen = [label for label in drawn if counts[label] > 1][: max(2, min(classes, images // MIN_PER_CLASS))]
    if not chosen:
        return np.sort(order[:images])
    share = max(2, images // len(chosen))
    return np.sort(np.concatenate([order[np.flatnonzero(labels == label)[:share]] for label in chosen]))


def split_classes(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of Long[n] labels that vote, Bool[n], those that are scored, Bool[n], and the labels, renumbered.

    Of each class, the first three quarters of the rows vote; classes with one row do neither.
    """
    voting, scored, renumbered = torch.zeros_like(labels).bool(), torch.zeros_like(labels).bool(), labels.clone()
    number = 0
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        if label < 0 or len(rows) < 2:
            continue
        votes = min(max(1, round(VOTING * len(rows))), len(rows) - 1)
        voting[rows[:votes]], scored[rows[votes:]], renumbered[rows] = True, True, number
        number += 1
    return voting, scored, renumbered


def _check_classes(source: ImageSource, where: str) -> None:
    """Raise UserError if the images have no classes for k-NN and probe."""
    without = "or evaluation.knn=0 evaluation.probe=false"
    if not source.classes:
        raise UserError(f"evaluation: {explain_missing_classes(source, where)}, {without}")
    if source.labels is None:
        return
    counts = _count_classes(source, source.labels)
    if (counts > 1).sum() < 2:
        raise UserError(
            f"evaluation: {where} has {(counts > 1).sum()} classes of two images or more, expected at least two such "
            f"classes, {without}"
        )


def _count_classes(source: ImageSource, labels: np.ndarray) -> np.ndarray:
    """Count the images of each class; those without a label (-1) are of none."""
    return np.bincount(labels[labels >= 0], minlength=len(source.classes))


def _open_extractor(config: EvaluationConfig, images: int, device: torch.device):
    """Load what extracts the features of images. Raises UserError if it is missing, or the images are too few."""
    try:
        from addp_core.training.extractors import open_local_extractor
        from addp_core.training.image_metrics import check_image_count
    except ImportError as error:
        raise UserError(
            f"evaluation.samples={config.samples}: comparing images needs torch-fidelity ({error}): "
            "pip install 'addp[gen]', or set evaluation.samples=0"
        ) from error
    check_image_count(min(images, config.samples), name="evaluation")
    with renaming_keys({f"{key}: ": f"evaluation.{key}: " for key in ("inception", "extractor")}):
        return open_local_extractor(config.inception, config.extractor, device)
