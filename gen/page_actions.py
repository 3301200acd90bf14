"""What the buttons of `addp app` do, without the page itself: no gradio in here."""

import math
import threading
from collections.abc import Iterator, Mapping
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
from addp_core.method.sampler import SampleConfig, SamplerState, denoise, inpaint, sampling_noise
from gen.recipe import Box

NOT_AN_IMAGE = "The uploaded file cannot be read as an image: upload a complete JPEG, PNG or WebP file."
NO_IMAGE = "Upload an image first, then paint over the part to fill; a file that is not an image does not appear."
NOTHING_PAINTED = "Paint over the part of the image to fill first: nothing is painted yet."

Result = tuple[list[Image.Image], str]  # images, and a line about them


@dataclass(frozen=True)
class Limits:
    """The most that a visitor of the page may ask for."""

    images: int  # at a time
    steps: int  # of sampling
    pixels: int  # of an uploaded image


class Stopped(Exception):
    """The visitor has pressed the stop button."""


class PageActions:
    """What the page's buttons do. Raises UserError, which the page displays, if the input is wrong.

    `visitor` names the open page that an action belongs to, so that its stop button stops nobody else's sampling.
    """

    def __init__(self, model: ADDP, limits: Limits):
        self.model, self.limits = model, limits
        self.device = next(model.parameters()).device
        self._stops: dict[str, threading.Event] = {}

    def generate(self, visitor: str, n: Any, seed: Any, *sampling: Any) -> Iterator[Result]:
        """Yield the images after each step, until the last one or until `stop`."""
        config, n, seed = self.sample_config(*sampling), within_limit("images", n, self.limits.images), as_seed(seed)
        stop = self._stops[visitor] = threading.Event()
        noise = sampling_noise(config.steps, self.model.config.tokens, seed, range(n))
        for step, state in enumerate(denoise(self.model, noise.to(self.device), config), 1):
            stopped = stop.is_set() and step < config.steps
            yield to_pil_images(state.image), f"{'Stopped after step' if stopped else 'Step'} {step} of {config.steps}."
            if stopped:
                return

    def fill(
        self, visitor: str, editor_value: Mapping[str, Any] | None, n: Any, seed: Any, blend: Any, *sampling: Any
    ) -> Result:
        """Return `n` variations of the image in the editor, with the painted part filled; none after `stop`."""
        config, n, seed = self.sample_config(*sampling), within_limit("images", n, self.limits.images), as_seed(seed)
        image, hole, note = self.read_editor(editor_value)
        stop = self._stops[visitor] = threading.Event()

        def stop_if_asked(step: int, _state: SamplerState) -> None:
            if stop.is_set() and step + 1 < config.steps:
                raise Stopped(f"Stopped after step {step + 1} of {config.steps}; nothing was filled.")

        try:
            images = inpaint(
                self.model,
                image.expand(n, -1, -1, -1).to(self.device),
                hole.expand(n, -1, -1).to(self.device),
                **vars(config),
                seed=seed,
                blend=int(as_number("blend", blend)),
                on_step=stop_if_asked,
            )
        except Stopped as stopped:
            return [], str(stopped)
        return to_pil_images(images), note

    def stop(self, visitor: str) -> None:
        """Stop the visitor's sampling after its current step; no effect if there is none."""
        if visitor in self._stops:
            self._stops[visitor].set()

    def read_editor(self, editor_value: Mapping[str, Any] | None) -> tuple[Tensor, Tensor, str]:
        """Return the part of the editor's image that the model fills, Float[3,H,W] in [0,1], what was painted over,
        Bool[H,W], both at the model's size, and a note that says which part it is ("" for the whole image).
        """
        background = (editor_value or {}).get("background")
        if not editor_value or background is None:
            raise UserError(NO_IMAGE)
        if background.width * background.height > self.limits.pixels:
            raise UserError(
                f"The image has {background.width} x {background.height} pixels, expected at most "
                f"{self.limits.pixels} in all: upload a smaller one."
            )
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


def to_pil_images(images: Tensor) -> list[Image.Image]:
    """Convert Float[B,3,H,W], clamped to [0,1]."""
    return [to_pil_image(image) for image in images.clamp(0, 1).float().cpu()]
