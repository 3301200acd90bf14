"""`addp app`: a local web page to generate images step by step, and to paint a hole into an image and have it filled.

The page is served to this machine alone unless `host` says otherwise. Everyone who can reach it can use its compute
time, so image counts, steps and upload sizes are limited.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval

from addp_core.base.errors import UserError
from addp_core.training.processes import process_state
from gen.model import DecoderHeads, EncoderHeads, ModelSource, TokenizerSource, load_for_sampling
from gen.page_actions import Limits, PageActions


@dataclass
class Recipe:
    """Keys of `addp app`."""

    model: ModelSource
    host: Annotated[str, "address to serve on; 0.0.0.0 makes the page reachable from other machines"] = "127.0.0.1"
    port: Annotated[int, Interval(ge=1, le=65535), "port of the page"] = 7860
    max_n: Annotated[int, Ge(1), "maximum number of images at a time"] = 16
    max_steps: Annotated[int, Ge(1), "maximum number of sampling steps"] = 256
    max_megabytes: Annotated[int, Ge(1), "maximum file size of an uploaded image"] = 20
    max_pixels: Annotated[
        int, Ge(1), "maximum number of pixels of an uploaded image, which is then cropped to the model's size"
    ] = 40_000_000
    tokenizer: TokenizerSource = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None


def run(recipe: Recipe) -> None:
    """Serve the page until interrupted. Raises UserError if the address or port cannot be used."""
    from gen.page import build_page  # gradio is an optional dependency

    model = load_for_sampling(recipe, process_state().device)
    limits = Limits(images=recipe.max_n, steps=recipe.max_steps, pixels=recipe.max_pixels)
    page = build_page(PageActions(model, limits), recipe.model)
    try:
        page.launch(
            server_name=recipe.host,
            server_port=recipe.port,
            share=False,
            max_file_size=f"{recipe.max_megabytes}mb",
        )
    except OSError as error:  # gradio does not say which of the two it is
        raise UserError(
            f"port: {recipe.port} at {recipe.host} is taken, or host is not an address of this machine; choose "
            f"another, such as port={recipe.port + 1}"
        ) from error
