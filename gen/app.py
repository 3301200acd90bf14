"""`addp app`: a local page to generate, to paint a hole and have it filled, and to watch the steps.

It answers on this machine alone unless `host` says otherwise; whoever reaches it may use its time, so that numbers and
sizes have limits.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval

from addp_core.base.errors import UserError
from addp_core.training.engine import process_state
from gen.common import DecoderHeads, EncoderHeads, ModelSource, TokenizerSource, load_sampler


@dataclass
class Recipe:
    """Keys of `addp app`."""

    model: ModelSource
    host: Annotated[str, "address to answer on; 0.0.0.0 lets others in"] = "127.0.0.1"
    port: Annotated[int, Interval(ge=1, le=65535), "of the page"] = 7860
    max_n: Annotated[int, Ge(1), "images at a time, at most"] = 16
    max_steps: Annotated[int, Ge(1), "sampling steps, at most"] = 256
    max_megabytes: Annotated[int, Ge(1), "of an uploaded picture"] = 20
    max_pixels: Annotated[int, Ge(1), "of an uploaded picture; it is then cropped to the model's size"] = 40_000_000
    tokenizer: TokenizerSource = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None


def run(recipe: Recipe) -> None:
    """Serve the page until interrupted."""
    from gen.page import Studio, page  # gradio is an extra

    model = load_sampler(recipe, process_state().device)
    limit = f"{recipe.max_megabytes}mb"
    try:
        page(Studio(model, recipe)).launch(
            server_name=recipe.host, server_port=recipe.port, share=False, max_file_size=limit
        )
    except OSError as error:  # gradio does not say which of the two it is
        raise UserError(
            f"port: {recipe.port} at {recipe.host} is taken, or host is no address of this machine; choose another, as "
            f"in port={recipe.port + 1}"
        ) from error
