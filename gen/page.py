"""The page of `addp app`: what its buttons do, and how it is laid out. Needs gradio."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from addp_core.data.images import eval_transform
from addp_core.method.addp import ADDP
from addp_core.method.sampler import ORDERS, SampleConfig, denoise, inpaint, step_noise

if TYPE_CHECKING:
    from gen.app import Recipe

PAINTED = 0  # alpha of a brush stroke above which a pixel belongs to the hole


class Studio:
    """What the page's buttons do. Wrong input is a `gr.Error`, which the page shows."""

    def __init__(self, model: ADDP, recipe: "Recipe"):
        self.model, self.recipe = model, recipe

    def generate(self, n: int, seed: int, *sampling: Any) -> Iterator[list[Image.Image]]:
        """The images after each step."""
        config, n = self.settings(*sampling), self.limited("images", n, self.recipe.max_n)
        noise = step_noise(config.steps, self.model.config.tokens, int(seed), range(n))
        for step in denoise(self.model, noise.to(self.model.denoiser.mean.device), config):
            yield pictures(step.image)

    def fill(self, drawn: dict[str, Any] | None, n: int, seed: int, blend: int, *sampling: Any) -> list[Image.Image]:
        """Variations of a picture whose hole was painted over."""
        config, n = self.settings(*sampling), self.limited("images", n, self.recipe.max_n)
        image, hole = self.opened(drawn)
        device = self.model.denoiser.mean.device
        images, holes = image.expand(n, -1, -1, -1).to(device), hole.expand(n, -1, -1).to(device)
        return pictures(inpaint(self.model, images, holes, **vars(config), seed=int(seed), blend=int(blend)))

    def opened(self, drawn: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
        """What the editor holds -> Float[3,H,W] in [0,1] and Bool[H,W], at the model's size."""
        if not drawn or drawn.get("background") is None:
            raise gr.Error("Upload a picture first, then paint over what is to be filled.")
        background = drawn["background"].convert("RGB")
        if background.width * background.height > self.recipe.max_pixels:
            raise gr.Error(f"The picture has more than {self.recipe.max_pixels} pixels.")
        painted = np.zeros(background.size[::-1], dtype=bool)
        for layer in drawn.get("layers") or []:
            painted |= np.array(layer.convert("RGBA"))[..., 3] > PAINTED
        crop = eval_transform(self.model.config.image_size)
        bounds = crop.box(background.width, background.height)
        hole = Image.fromarray(painted).resize(crop.hw[::-1], Image.Resampling.NEAREST, box=bounds)
        return crop(background), torch.from_numpy(np.array(hole))

    def settings(self, steps: int, schedule: str, temperature: float, top_p: float, top_k: int, order: str):
        """SampleConfig of the page's sliders."""
        steps = self.limited("steps", steps, self.recipe.max_steps)
        try:
            return SampleConfig(steps, schedule, float(temperature), float(top_p), int(top_k), order)
        except ValueError as error:
            raise gr.Error(str(error)) from error

    @staticmethod
    def limited(name: str, value: float, most: int) -> int:
        if not 1 <= int(value) <= most:
            raise gr.Error(f"{name}: {value}; expected 1 to {most}")
        return int(value)


def pictures(images: Tensor) -> list[Image.Image]:
    """Float[B,3,H,W] -> Pillow images."""
    return [to_pil_image(image) for image in images.clamp(0, 1).float().cpu()]


def page(studio: Studio) -> gr.Blocks:
    """The page: a tab to generate, a tab to fill holes, the sampler's settings beside both."""
    recipe, paper = studio.recipe, SampleConfig()
    with gr.Blocks(title="addp", analytics_enabled=False) as blocks:
        gr.Markdown(f"## addp\n`{recipe.model}`, {' x '.join(map(str, studio.model.config.image_size))} pixels")
        with gr.Row():
            with gr.Column(scale=1):
                n = gr.Slider(1, recipe.max_n, min(4, recipe.max_n), step=1, label="images")
                seed = gr.Number(0, precision=0, label="seed")
                sampling = [
                    gr.Slider(1, recipe.max_steps, min(paper.steps, recipe.max_steps), step=1, label="steps"),
                    gr.Radio(["cosine", "linear"], value=paper.schedule, label="schedule"),
                    gr.Slider(0, 20, paper.temperature, label="temperature"),
                    gr.Slider(0, 1, paper.top_p, label="top-p"),
                    gr.Slider(0, 256, paper.top_k, step=1, label="top-k (0: all)"),
                    gr.Radio(list(ORDERS), value=paper.order, label="order"),
                ]
            with gr.Column(scale=3):
                with gr.Tab("generate"):
                    go = gr.Button("generate", variant="primary")
                    shown = gr.Gallery(label="the images after each step", columns=4)
                    go.click(studio.generate, [n, seed, *sampling], shown)
                with gr.Tab("inpaint"):
                    editor = gr.ImageEditor(type="pil", label="upload a picture, paint over what is to be filled")
                    blend = gr.Slider(0, 64, 8, step=1, label="pixels over which the seam is evened out")
                    fill = gr.Button("fill", variant="primary")
                    filled = gr.Gallery(label="variations", columns=4)
                    fill.click(studio.fill, [editor, n, seed, blend, *sampling], filled)
    return blocks
