"""Generation and inpainting by alternating denoising: ids from pixels, pixels from ids (Sec. 3.4, App. E).

Every step draws ids at the masked positions, keeps some of them, and decodes the mixture into the image that the next
step sees. The token predictor is not needed. MAGE's own sampling is the same loop without the images. The random
numbers of image i depend on the seed and on i only.

A step keeps the most confident ids, with Gumbel noise on the confidence, as in the paper. As an addition to the paper,
it can keep those at the next points of a Halton sequence over the grid (Halton-MaskGIT, ICLR 2025), so that ids that
are drawn together lie far apart.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from addp_core.base.rng import generator
from addp_core.method.config import ORDERS as ORDERS
from addp_core.method.config import Order as Order
from addp_core.method.config import SampleConfig as SampleConfig
from addp_core.method.config import Schedule as Schedule
from addp_core.method.config import TokenizedImages
from addp_core.method.diffusion import SCHEDULES, map_tokens
from addp_core.networks.tokenizer import Tokenizer


class GenerativeModel(Protocol):
    """What the loop needs of a model: `ADDP` or `MAGE`, whose methods describe themselves.

    reads_images: whether `next_probabilities` reads the images, which every step has to decode then.
    """

    reads_images: ClassVar[bool]

    @property
    def config(self) -> TokenizedImages: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    def encode_images(self, images: Tensor) -> Tensor: ...
    def next_probabilities(self, images: Tensor, ids: Tensor, mask: Tensor, masked: Sequence[int]) -> Tensor: ...
    def masked_after(self, share: float, masked: int) -> int: ...
    def render(self, embeddings: Tensor, ids: Tensor, mask: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SamplerState:
    """The state after a step.

    image: Float[B,3,H,W], unclamped. ids: Long[B,N]. mask: Bool[B,N], True where the id is still unreliable. masked:
    how many ids of each image are, so that the host need not ask the device.
    """

    image: Tensor
    ids: Tensor
    mask: Tensor
    masked: Sequence[int]


OnStep = Callable[[int, SamplerState], None]


def sample(
    model: GenerativeModel,
    n: int,
    steps: int = 20,
    schedule: Schedule = "cosine",
    temperature: float = 6.0,
    top_p: float = 1.0,
    seed: int = 0,
    *,
    top_k: int = 0,
    order: Order = "confidence",
    first: int = 0,
    batch: int = 16,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generate n images, Float[n,3,H,W] in [0,1], on the model's device.

    Args:
        steps, schedule, temperature, top_p, top_k, order: see `SampleConfig`.
        first: generate images `first` to `first + n - 1` of this seed.
        batch: images at a time.
        on_step: called as on_step(step, SamplerState) after every step of every batch, for intermediate images.
    """
    config = SampleConfig(steps, schedule, temperature, top_p, top_k, order)
    device = model.tokenizer.quantize.embedding.weight.device
    height, width = model.config.image_size
    images = torch.empty(n, 3, height, width, device=device)
    for start in range(0, n, batch):
        rows = range(first + start, first + min(start + batch, n))
        noise = sampling_noise(config.steps, model.config.tokens, seed, rows).to(device, non_blocking=True)
        states = denoise(model, noise, config, every_image=on_step is not None)
        images[start : start + len(rows)] = _final_state(states, on_step).image.clamp(0, 1)
    return images


def inpaint(
    model: GenerativeModel,
    images: Tensor,
    hole: Tensor,
    steps: int = 20,
    seed: int = 0,
    *,
    schedule: Schedule = "cosine",
    temperature: float = 6.0,
    top_p: float = 1.0,
    top_k: int = 0,
    order: Order = "confidence",
    blend: int = 8,
    first: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Fill the holes of images (App. E), -> Float[B,3,H,W] in [0,1].

    Pixels outside the hole come back unchanged, and pixels under it are never read. Raises ValueError if the shapes do
    not fit the model.

    Args:
        images: Float[B,3,H,W] in [0,1].
        hole: Bool[B,H,W], True where the image is to be filled.
        steps, schedule, temperature, top_p, top_k, order: see `SampleConfig`.
        blend: width in pixels, inside the hole, over which the seam fades linearly.
        first: row i is variation `first + i` of this seed.
        on_step: called as on_step(step, SamplerState) after every step.
    """
    config, hole = SampleConfig(steps, schedule, temperature, top_p, top_k, order), hole.bool()
    result = images.clone()
    for step, rows, state in inpainting_states(model, images, hole, config, seed, first):
        if on_step:
            on_step(step, state)
        if step == config.steps - 1:
            result[rows] = composite(images[rows], state.image.clamp(0, 1), hole[rows], blend)
    return result


def inpainting_states(
    model: GenerativeModel, images: Tensor, hole: Tensor, config: SampleConfig, seed: int = 0, first: int = 0
) -> Iterator[tuple[int, Tensor, SamplerState]]:
    """Yield the step, the rows, Long[R], and their state after each step of `inpaint`: what `composite` puts into the
    holes. Rows whose holes cover about as many tokens go together, and one such group after the other.

    Arguments and errors are those of `inpaint`.
    """
    if tuple(images.shape[-2:]) != tuple(model.config.image_size) or hole.shape != (len(images), *images.shape[-2:]):
        raise ValueError(
            f"inpaint: images {tuple(images.shape)} and hole {tuple(hole.shape)}; "
            f"expected [B,3,H,W] and [B,H,W] with H x W = {model.config.image_size[0]} x {model.config.image_size[1]}"
        )
    outside = (~hole).unsqueeze(1)
    mean = torch.where(outside, images, 0).sum((2, 3), keepdim=True) / outside.sum((2, 3), keepdim=True).clamp(min=1)
    prefilled = torch.where(outside, images, mean)
    ids = model.encode_images(prefilled)
    mask = F.max_pool2d(hole.unsqueeze(1).to(images.dtype), model.config.tokenizer.stride).flatten(1) > 0

    masked = mask.sum(1).tolist()
    for first_step, numbers in _rows_by_first_step(masked, model.config.tokens, config):
        rows = torch.tensor(numbers).to(images.device, non_blocking=True)
        noise = sampling_noise(config.steps, model.config.tokens, seed, [first + i for i in numbers])
        noise = noise.to(images.device, non_blocking=True)
        state = SamplerState(prefilled[rows], ids[rows], mask[rows], [masked[i] for i in numbers])
        for step, reached in enumerate(denoise(model, noise, config, state, first_step), first_step):
            yield step, rows, reached


@torch.no_grad()
def denoise(
    model: GenerativeModel,
    noise: Tensor,
    config: SampleConfig,
    state: SamplerState | None = None,
    first_step: int = 0,
    every_image: bool = True,
) -> Iterator[SamplerState]:
    """Run the alternating denoising from step `first_step` on and yield the state after each step (Sec. 3.4).

    Args:
        noise: Float[B,S,2,N] uniform in (0,1), for the ids and for the confidence.
        state: the initial state (default: all positions masked).
        every_image: without it, a model that does not read images decodes the last one alone; the states before have
            that of `state`.
    """
    batch, tokens = len(noise), model.config.tokens
    codebook = model.tokenizer.quantize.embedding.weight
    if state is None:
        no_ids = torch.zeros(batch, tokens, dtype=torch.long, device=noise.device)
        all_masked = torch.ones_like(no_ids, dtype=torch.bool)
        state = SamplerState(torch.empty(0, device=noise.device), no_ids, all_masked, [tokens] * batch)
    ranks = halton_ranks(model.config.grid, noise) if config.order == "halton" else None
    for step in range(first_step, config.steps):
        probabilities = model.next_probabilities(state.image, state.ids, state.mask, state.masked)
        drawn = draw_ids(probabilities, noise[:, step, 0], config.top_p, config.top_k)
        ids = torch.where(state.mask, drawn, state.ids)

        progress = (step + 1) / config.steps
        if ranks is None:
            gumbel = -(-noise[:, step, 1].log()).log()
            log_probability = probabilities.gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()
            confidence = log_probability + config.temperature * (1 - progress) * gumbel
        else:
            confidence = -ranks
        still_masked = model.masked_after(SCHEDULES[config.schedule](progress), max(state.masked))
        rank = confidence.masked_fill(~state.mask, math.inf).argsort(1).argsort(1)
        mask = (rank < still_masked) & state.mask
        image = state.image
        if model.reads_images or every_image or step == config.steps - 1:
            image = model.render(map_tokens(probabilities, codebook, "weighted"), ids, mask)
        state = SamplerState(image, ids, mask, [min(count, still_masked) for count in state.masked])
        yield state


def draw_ids(probabilities: Tensor, uniform: Tensor, top_p: float, top_k: int = 0) -> Tensor:
    """Draw ids, Long[B,N], from distributions Float[B,N,K] with random numbers Float[B,N] uniform in (0,1).

    top_k: of the most probable ids, use this many (0: all). top_p: of those, use the nucleus with this mass.
    """
    if top_p <= 0:
        return probabilities.argmax(-1)
    if top_p < 1 or top_k:
        descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
        mass: float | Tensor = top_p
        if top_k:
            descending[..., top_k:] = 0
            mass = top_p * descending.sum(-1, keepdim=True)
        preceding = descending.cumsum(-1) - descending
        nucleus = descending.masked_fill(preceding >= mass, 0)
        nucleus[..., 0] = descending[..., 0]
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, nucleus)
    cumulative = probabilities.cumsum(-1)
    threshold = uniform.unsqueeze(-1) * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, threshold.contiguous(), right=True).squeeze(-1)
    return ids.clamp(max=probabilities.shape[-1] - 1)


def sampling_noise(steps: int, tokens: int, seed: int, rows: Iterable[int]) -> Tensor:
    """Return uniform noise for these images, Float[B,S,2,N] in (0,1); image i's depends on seed, i and shape only."""
    noise = torch.stack([torch.rand(steps, 2, tokens, generator=generator(seed, "sample", int(i))) for i in rows])
    return noise.clamp(1e-6, 1 - 1e-6)


def halton_ranks(grid: tuple[int, int], noise: Tensor) -> Tensor:
    """Return each position's rank in the Halton order of the grid, Float[B,N].

    Each image shifts the order cyclically by an offset of its own, drawn from `noise` Float[B,S,2,N].
    """
    (rows, columns), device = grid, noise.device
    ranks = torch.tensor(halton_order(grid), dtype=torch.float).argsort().to(device, non_blocking=True)
    down, right = ((noise[:, 0, 1, i] * size).long()[:, None] for i, size in ((0, rows), (-1, columns)))
    row = (torch.arange(rows, device=device) - down) % rows
    column = (torch.arange(columns, device=device) - right) % columns
    return ranks[row[:, :, None] * columns + column[:, None]].flatten(1).to(noise.dtype)


@functools.cache
def halton_order(grid: tuple[int, int]) -> tuple[int, ...]:
    """Return all positions (row-major) of a grid in the order in which a Halton sequence (bases 2, 3) visits them."""
    rows, columns = grid
    order: dict[int, None] = {}
    point = 0
    while len(order) < rows * columns:
        point += 1
        order.setdefault(int(radical_inverse(point, 2) * rows) * columns + int(radical_inverse(point, 3) * columns))
    return tuple(order)


def radical_inverse(n: int, base: int) -> float:
    """Return the digits of `n` in this base, mirrored at the radix point: a number in [0, 1)."""
    value, scale = 0.0, 1.0
    while n:
        scale /= base
        value += scale * (n % base)
        n //= base
    return value


def composite(images: Tensor, generated: Tensor, hole: Tensor, blend: int) -> Tensor:
    """Put generated pixels into the hole: Float[B,3,H,W] twice and Bool[B,H,W] -> Float[B,3,H,W] in [0,1].

    The color difference at the edge of the hole is continued into the hole and fades linearly over `blend` pixels. The
    seam vanishes without reading the pixels under the hole.
    """
    outside = (~hole).unsqueeze(1).to(images.dtype)
    offset, reached, weight = torch.where(outside > 0, images - generated, 0), outside, outside
    for ring in range(1, blend + 1):
        neighbors = F.avg_pool2d(reached, 3, 1, 1)
        spread = F.avg_pool2d(offset, 3, 1, 1) / neighbors.clamp(min=1e-6)
        new = ((neighbors > 0) & (reached == 0)).to(images.dtype)
        offset, reached = offset + spread * new, reached + new
        weight = weight + new * (1 - ring / (blend + 1))
    return torch.where(hole.unsqueeze(1), generated + offset * weight, images).clamp(0, 1)


def _rows_by_first_step(counts: Sequence[int], tokens: int, config: SampleConfig) -> list[tuple[int, list[int]]]:
    """Group rows by their first step: the last one at which the schedule masks at least as many tokens as the row.

    counts: masked tokens of each row; rows without any are in no group.
    """
    masked_at = [tokens * SCHEDULES[config.schedule](s / config.steps) for s in range(config.steps)]
    groups: dict[int, list[int]] = {}
    for row, masked in enumerate(counts):
        if masked:
            groups.setdefault(max(s for s, count in enumerate(masked_at) if count >= masked), []).append(row)
    return sorted(groups.items())


def _final_state(states: Iterator[SamplerState], on_step: OnStep | None) -> SamplerState:
    for step, state in enumerate(states):
        if on_step:
            on_step(step, state)
    return state
