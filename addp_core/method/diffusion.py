"""The alternating diffusion process: which tokens are unreliable at a step, and how the noisy image is mixed.

At step t a fraction of the token ids is unreliable; the fraction grows with t until all ids are unreliable at T (Sec.
3.2, App. C). Every choice that the paper ablates is an option here; the defaults are the paper's.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from addp_core.method.config import ProcessConfig as ProcessConfig
from addp_core.method.config import TargetKind as TargetKind
from addp_core.method.config import TokenMapping as TokenMapping


def mask_ratios(config: ProcessConfig) -> tuple[Tensor, Tensor]:
    """Return the mask ratios of training in ascending order and their probabilities, both Float[S] (App. D.1)."""
    ratios = torch.cos(math.pi / 2 * torch.arange(config.timesteps, -1, -1) / config.timesteps)
    ratios = ratios[(ratios >= config.ratio_min) & (ratios < config.ratio_max)]
    density = torch.exp(-0.5 * ((ratios.double() - config.ratio_mean) / config.ratio_std) ** 2)
    return ratios, density / density.sum()


def draw_masks(config: ProcessConfig, batch: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one training step t for the whole batch and the positions that are unreliable at t and at the later step.

    Both masks are Bool[B,N], True = unreliable, and the first is a subset of the second: random noise ranks the
    positions of an image, and each mask takes the first ceil(N * ratio) of them.
    """
    ratios, probabilities = mask_ratios(config)
    if config.ratios == "fixed":
        ratio = torch.tensor(config.ratio_mean)
        index = int((ratios - ratio).abs().argmin())
    else:
        index = int(torch.multinomial(probabilities, 1, generator=generator))
        ratio = ratios[index]
    jump = int(torch.randint(1, config.max_jump + 1, (), generator=generator))
    later_ratio = torch.maximum(ratios[min(index + jump, len(ratios) - 1)], ratio)
    rank = torch.rand(batch, tokens, generator=generator).argsort(1).argsort(1)
    return rank < math.ceil(tokens * float(ratio)), rank < math.ceil(tokens * float(later_ratio))


class InputRows(NamedTuple):
    """Which images of a batch are corrupted in another way than the paper's (`ProcessConfig`), Bool[B] each."""

    natural: Tensor  # they keep their own pixels at reliable positions
    clean: Tensor  # they are decoded from all of their true ids


def draw_input_rows(config: ProcessConfig, batch: int, generator: torch.Generator) -> InputRows | None:
    """Draw which images are corrupted in another way; None if the process has no such share."""
    if not (config.natural_share or config.clean_share):
        return None
    place = torch.rand(batch, generator=generator)
    natural = place < config.natural_share
    return InputRows(natural, ~natural & (place < config.natural_share + config.clean_share))


def map_tokens(probabilities: Tensor, codebook: Tensor, mapping: TokenMapping) -> Tensor:
    """Apply f of Eq. 5: distributions Float[B,N,K] and codes Float[K,D] -> embeddings Float[B,N,D]."""
    if mapping == "weighted":
        return probabilities @ codebook.to(probabilities.dtype)
    if mapping == "argmax":
        ids = probabilities.argmax(-1)
    else:
        ids = torch.multinomial(probabilities.flatten(0, 1).float(), 1).view(probabilities.shape[:2])
    return F.embedding(ids, codebook)


def training_target(probabilities: Tensor, ids: Tensor, target: TargetKind) -> Tensor:
    """Return the distributions to predict, Float[B,N,K], from q(z | z_t) Float[B,N,K] and the true ids Long[B,N]."""
    if target == "q(z|z_t)":
        return probabilities
    truth = F.one_hot(ids, probabilities.shape[-1]).to(probabilities.dtype)
    return truth if target == "z_0" else (probabilities + truth) / 2


def soft_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy in nats, Float[...], of logits Float[...,V] against distributions Float[...,K].

    The target covers the first K <= V classes and is zero beyond; label smoothing spreads over all V.
    """
    logits, target = logits.float(), target.float()
    expected_logit = (logits[..., : target.shape[-1]] * target).sum(-1)
    total = (1 - smoothing) * target.sum(-1) + smoothing
    return total * logits.logsumexp(-1) - (1 - smoothing) * expected_logit - smoothing * logits.mean(-1)


def cosine_ratio(progress: float) -> float:
    """Return the fraction of tokens still masked after the fraction `progress` of the sampling steps."""
    return math.cos(math.pi / 2 * progress)


def linear_ratio(progress: float) -> float:
    """Return the fraction of tokens still masked after the fraction `progress` of the sampling steps."""
    return 1 - progress


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine_ratio, "linear": linear_ratio}
