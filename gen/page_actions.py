"""What the buttons of `addp app` do, without the page itself: no gradio in here."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError, LazyImage, wrap_image_errors
from addp_core.method.addp import ADDP
from addp_core.method.mage import MAGE
from addp_core.method.sampler import SampleConfig, composite, denoise, inpainting_states, sampling_noise
from gen.drawing import UNRELIABLE_GRAY, evenly_spaced, gray_out
from gen.page_html import Section, tile
from gen.recipe import Box
from gen.uploads import NOT_AN_IMAGE, check_pixels

NO_IMAGE = "Upload an image first, then paint over the part to fill; a file that is not an image does not appear."
NOTHING_PAINTED = "Paint over the part of the image to fill first: nothing is painted yet."
STOPPED_EARLY = "Stopped before the first step."
HISTORY_STEPS = 10  # of each image, that are shown at the end
HISTORY_SIDE = 128  # pixels, at most

Wanted = Callable[[], bool]  # whether the visitor still waits for what is computed
Reached = tuple[int, Tensor, Tensor]  # a step from 0, its images, Float[B,3,H,W], and unreliable tokens, Bool[B,N]


@dataclass(frozen=True)
class Limits:
    """The most that a visitor of the page may ask for."""

    images: int  # at a time
    steps: int  # of sampling
    pixels: int  # of an uploaded image


@dataclass(frozen=True)
class Result:
    """What an action has so far: a line about it, and pictures (None: as before)."""

    note: str
    sections: list[Section] | None = None


class Clicks:
    """Which of the computations that visitors have asked for are still wanted.

    A visitor stops all of their own at once, those that still wait for their turn too, or leaves.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._current: dict[str, int] = {}

    def begin(self, visitor: str) -> int:
        """Return the number that a computation needs to stay wanted."""
        return self._current.setdefault(visitor, next(self._numbers))

    def stop(self, visitor: str) -> None:
        """Stop all that the visitor has begun."""
        if visitor in self._current:
            self._current[visitor] = next(self._numbers)

    def leave(self, visitor: str) -> None:
        """Stop all that the visitor has begun, and forget the visitor."""
        self._current.pop(visitor, None)

    def is_wanted(self, visitor: str, number: int) -> bool:
        """Check whether the visitor has neither stopped nor left since `begin` returned this number."""
        return self._current.get(visitor) == number


class PageActions:
    """What the page's buttons do with a model. Raises UserError, which the page displays, if the input is wrong."""

    def __init__(self, model: ADDP | MAGE, limits: Limits):
        self.model, self.limits = model, limits
        self.device = next(model.parameters()).device

    def generate(self, wanted: Wanted, n: Any, seed: Any, *sampling: Any) -> Iterator[Result]:
        """Yield the images after each step, while they are wanted; at the end, some of the steps side by side."""
        config, n, seed = self.sample_config(*sampling), within_limit("images", n, self.limits.images), as_seed(seed)
        noise = sampling_noise(config.steps, self.model.config.tokens, seed, range(n))
        states = enumerate(denoise(self.model, noise.to(self.device), config))
        yield from self._show_steps(wanted, ((step, state.image, state.mask) for step, state in states), config)

    def fill(
        self, wanted: Wanted, editor_value: Mapping[str, Any] | None, n: Any, seed: Any, blend: Any, *sampling: Any
    ) -> Iterator[Result]:
        """Yield `n` variations of the image in the editor, with the painted part filled, after each step."""
        config, n, seed = self.sample_config(*sampling), within_limit("images", n, self.limits.images), as_seed(seed)
        image, hole, note = self.read_editor(editor_value)
        width = int(as_number("blend", blend))
        images, holes = image.expand(n, -1, -1, -1).to(self.device), hole.expand(n, -1, -1).to(self.device)

        def filled() -> Iterator[Reached]:  # all rows go together, since their holes are the same
            for step, rows, state in inpainting_states(self.model, images, holes, config, seed):
                yield step, composite(images[rows], state.image.clamp(0, 1), holes[rows], width), state.mask

        yield from self._show_steps(wanted, filled(), config, note)

    def _show_steps(
        self, wanted: Wanted, steps: Iterator[Reached], config: SampleConfig, note: str = ""
    ) -> Iterator[Result]:
        """Yield the images of each step, and at the end, or when they are no longer wanted, their history too."""
        history: dict[int, Reached] = {}
        kept: set[int] = set()
        while wanted():
            reached = next(steps, None)
            if reached is None:
                return
            step, images, mask = reached
            kept = kept or {step + i for i in evenly_spaced(config.steps - step, HISTORY_STEPS)}
            history = {number: each for number, each in history.items() if number in kept}  # not only the latest
            history[step] = step, shrink(images), mask
            sections = [Section("", [tile(each, f"image {i}") for i, each in enumerate(to_pil_images(images))])]
            progress = f"step {step + 1} of {config.steps}."
            if step + 1 == config.steps:
                sections += self._history([*history.values()])
            yield Result(f"{progress.capitalize()} {note}".strip(), sections)
            if step + 1 == config.steps:
                return
        if not history:
            yield Result(STOPPED_EARLY)
        else:
            yield Result(f"Stopped after {progress} {note}".strip(), [*sections, *self._history([*history.values()])])

    def _history(self, steps: list[Reached]) -> Iterable[Section]:
        """Yield the steps of each image side by side, each above the part of it that is reliable by then."""
        for row in range(len(steps[0][1])):
            tiles = []
            for step, images, mask in steps:
                image, height = images[row], images.shape[-2]
                reliable = gray_out(image, mask[row].cpu().view(1, *self.model.config.grid))
                gap = image.new_full((3, max(height // 16, 1), images.shape[-1]), UNRELIABLE_GRAY)
                stacked = to_pil_image(torch.cat([image, gap, reliable], 1))
                tiles.append(tile(stacked, f"step {step + 1}, {mask[row].float().mean():.0%} unreliable"))
            yield Section(f"image {row}, step by step, and below the part that is reliable by then", tiles, row=True)

    def read_editor(self, editor_value: Mapping[str, Any] | None) -> tuple[Tensor, Tensor, str]:
        """Return the part of the editor's image that the model fills, Float[3,H,W] in [0,1], what was painted over,
        Bool[H,W], both at the model's size, and a note that says which part it is ("" for the whole image).
        """
        background = (editor_value or {}).get("background")
        if not editor_value or background is None:
            raise UserError(NO_IMAGE)
        check_pixels(background.width, background.height, self.limits.pixels)
        height, width = self.model.config.image_size
        try:
            with wrap_image_errors():
                is_blank = background.convert("RGBA").getextrema()[3][1] == 0  # the editor's empty canvas
        except ImageError as error:
            raise UserError(NOT_AN_IMAGE) from error
        if is_blank:
            raise UserError(NO_IMAGE)
        painted = read_layers(editor_value.get("layers") or [], background.size)
        left, top, right, bottom = place_crop(painted, (height, width))
        pixels = LazyImage(background).crop((left, top, right, bottom), (width, height))
        inside = torch.from_numpy(painted[top:bottom, left:right])
        # Every painted pixel counts, however thin the stroke is at the model's size.
        hole = F.adaptive_max_pool2d(inside[None].float(), (height, width))[0] > 0
        note = ""
        if (right - left, bottom - top) != background.size:
            note = (
                f"The model works on {width} x {height} pixels: this is the part of the image from ({left}, {top}) to "
                f"({right}, {bottom})."
            )
        return pil_to_tensor(pixels).float() / 255, hole, note

    def sample_config(
        self, steps: Any, schedule: Any, temperature: Any, top_p: Any, top_k: Any, order: Any
    ) -> SampleConfig:
        """Return the settings of the page's sampling controls."""
        steps = within_limit("steps", steps, self.limits.steps)
        numbers = as_number("temperature", temperature), as_number("top-p", top_p), int(as_number("top-k", top_k))
        try:
            return SampleConfig(steps, schedule, *numbers, order)
        except ValueError as error:
            raise UserError(str(error)) from error


def to_pil_images(images: Tensor) -> list[Image.Image]:
    """Return Float[B,3,H,W] as Pillow images."""
    return [to_pil_image(image) for image in images.float().clamp(0, 1).cpu()]


def shrink(images: Tensor) -> Tensor:
    """Return images, Float[B,3,H,W], in [0,1] and with sides of at most HISTORY_SIDE, on the CPU."""
    images = images.float().clamp(0, 1).cpu()
    factor = HISTORY_SIDE / max(images.shape[-2:])
    return F.interpolate(images, scale_factor=factor, mode="area") if factor < 1 else images


def read_layers(layers: list[Image.Image], size: tuple[int, int]) -> np.ndarray:
    """Return what is painted in any layer of an editor, Bool[H,W]. Raises UserError if nothing is.

    size: width and height of the image below the layers.
    """
    painted = np.zeros(size[::-1], dtype=bool)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        painted |= np.array(alpha if alpha.size == size else alpha.resize(size, Image.Resampling.NEAREST)) > 0
    if not painted.any():
        raise UserError(NOTHING_PAINTED)
    return painted


def place_crop(painted: np.ndarray, hw: tuple[int, int]) -> Box:
    """Return the largest box with the aspect ratio of `hw` that lies within the image and covers everything painted:
    the central one if that does, otherwise the nearest to it.

    painted: Bool[H,W]. Raises UserError if no such box covers it.
    """
    height, width = painted.shape
    size = min(width, max(round(height * hw[1] / hw[0]), 1)), min(height, max(round(width * hw[0] / hw[1]), 1))
    starts = []
    for axis, (length, side) in enumerate(zip((width, height), size, strict=True)):
        at = np.flatnonzero(painted.any(axis))
        first, last = int(at[0]), int(at[-1]) + 1
        if last - first > side:
            raise UserError(
                f"The painted part is {last - first} pixels {'wide' if axis == 0 else 'high'}, but the model, which "
                f"works on {hw[1]} x {hw[0]} pixels, can see {size[0]} x {size[1]} of this image: paint a smaller "
                "part, or crop the image first."
            )
        starts.append(min(max((length - side) // 2, last - side), first))
    left, top = starts
    return left, top, left + size[0], top + size[1]


def as_number(name: str, value: Any) -> float:
    """Return a control's value as a number. Raises UserError if the field is empty or holds none."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {'empty' if value is None else value}; expected a number") from error
    if not math.isfinite(number):
        raise UserError(f"{name}: {value}; expected a number")
    return number


def as_seed(value: Any) -> int:
    """Return the random seed."""
    return int(as_number("seed", value))


def within_limit(name: str, value: Any, limit: int) -> int:
    """Return `value` as an integer. Raises UserError unless it is 1 to `limit`."""
    number = int(as_number(name, value))
    if not 1 <= number <= limit:
        raise UserError(f"{name}: {value}; expected 1 to {limit}")
    return number
