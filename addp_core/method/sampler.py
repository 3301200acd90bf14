"""Generation and inpainting by alternating denoising: ids from pixels, pixels from ids (Sec. 3.4, App. E).

Every step samples ids at the masked positions, keeps some of them, and decodes the mixture into the image that the next
step looks at. The token predictor is not needed. What is drawn for image i depends on the seed and on i alone.

Which ids are kept: the most confident ones, with Gumbel noise, as in the paper; or, beyond it, those at the next points
of a Halton sequence over the grid (Halton-MaskGIT, ICLR 2025), so that ids drawn together lie far apart.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor
from torch.nn import functional as F

from addp_core.base.rng import generator
from addp_core.method.addp import ADDP
from addp_core.method.diffusion import SCHEDULES, map_tokens

ORDERS = ("confidence", "halton")


@dataclass(frozen=True)
class SampleConfig:
    """How to sample; the defaults are the paper's (256 steps with the linear schedule)."""

    steps: Annotated[int, Ge(1), "denoising steps"] = 20
    schedule: Annotated[Literal["cosine", "linear"], "share of tokens still masked after each step"] = "cosine"
    temperature: Annotated[float, Ge(0), "of the Gumbel noise on the confidence, falling to 0 at the last step"] = 6.0
    top_p: Annotated[
        float, Interval(ge=0, le=1), "nucleus that ids are drawn from; 1 is all of them, 0 the most probable one"
    ] = 1.0
    top_k: Annotated[int, Ge(0), "ids are drawn from this many most probable ones; 0 is all of them"] = 0
    order: Annotated[
        Literal["confidence", "halton"],
        "which ids a step keeps: the most confident, or those at well spread positions (temperature is not read then)",
    ] = "confidence"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps: found {self.steps}, expected a whole number >= 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: found {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.temperature < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(f"temperature, top_p: found {self.temperature}, {self.top_p}; expected >= 0 and in [0, 1]")
        if self.top_k < 0 or self.order not in ORDERS:
            raise ValueError(
                f"top_k, order: found {self.top_k}, {self.order!r}; expected >= 0 and one of {', '.join(ORDERS)}"
            )


@dataclass(frozen=True)
class SamplerState:
    """After a step: image Float[B,3,H,W], unclamped; ids Long[B,N]; mask Bool[B,N], True where still unreliable."""

    image: Tensor
    ids: Tensor
    mask: Tensor


OnStep = Callable[[int, SamplerState], None]


def sample(
    model: ADDP,
    n: int,
    steps: int = 20,
    schedule: str = "cosine",
    temperature: float = 6.0,
    top_p: float = 1.0,
    seed: int = 0,
    *,
    top_k: int = 0,
    order: str = "confidence",
    first: int = 0,
    batch: int = 16,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generate images number `first` to `first + n - 1` of this seed -> Float[n,3,H,W] in [0,1], on the model's device.

    batch: images at a time. on_step(step, Step) is called after every step of every batch, for intermediate images.
    """
    config = SampleConfig(steps, schedule, temperature, top_p, top_k, order)
    device = model.denoiser.mean.device
    height, width = model.config.image_size
    images = torch.empty(n, 3, height, width, device=device)
    for start in range(0, n, batch):
        rows = range(first + start, first + min(start + batch, n))
        noise = sampling_noise(config.steps, model.config.tokens, seed, rows).to(device)
        images[start : start + len(rows)] = _last(denoise(model, noise, config), on_step).image.clamp(0, 1)
    return images


def inpaint(
    model: ADDP,
    images: Tensor,
    hole: Tensor,
    steps: int = 20,
    seed: int = 0,
    *,
    schedule: str = "cosine",
    temperature: float = 6.0,
    top_p: float = 1.0,
    top_k: int = 0,
    order: str = "confidence",
    blend: int = 8,
    first: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Fill the holes (App. E): images Float[B,3,H,W] in [0,1], hole Bool[B,H,W] (True = to be filled) -> Float[B,3,H,W]
    in [0,1].

    Pixels outside the hole come back unchanged and pixels under it are never read. blend: width in pixels, inside the
    hole, over which the seam is evened out linearly. Row i is variation `first + i` of this seed. ValueError where the
    shapes do not fit the model.
    """
    if tuple(images.shape[-2:]) != tuple(model.config.image_size) or hole.shape != (len(images), *images.shape[-2:]):
        raise ValueError(
            f"inpaint: images {tuple(images.shape)} and hole {tuple(hole.shape)}; "
            f"expected [B,3,H,W] and [B,H,W] with H x W = {model.config.image_size[0]} x {model.config.image_size[1]}"
        )
    config, hole = SampleConfig(steps, schedule, temperature, top_p, top_k, order), hole.bool()
    seen = (~hole).unsqueeze(1)
    mean = torch.where(seen, images, 0).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True).clamp(min=1)
    filled = torch.where(seen, images, mean)
    ids = model.encode_images(filled)
    mask = F.max_pool2d(hole.unsqueeze(1).to(images.dtype), model.config.tokenizer.stride).flatten(1) > 0

    result = images.clone()
    for begin, rows in _rows_by_start(mask, config):
        numbers = [first + int(i) for i in rows]
        noise = sampling_noise(config.steps, model.config.tokens, seed, numbers).to(images.device)
        state = SamplerState(filled[rows], ids[rows], mask[rows])
        generated = _last(denoise(model, noise, config, state, begin), on_step, begin).image.clamp(0, 1)
        result[rows] = composite(images[rows], generated, hole[rows], blend)
    return result


@torch.no_grad()
def denoise(
    model: ADDP, noise: Tensor, config: SampleConfig, state: SamplerState | None = None, begin: int = 0
) -> Iterator[SamplerState]:
    """The alternating denoising from step `begin` on, a Step at a time (Sec. 3.4).

    noise: Float[B,S,2,N] uniform in (0,1), for the ids and for the confidence. state: where to start, by default all
    masked.
    """
    batch, tokens, codes = len(noise), model.config.tokens, model.config.tokenizer.codebook
    codebook = model.tokenizer.quantize.embedding.weight
    if state is None:
        blank = torch.zeros(batch, tokens, dtype=torch.long, device=noise.device)
        state = SamplerState(torch.empty(0, device=noise.device), blank, torch.ones_like(blank, dtype=torch.bool))
    turn = halton_turn(model.config.grid, noise) if config.order == "halton" else None
    for step in range(begin, config.steps):
        if bool(state.mask.all()):
            # Nothing is known: the encoder's output would be replaced everywhere, and all images get the same
            # distribution.
            logits = model.denoiser.decoder(None, state.ids[:1], state.mask[:1], vocabulary=codes).expand(batch, -1, -1)
        else:
            found = model.denoiser(state.image, state.ids, state.mask, vocabulary=codes, masked_only=True)
            logits = found.new_zeros(batch, tokens, codes)  # what stands at reliable positions is not read
            logits[state.mask] = found
        probabilities = logits.float().softmax(-1)
        drawn = draw_ids(probabilities, noise[:, step, 0], config.top_p, config.top_k)
        ids = torch.where(state.mask, drawn, state.ids)

        progress = (step + 1) / config.steps
        if turn is None:
            gumbel = -(-noise[:, step, 1].log()).log()
            likely = probabilities.gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()
            confidence = likely + config.temperature * (1 - progress) * gumbel
        else:
            confidence = -turn
        left = min(max(math.ceil(tokens * SCHEDULES[config.schedule](progress)), 1), tokens)
        rank = confidence.masked_fill(~state.mask, math.inf).argsort(1).argsort(1)
        mask = (rank < left) & state.mask
        state = SamplerState(model.render(map_tokens(probabilities, codebook, "weighted"), ids, mask), ids, mask)
        yield state


def draw_ids(probabilities: Tensor, uniform: Tensor, top_p: float, top_k: int = 0) -> Tensor:
    """Float[B,N,K] distributions, Float[B,N] uniform in (0,1) -> Long[B,N] ids, drawn from the nucleus of mass `top_p`
    of the `top_k` most probable ones (0: of all).
    """
    if top_p <= 0:
        return probabilities.argmax(-1)
    if top_p < 1 or top_k:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        mass = top_p
        if top_k:
            ordered[..., top_k:] = 0
            mass = top_p * ordered.sum(-1, keepdim=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= mass, 0)
        kept[..., 0] = ordered[..., 0]
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
    cumulative = probabilities.cumsum(-1)
    threshold = uniform.unsqueeze(-1) * cumulative[..., -1:]
    return (
        torch.searchsorted(cumulative, threshold.contiguous(), right=True)
        .squeeze(-1)
        .clamp(max=probabilities.shape[-1] - 1)
    )


def sampling_noise(steps: int, tokens: int, seed: int, rows) -> Tensor:
    """Uniform noise of these images, Float[B,S,2,N] in (0,1); row i's depends on seed, i and shape alone."""
    noise = torch.stack([torch.rand(steps, 2, tokens, generator=generator(seed, "sample", int(i))) for i in rows])
    return noise.clamp(1e-6, 1 - 1e-6)


def halton_turn(grid: tuple[int, int], noise: Tensor) -> Tensor:
    """Float[B,N]: each position's place in the Halton order of the grid, rolled over its edges by an offset of the
    image's own, drawn from `noise` Float[B,S,2,N].
    """
    turn = torch.tensor(halton_order(grid), dtype=torch.float).argsort().view(grid)
    offsets = (noise[:, 0, 1, [0, -1]].cpu() * torch.tensor(grid)).long().tolist()
    return torch.stack([turn.roll(offset, (0, 1)).flatten() for offset in offsets]).to(noise)


@functools.cache
def halton_order(grid: tuple[int, int]) -> tuple[int, ...]:
    """All positions (row-major) of a grid (rows, columns), as a Halton sequence of bases 2 and 3 first meets them."""
    rows, columns = grid
    order: dict[int, None] = {}
    point = 0
    while len(order) < rows * columns:
        point += 1
        order.setdefault(int(radical_inverse(point, 2) * rows) * columns + int(radical_inverse(point, 3) * columns))
    return tuple(order)


def radical_inverse(n: int, base: int) -> float:
    """The digits of `n` mirrored at the point: in [0, 1)."""
    value, scale = 0.0, 1.0
    while n:
        scale /= base
        value += scale * (n % base)
        n //= base
    return value


def composite(images: Tensor, generated: Tensor, hole: Tensor, blend: int) -> Tensor:
    """Generated pixels in the hole, the input's elsewhere; Float[B,3,H,W] twice and Bool[B,H,W] -> Float[B,3,H,W] in
    [0,1].

    The step in colour at the hole's edge is carried into the hole and fades linearly over `blend` pixels, so that the
    seam vanishes without a look at what lies under the hole.
    """
    seen = (~hole).unsqueeze(1).to(images.dtype)
    offset, known, weight = torch.where(seen > 0, images - generated, 0), seen, seen
    for ring in range(1, blend + 1):
        near = F.avg_pool2d(known, 3, 1, 1)
        spread = F.avg_pool2d(offset, 3, 1, 1) / near.clamp(min=1e-6)
        new = ((near > 0) & (known == 0)).to(images.dtype)
        offset, known = offset + spread * new, known + new
        weight = weight + new * (1 - ring / (blend + 1))
    return torch.where(hole.unsqueeze(1), generated + offset * weight, images).clamp(0, 1)


def _rows_by_start(mask: Tensor, config: SampleConfig) -> list[tuple[int, Tensor]]:
    """Rows that start at the same step: the last one at which the schedule leaves at least the row's share masked."""
    tokens = mask.shape[1]
    lefts = [tokens * SCHEDULES[config.schedule](s / config.steps) for s in range(config.steps)]
    groups: dict[int, list[int]] = {}
    for row, masked in enumerate(mask.sum(1).tolist()):
        if masked:
            groups.setdefault(max(s for s, left in enumerate(lefts) if left >= masked), []).append(row)
    return [(begin, torch.tensor(rows, device=mask.device)) for begin, rows in sorted(groups.items())]


def _last(states: Iterator[SamplerState], on_step: OnStep | None, begin: int = 0) -> SamplerState:
    for number, state in enumerate(states, begin):
        if on_step:
            on_step(number, state)
    return state
