"""The alternating diffusion process: which tokens are unreliable at a step, and how the noisy image is mixed (Sec. 3.2,
App. C).

At step t a share of the token ids is unreliable; the share grows with t until all are at T. Every choice that the paper
ablates is an option here; the defaults are the paper's.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ProcessConfig:
    """The process and the training target. Ablations: Table 5 and App. B of the paper."""

    condition: Annotated[
        Literal["z_t+1", "z_t"], "ids that the noisy image's predictions see: those left one step later, or at t"
    ] = "z_t+1"
    mapping: Annotated[Literal["weighted", "argmax", "sample"], "f: from a distribution to an embedding (Eq. 5)"] = (
        "weighted"
    )
    ids_to: Annotated[Literal["decoder", "encoder+decoder", "none"], "who sees the reliable ids beside the image"] = (
        "decoder"
    )
    target: Annotated[
        Literal["q(z|z_t)", "z_0", "both"],
        "what is predicted: the predictor's distribution, the true ids, or their mean",
    ] = "q(z|z_t)"
    ratios: Annotated[
        Literal["truncnorm", "fixed"],
        "mask ratios: a truncated normal over the cosine schedule, or always `ratio_mean`",
    ] = "truncnorm"
    ratio_mean: Annotated[
        float, Interval(gt=0, le=1), "peak of the truncated normal (0.5 for the paper's fixed ratio)"
    ] = 0.55
    ratio_std: Annotated[float, Interval(gt=0), "spread of the truncated normal"] = 0.25
    ratio_min: Annotated[float, Interval(ge=0, lt=1), "smallest mask ratio, included"] = 0.5
    ratio_max: Annotated[float, Interval(gt=0, le=1), "largest mask ratio, excluded"] = 1.0
    timesteps: Annotated[int, Ge(1), "T: steps of the cosine schedule"] = 100
    max_jump: Annotated[int, Ge(1), "the later step lies 1 to this many steps after t"] = 5
    label_smoothing: Annotated[float, Interval(ge=0, lt=1), "over the whole vocabulary"] = 0.1

    def __post_init__(self):
        if self.ratio_min >= self.ratio_max:
            raise ValueError(f"ratio_min: found {self.ratio_min}, expected less than ratio_max = {self.ratio_max}")
        if not len(mask_ratios(self)[0]):
            raise ValueError(f"timesteps: {self.timesteps} leave no mask ratio in [{self.ratio_min}, {self.ratio_max})")


def mask_ratios(config: ProcessConfig) -> tuple[Tensor, Tensor]:
    """The mask ratios of training in ascending order and their probabilities, both Float[S] (App. D.1)."""
    ratios = torch.cos(math.pi / 2 * torch.arange(config.timesteps, -1, -1) / config.timesteps)
    ratios = ratios[(ratios >= config.ratio_min) & (ratios < config.ratio_max)]
    density = torch.exp(-0.5 * ((ratios.double() - config.ratio_mean) / config.ratio_std) ** 2)
    return ratios, density / density.sum()


def draw_masks(config: ProcessConfig, batch: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One training step t for the whole batch: Bool[B,N] unreliable at t, and Bool[B,N] at the later step; the first
    lies in the second.

    One noise orders the positions of an image; the two masks cut it at ceil(N * ratio).
    """
    ratios, weights = mask_ratios(config)
    if config.ratios == "fixed":
        ratio = torch.tensor(config.ratio_mean)
        index = int((ratios - ratio).abs().argmin())
    else:
        index = int(torch.multinomial(weights, 1, generator=generator))
        ratio = ratios[index]
    jump = int(torch.randint(1, config.max_jump + 1, (), generator=generator))
    later = torch.maximum(ratios[min(index + jump, len(ratios) - 1)], ratio)
    rank = torch.rand(batch, tokens, generator=generator).argsort(1).argsort(1)
    return rank < math.ceil(tokens * float(ratio)), rank < math.ceil(tokens * float(later))


def map_tokens(probabilities: Tensor, codebook: Tensor, mapping: str) -> Tensor:
    """f(q): Float[B,N,K] distributions and Float[K,D] codes -> Float[B,N,D] embeddings (Eq. 5)."""
    if mapping == "weighted":
        return probabilities @ codebook.to(probabilities.dtype)
    if mapping == "argmax":
        ids = probabilities.argmax(-1)
    else:
        ids = torch.multinomial(probabilities.flatten(0, 1).float(), 1).view(probabilities.shape[:2])
    return F.embedding(ids, codebook)


def training_target(probabilities: Tensor, ids: Tensor, target: str) -> Tensor:
    """Float[B,N,K]: what the network learns to predict, from q(z | z_t) Float[B,N,K] and the true ids Long[B,N]."""
    if target == "q(z|z_t)":
        return probabilities
    truth = F.one_hot(ids, probabilities.shape[-1]).to(probabilities.dtype)
    return truth if target == "z_0" else (probabilities + truth) / 2


def soft_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Float[...,V] logits, Float[...,K] target distribution over the first K <= V classes -> Float[...] loss in nats.

    Label smoothing spreads over all V classes; the target is zero beyond K.
    """
    logits, target = logits.float(), target.float()
    hit = (logits[..., : target.shape[-1]] * target).sum(-1)
    total = (1 - smoothing) * target.sum(-1) + smoothing
    return total * logits.logsumexp(-1) - (1 - smoothing) * hit - smoothing * logits.mean(-1)


def cosine_ratio(progress: float) -> float:
    """Share of tokens left masked after `progress` in [0, 1] of the steps."""
    return math.cos(math.pi / 2 * progress)


def linear_ratio(progress: float) -> float:
    """Share of tokens left masked after `progress` in [0, 1] of the steps."""
    return 1 - progress


SCHEDULES = {"cosine": cosine_ratio, "linear": linear_ratio}
