"""`addp app`: a local web page to generate images step by step, and to paint a hole into an image and have it filled.

The page is served to this machine alone unless `host` says otherwise. Everyone who can reach it can use its compute
time, so image counts, steps and upload sizes are limited.
"""

from addp_core.base.errors import UserError
from addp_core.training.processes import process_state
from gen.model import load_for_sampling
from gen.page_actions import Limits, PageActions
from gen.recipe import AppRecipe as Recipe


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
