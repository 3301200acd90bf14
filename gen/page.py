"""The page of `addp app`: its layout, how it displays errors, and how it is served. Needs gradio."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError, wrap_image_errors
from addp_core.method.sampler import ORDERS, SampleConfig
from gen.page_actions import Clicks, Limits, PageActions, Result, Wanted
from gen.page_features import FeatureActions
from gen.page_html import CSS, render
from gen.recipe import AppRecipe
from gen.runs import SHOWN, RunsView, Seen, seen
from gen.uploads import NOT_AN_IMAGE, BoundedBodies, open_upload

WAITING = "Waiting for its turn."
COMPUTE = "compute"  # the queue of all that computes: one at a time, whoever asks
WAITING_LIMIT = 20  # computations that may wait for their turn
SECONDS = 5  # between two looks at the runs
UPLOADS_KEPT = 3600  # seconds
FORM_BYTES = 1 << 20  # of a request, beside the file in it
# Of every event: nothing lies over the pictures meanwhile, and there is no other interface than the page.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Actions:
    """What the page can do: those of the tabs that it has."""

    sampling: PageActions | None = None
    features: FeatureActions | None = None
    runs: RunsView | None = None


class Handlers:
    """The functions that gradio calls: the actions, for the visitor who asks, with results and errors as it shows
    them.
    """

    def __init__(self, actions: Actions):
        self.actions, self.clicks = actions, Clicks()

    def begin(self, request: gr.Request) -> tuple[int, str]:
        """Answer a click at once, also while the computation that it starts has to wait."""
        return self.clicks.begin(visitor_of(request)), WAITING

    def generate(self, request: gr.Request, click: int, *values: Any) -> Iterator[Any]:
        assert self.actions.sampling is not None
        yield from shown(self.actions.sampling.generate(self._wanted(request, click), *values))

    def fill(self, request: gr.Request, click: int, *values: Any) -> Iterator[Any]:
        assert self.actions.sampling is not None
        yield from shown(self.actions.sampling.fill(self._wanted(request, click), *values))

    def describe(self, request: gr.Request, click: int, path: str | None) -> Iterator[Any]:
        assert self.actions.features is not None
        yield from shown(self.actions.features.describe(self._wanted(request, click), path))

    def stop(self, request: gr.Request) -> None:
        self.clicks.stop(visitor_of(request))

    def leave(self, request: gr.Request) -> None:
        """The page has been closed."""
        self.clicks.leave(visitor_of(request))

    def watch(self, names: Sequence[str], before: tuple[list[str], Seen] | None) -> Any:
        """Return the choice of runs, their HTML, and what was seen of them; nothing new if they have not changed."""
        assert self.actions.runs is not None
        found, runs = list(self.actions.runs.find()), self.actions.runs.choose(names)
        now = (found, seen(runs))
        if now == before:
            return gr.skip(), gr.skip(), gr.skip()
        choice: Any = gr.skip()
        if not before or before[0] != found:
            choice = gr.update(choices=found, value=[name for name in names if name in found])
        return choice, self.actions.runs.render(runs), now

    def _wanted(self, request: gr.Request, click: int) -> Wanted:
        visitor = visitor_of(request)
        return lambda: self.clicks.is_wanted(visitor, click)


def visitor_of(request: gr.Request) -> str:
    """Return what tells this open page from others."""
    return request.session_hash or ""


def shown(results: Iterator[Result]) -> Iterator[Any]:
    """Yield the HTML and the line of each result."""
    with displayed_errors():
        for result in results:
            yield gr.skip() if result.sections is None else render(result.sections), result.note


@contextlib.contextmanager
def displayed_errors() -> Iterator[None]:
    """Let the page display a UserError from this block. The terminal gets no traceback of it."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def image_editor(limits: Limits, hw: tuple[int, int]) -> gr.ImageEditor:
    """Return an editor for an image and what is painted over it, which names a file that is no image, or too large.

    hw: height and width of the model's images, which the brush fits.
    """
    brush = gr.Brush(default_size=max(min(hw) // 16, 1))
    editor = gr.ImageEditor(type="pil", show_label=False, brush=brush, canvas_size=hw[::-1])
    read = editor.preprocess

    def read_or_say(payload: Any) -> Any:
        try:
            with displayed_errors():
                # Gradio opens any format that Pillow knows, whatever its size: the headers are checked before.
                files = editor.blob_storage.get(payload.id, payload) if payload is not None else None
                for file in [files.background, *(files.layers or []), files.composite] if files else []:
                    if file is not None:
                        open_upload(file if isinstance(file, bytes) else file.path, limits.pixels)
                try:
                    with wrap_image_errors():
                        return read(payload)
                except ImageError as error:  # cut off, broken
                    raise UserError(NOT_AN_IMAGE) from error
        finally:  # gradio forgets what it has read, and this what was refused
            if payload is not None:
                editor.blob_storage.pop(payload.id, None)

    setattr(editor, "preprocess", read_or_say)  # noqa: B010 (a subclass would need a frontend of its own)
    return editor


def build_page(actions: Actions, title: str) -> gr.Blocks:
    """Lay out the page: a tab for each of the actions, and then the settings, which a narrow window puts below."""
    handlers = Handlers(actions)
    with gr.Blocks(title="addp", analytics_enabled=False, delete_cache=(UPLOADS_KEPT, UPLOADS_KEPT)) as blocks:
        gr.Markdown(f"## addp\n{title}")
        with gr.Row():
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                tabs: list[tuple[gr.Tab, bool]] = []  # and whether they have the settings of the sampler
                if actions.sampling:
                    with gr.Tab("generate") as tab:
                        generating = Computation("generate")
                    tabs.append((tab, True))
                    with gr.Tab("inpaint") as tab:
                        gr.Markdown("Upload an image, then paint over the part to fill.")
                        editor = image_editor(actions.sampling.limits, actions.sampling.model.config.image_size)
                        blend = gr.Slider(0, 64, 8, step=1, label="pixels over which the seam is blended")
                        filling = Computation("fill")
                    tabs.append((tab, True))
                if actions.features:
                    with gr.Tab("features") as tab:
                        upload = gr.File(file_types=["image"], label="an image (JPEG, PNG, WebP)", height=140)
                        describing = Computation("show features")
                        describing.connect(handlers, handlers.describe, [upload])
                    tabs.append((tab, False))
                if actions.runs:
                    with gr.Tab("runs") as tab:
                        lay_out_runs(blocks, handlers)
                    tabs.append((tab, False))
            if actions.sampling:
                with gr.Column(scale=1, min_width=260) as column:
                    n, seed, *sampling = settings(actions.sampling.limits)
                generating.connect(handlers, handlers.generate, [n, seed, *sampling])
                filling.connect(handlers, handlers.fill, [editor, n, seed, blend, *sampling])
                for tab, sampled in tabs:
                    tab.select(partial(gr.update, visible=sampled), None, column, queue=False, **QUIET)
        blocks.unload(handlers.leave)
    blocks.queue(max_size=WAITING_LIMIT)
    return blocks


class Computation:
    """A button that starts a computation, one that stops it, and the places of its line and its pictures."""

    def __init__(self, label: str):
        with gr.Row():
            self.button = gr.Button(label, variant="primary", min_width=120)
            self.stop = gr.Button("stop", variant="stop", min_width=120)
        self.note, self.pictures, self.click = gr.Markdown(), gr.HTML(), gr.State()

    def connect(self, handlers: Handlers, compute: Callable[..., Any], inputs: list[Any]) -> None:
        """Let the buttons start and stop `compute`, a method of `handlers`, of these inputs."""
        begun = self.button.click(handlers.begin, None, [self.click, self.note], queue=False, **QUIET)
        computed = begun.then(
            compute,
            [self.click, *inputs],
            [self.pictures, self.note],
            concurrency_id=COMPUTE,
            concurrency_limit=1,
            **QUIET,
        )
        computed.failure(str, None, self.note, queue=False, **QUIET)  # the error is displayed; nothing waits any more
        self.stop.click(handlers.stop, None, None, queue=False, **QUIET)


def settings(limits: Limits) -> list[Any]:
    """Lay out the number of images, the seed and the settings of the sampler, and return them."""
    default = SampleConfig()
    return [
        gr.Slider(1, limits.images, min(4, limits.images), step=1, label="images"),
        gr.Number(0, precision=0, label="seed"),
        gr.Slider(1, limits.steps, min(default.steps, limits.steps), step=1, label="steps"),
        gr.Radio(["cosine", "linear"], value=default.schedule, label="schedule"),
        gr.Slider(0, 20, default.temperature, label="temperature"),
        gr.Slider(0, 1, default.top_p, label="top-p"),
        gr.Slider(0, 256, default.top_k, step=1, label="top-k (0: all)"),
        gr.Radio(list(ORDERS), value=default.order, label="order"),
    ]


def lay_out_runs(blocks: gr.Blocks, handlers: Handlers) -> None:
    """Lay out the runs, and look at them again every few seconds."""
    choice = gr.Dropdown([], multiselect=True, label=f"runs (none chosen: the {SHOWN} newest)")
    curves, before = gr.HTML(), gr.State()
    for trigger in (gr.Timer(SECONDS).tick, choice.change, blocks.load):
        trigger(
            handlers.watch,
            [choice, before],
            [choice, curves, before],
            concurrency_id="runs",
            concurrency_limit=1,
            **QUIET,
        )


def serve(blocks: gr.Blocks, recipe: AppRecipe, **options: Any) -> None:
    """Serve the page until interrupted. `options` are further ones of `gr.Blocks.launch`. Raises OSError."""
    # The editor sends what it shows, which may be larger than the file was, but not larger than its pixels.
    body_limit = max(recipe.max_megabytes << 20, 4 * recipe.max_pixels) + FORM_BYTES
    blocks.launch(
        server_name=recipe.host,
        server_port=recipe.port,
        share=False,
        max_file_size=f"{recipe.max_megabytes}mb",
        app_kwargs={"middleware": [Middleware(BoundedBodies, limit=body_limit)]},
        css=CSS,
        footer_links=[],
        **options,
    )


def page_title(recipe: AppRecipe, actions: Actions) -> str:
    """Return the line below the name of the app."""
    if not actions.features:
        return "runs"
    height, width = actions.features.view.encoder.image_size
    return f"`{Path(recipe.model).name}`, {width} x {height} pixels"
