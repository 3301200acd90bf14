"""The page of `addp app`: what its buttons do, and its layout. Needs gradio."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from addp_core.data.images import eval_transform
from addp_core.method.addp import ADDP
from addp_core.method.sampler import ORDERS, SampleConfig, denoise, inpaint, sampling_noise


@dataclass(frozen=True)
class Limits:
    """The most that a visitor of the page may ask for."""

    images: int  # at a time
    steps: int  # of sampling
    pixels: int  # of an uploaded image


class PageActions:
    """What the page's buttons do. Raises `gr.Error`, which the page displays, if the input is wrong."""

    def __init__(self, model: ADDP, limits: Limits):
        self.model, self.limits = model, limits
        self.device = next(model.parameters()).device

    def generate(self, n: int, seed: int, *sampling: Any) -> Iterator[list[Image.Image]]:
        """Yield the images after each step."""
        config, n = self.sample_config(*sampling), within_limit("images", n, self.limits.images)
        noise = sampling_noise(config.steps, self.model.config.tokens, int(seed), range(n))
        for step in denoise(self.model, noise.to(self.device), config):
            yield to_pil_images(step.image)

    def fill(
        self, editor_value: dict[str, Any] | None, n: int, seed: int, blend: int, *sampling: Any
    ) -> list[Image.Image]:
        """Return `n` variations of the image in the editor, with the painted part filled."""
        config, n = self.sample_config(*sampling), within_limit("images", n, self.limits.images)
        image, hole = self.read_editor(editor_value)
        images = image.expand(n, -1, -1, -1).to(self.device)
        holes = hole.expand(n, -1, -1).to(self.device)
        return to_pil_images(inpaint(self.model, images, holes, **vars(config), seed=int(seed), blend=int(blend)))

    def read_editor(self, editor_value: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
        """Return the editor's image, Float[3,H,W] in [0,1], and what was painted over, Bool[H,W], at the model's
        size.
        """
        if not editor_value or editor_value.get("background") is None:
            raise gr.Error("Upload an image first, then paint over the part to fill.")
        background = editor_value["background"].convert("RGB")
        if background.width * background.height > self.limits.pixels:
            raise gr.Error(f"The image has more than {self.limits.pixels} pixels.")
        painted = np.zeros(background.size[::-1], dtype=bool)
        for layer in editor_value.get("layers") or []:
            painted |= np.array(layer.convert("RGBA"))[..., 3] > 0
        crop = eval_transform(self.model.config.image_size)
        bounds = crop.box(background.width, background.height)
        hole = Image.fromarray(painted).resize(crop.hw[::-1], Image.Resampling.NEAREST, box=bounds)
        return crop(background), torch.from_numpy(np.array(hole))

    def sample_config(
        self, steps: float, schedule: Any, temperature: float, top_p: float, top_k: float, order: Any
    ) -> SampleConfig:
        """Return the settings of the page's sampling controls."""
        steps = within_limit("steps", steps, self.limits.steps)
        try:
            return SampleConfig(steps, schedule, float(temperature), float(top_p), int(top_k), order)
        except ValueError as error:
            raise gr.Error(str(error)) from error


def within_limit(name: str, value: float, limit: int) -> int:
    """Return `value` as an integer. Raises `gr.Error` unless it is 1 to `limit`."""
    if not 1 <= int(value) <= limit:
        raise gr.Error(f"{name}: {value}; expected 1 to {limit}")
    return int(value)


def to_pil_images(images: Tensor) -> list[Image.Image]:
    """Convert Float[B,3,H,W], clamped to [0,1]."""
    return [to_pil_image(image) for image in images.clamp(0, 1).float().cpu()]


def build_page(actions: PageActions, model_name: str) -> gr.Blocks:
    """Lay out the page: the sampler's settings beside a tab to generate images and a tab to fill holes."""
    limits, default = actions.limits, SampleConfig()
    with gr.Blocks(title="addp", analytics_enabled=False) as blocks:
        gr.Markdown(f"## addp\n`{model_name}`, {' x '.join(map(str, actions.model.config.image_size))} pixels")
        with gr.Row():
            with gr.Column(scale=1):
                n = gr.Slider(1, limits.images, min(4, limits.images), step=1, label="images")
                seed = gr.Number(0, precision=0, label="seed")
                sampling = [
                    gr.Slider(1, limits.steps, min(default.steps, limits.steps), step=1, label="steps"),
                    gr.Radio(["cosine", "linear"], value=default.schedule, label="schedule"),
                    gr.Slider(0, 20, default.temperature, label="temperature"),
                    gr.Slider(0, 1, default.top_p, label="top-p"),
                    gr.Slider(0, 256, default.top_k, step=1, label="top-k (0: all)"),
                    gr.Radio(list(ORDERS), value=default.order, label="order"),
                ]
            with gr.Column(scale=3):
                with gr.Tab("generate"):
                    generate_button = gr.Button("generate", variant="primary")
                    generated = gr.Gallery(label="the images after each step", columns=4)
                    generate_button.click(actions.generate, [n, seed, *sampling], generated)
                with gr.Tab("inpaint"):
                    editor = gr.ImageEditor(type="pil", label="upload an image, then paint over the part to fill")
                    blend = gr.Slider(0, 64, 8, step=1, label="pixels over which the seam is blended")
                    fill_button = gr.Button("fill", variant="primary")
                    filled = gr.Gallery(label="variations", columns=4)
                    fill_button.click(actions.fill, [editor, n, seed, blend, *sampling], filled)
    return blocks
