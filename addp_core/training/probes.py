"""Probes of stored features: linear heads of several learning rates, and a k-NN classifier.

A sample is whatever one feature describes: an image, or a patch of one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from addp_core.base.rng import generator

KNN_TEMPERATURE = 0.07  # arXiv 1805.01978
STANDARDIZATION_EPS = 1e-6  # that of the classifier's batch norm
CHUNK = 1 << 14  # samples at a time where all features are read
MAX_SIMILARITIES = 1 << 26  # elements of a similarity matrix held at once


class HeadTraining(Protocol):
    """The keys by which linear heads are trained."""

    epochs: int
    batch: int
    momentum: float
    weight_decay: float


def precise_type(device: torch.device) -> torch.dtype:
    """Return the type for long sums: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class LinearHeads:
    """Linear heads trained with L learning rates on standardized features; float32."""

    mean: Tensor  # Float[W]
    variance: Tensor  # Float[W]
    weight: Tensor  # Float[L,C,W]
    bias: Tensor  # Float[L,C]

    def standardize(self, features: Tensor) -> Tensor:
        """[n,W] of any type -> Float[n,W]."""
        return standardize(features, self.mean, self.variance)

    def logits(self, standardized: Tensor) -> Tensor:
        """Float[n,W] -> Float[n,L,C], as one matrix product."""
        lrs, classes, width = self.weight.shape
        return torch.addmm(self.bias.flatten(), standardized, self.weight.view(-1, width).t()).view(-1, lrs, classes)

    def accuracy(self, features: Tensor, labels: Tensor, k: int = 1) -> Tensor:
        """Return each head's top-k accuracy on [n,W] features in percent, [L] of `precise_type`."""
        correct = torch.zeros(len(self.weight), dtype=precise_type(features.device), device=features.device)
        for part, targets in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            top = self.logits(self.standardize(part)).topk(min(k, self.weight.shape[1]), 2).indices
            correct += (top == targets[:, None, None]).any(2).sum(0)
        return 100 * correct / len(features)

    def select(self, index: int) -> "LinearHeads":
        """Return the head of one learning rate."""
        return LinearHeads(self.mean, self.variance, self.weight[index : index + 1], self.bias[index : index + 1])


@torch.no_grad()
def train_heads(
    features: Tensor,
    labels: Tensor,
    chosen: Tensor,
    classes: int,
    lrs: Sequence[float],
    config: HeadTraining,
    seed: int,
) -> LinearHeads:
    """Train a head for each learning rate, initialized with zeros, by SGD with momentum on cross-entropy.

    All heads see the same batches.

    Args:
        features: [n,V,W], V views of each sample.
        labels: Long[n].
        chosen: Long[m], the samples to train on, in all their views.
        lrs: learning rates.
        config: length of the training and its optimization.
        seed: of the order of the samples.
    """
    views, device = features.shape[1], features.device
    samples = (chosen[:, None] * views + torch.arange(views)).flatten()
    features = features.flatten(0, 1)
    mean, variance = mean_and_variance(features, samples)
    weight = torch.zeros(len(lrs), classes, features.shape[1], device=device)
    heads = LinearHeads(mean, variance, weight, torch.zeros(len(lrs), classes, device=device))
    peak_lrs = torch.tensor(lrs, device=device)
    momenta = [torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)]
    steps_per_epoch = math.ceil(len(samples) / config.batch)
    for epoch in range(config.epochs):
        order = samples[torch.randperm(len(samples), generator=generator(seed, "order", epoch))].to(device)
        for step, batch in enumerate(order.tensor_split(steps_per_epoch)):
            x, targets = heads.standardize(features[batch]), labels[batch // views]
            # The gradient of the cross-entropy with respect to the logits: softmax minus the one-hot target.
            gradient = heads.logits(x).softmax(2)
            gradient[torch.arange(len(batch), device=device), :, targets] -= 1
            gradient /= len(batch)
            gradients = [(gradient.flatten(1).t() @ x).view_as(heads.weight), gradient.sum(0)]
            gradients[0].add_(heads.weight, alpha=config.weight_decay)
            progress = (epoch * steps_per_epoch + step) / (config.epochs * steps_per_epoch)
            current_lrs = peak_lrs * (0.5 * (1 + math.cos(math.pi * progress)))
            for parameter, momentum, update in zip((heads.weight, heads.bias), momenta, gradients, strict=True):
                momentum.mul_(config.momentum).add_(update)
                parameter.sub_(current_lrs.view(-1, *[1] * (parameter.ndim - 1)) * momentum)
    return heads


def train_best_head(
    features: Tensor,
    labels: Tensor,
    classes: int,
    lrs: Sequence[float],
    config: HeadTraining,
    seed: int,
    held_out: float,
) -> tuple[LinearHeads, Tensor]:
    """Train a head with the learning rate that is best on held-out samples; return it and the accuracies there.

    Heads of all learning rates are trained on the other samples, and then one with the best learning rate on all.
    Arguments are those of `train_heads`, and `held_out`, the share of the samples that is held out, at least one.

    Returns:
        The head, and the accuracy with each learning rate on the first view of the samples held out, [L].
    """
    order = torch.randperm(len(features), generator=generator(seed, "held out"))
    remaining, chosen = order.tensor_split([len(features) - held_out_count(len(features), held_out)])
    heads = train_heads(features, labels, remaining, classes, lrs, config, seed)
    chosen = chosen.to(features.device)
    accuracies = heads.accuracy(features[chosen, 0], labels[chosen])
    best = lrs[int(accuracies.argmax())]
    return train_heads(features, labels, torch.arange(len(features)), classes, [best], config, seed), accuracies


def held_out_count(samples: int, share: float) -> int:
    """Return how many samples are held out to choose the learning rate."""
    return max(1, round(share * samples))


def standardize(features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Normalize [n,W] features of any type as a batch norm without affine parameters: Float[n,W]."""
    return (features.float() - mean) * (variance + STANDARDIZATION_EPS).rsqrt()


def mean_and_variance(features: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the [n,W] features at `samples`, Float[W] each, accumulated in `precise_type`."""
    parts = samples.to(features.device).split(CHUNK)
    dtype = precise_type(features.device)
    mean = torch.stack([features[part].to(dtype).sum(0) for part in parts]).sum(0) / len(samples)
    squares = [(features[part].to(dtype) - mean).square().sum(0) for part in parts]
    variance = torch.stack(squares).sum(0) / len(samples)
    return mean.float(), variance.float()


class NearestNeighbors:
    """A weighted k-NN classifier.

    The k nearest samples by cosine similarity vote, each with the weight exp(similarity / temperature).

    Args:
        features: [n,W] of any type.
        labels: Long[n].
        classes: number of classes.
        k: neighbors; all if there are fewer.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, k: int):
        self.normalized, self.labels, self.classes = normalize(features.float(), dim=1), labels, classes
        self.k = min(k, len(features))
        self.chunk = max(1, MAX_SIMILARITIES // len(features))  # queries at a time

    @torch.no_grad()
    def votes(self, queries: Tensor) -> Tensor:
        """[n,W] of any type -> the weight of the votes for each class, Float[n,C]."""
        votes = torch.zeros(len(queries), self.classes, device=self.normalized.device)
        for part, rows in zip(queries.split(self.chunk), votes.split(self.chunk), strict=True):
            similarities, neighbors = (normalize(part.float(), dim=1) @ self.normalized.t()).topk(self.k, 1)
            rows.scatter_add_(1, self.labels[neighbors], (similarities / KNN_TEMPERATURE).exp())
        return votes

    def accuracy(self, queries: Tensor, labels: Tensor) -> float:
        """Return the top-1 accuracy on [n,W] queries with Long[n] labels in percent."""
        parts = zip(queries.split(self.chunk), labels.split(self.chunk), strict=True)
        return 100 * sum(int((self.votes(part).argmax(1) == targets).sum()) for part, targets in parts) / len(queries)
