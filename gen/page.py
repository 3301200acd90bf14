"""The page of `addp app`: its layout, and how it displays errors. Needs gradio."""

import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr

from addp_core.base.errors import UserError
from addp_core.method.sampler import ORDERS, SampleConfig
from gen.page_actions import NOT_AN_IMAGE, PageActions, Result


class Handlers:
    """The functions that gradio calls: the actions, for the visitor who asks, with errors as it shows them."""

    def __init__(self, actions: PageActions):
        self.actions = actions

    def generate(self, request: gr.Request, n: Any, seed: Any, *sampling: Any) -> Iterator[Result]:
        with displayed_errors():
            yield from self.actions.generate(visitor_of(request), n, seed, *sampling)

    def fill(self, request: gr.Request, editor: Any, n: Any, seed: Any, blend: Any, *sampling: Any) -> Result:
        with displayed_errors():
            return self.actions.fill(visitor_of(request), editor, n, seed, blend, *sampling)

    def stop(self, request: gr.Request) -> None:
        self.actions.stop(visitor_of(request))


def visitor_of(request: gr.Request) -> str:
    """Return what tells this open page from others."""
    return request.session_hash or ""


@contextlib.contextmanager
def displayed_errors() -> Iterator[None]:
    """Let the page display a UserError from this block. The terminal gets no traceback of it."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def image_editor() -> gr.ImageEditor:
    """Return an editor for an image and what is painted over it, which names a file that is not an image."""
    editor = gr.ImageEditor(type="pil", label="upload an image, then paint over the part to fill")
    read = editor.preprocess

    def read_or_say(payload: Any) -> Any:
        try:
            return read(payload)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's errors: not an image, cut off, broken
            raise gr.Error(NOT_AN_IMAGE, print_exception=False) from error

    setattr(editor, "preprocess", read_or_say)  # noqa: B010 (a subclass would need a frontend of its own)
    return editor


def build_page(actions: PageActions, model_name: str) -> gr.Blocks:
    """Lay out the page: the sampler's settings beside a tab to generate images and a tab to fill holes."""
    limits, default, handlers = actions.limits, SampleConfig(), Handlers(actions)
    height, width = actions.model.config.image_size
    with gr.Blocks(title="addp", analytics_enabled=False) as blocks:
        gr.Markdown(f"## addp\n`{model_name}`, {width} x {height} pixels")
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
                stop_button = gr.Button("stop after this step", variant="stop")
            with gr.Column(scale=3):
                with gr.Tab("generate"):
                    generate_button = gr.Button("generate", variant="primary")
                    generated = gr.Gallery(label="the images after each step", columns=4)
                    progress = gr.Markdown()
                    generate_button.click(handlers.generate, [n, seed, *sampling], [generated, progress])
                with gr.Tab("inpaint"):
                    editor = image_editor()
                    blend = gr.Slider(0, 64, 8, step=1, label="pixels over which the seam is blended")
                    fill_button = gr.Button("fill", variant="primary")
                    filled = gr.Gallery(label="variations", columns=4)
                    note = gr.Markdown()
                    fill_button.click(handlers.fill, [editor, n, seed, blend, *sampling], [filled, note])
        stop_button.click(handlers.stop, None, None, queue=False)
    return blocks
