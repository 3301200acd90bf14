"""`addp app`: a local web page that looks into a model and into runs.

It generates images step by step, fills what is painted over, shows the features of an uploaded image and its nearest
neighbors, and the curves of runs while they grow. The page is served to this machine alone unless `host` says
otherwise. Everyone who can reach it can use its compute time, so image counts, steps and upload sizes are limited.
"""

from addp_core.base.errors import UserError, renaming_keys
from addp_core.data.sources import open_source
from addp_core.training.processes import process_state
from addp_core.weights.reading import read_weights
from gen.encoder_figures import open_view
from gen.model import GENERATORS, load_for_sampling
from gen.neighbors import ImagePool
from gen.page_actions import Limits, PageActions
from gen.page_features import FeatureActions
from gen.recipe import AppRecipe as Recipe
from gen.runs import RunsView


def run(recipe: Recipe) -> None:
    """Serve the page until interrupted. Raises UserError if the address or port cannot be used."""
    from gen.page import Actions, build_page, page_title, serve  # gradio is an optional dependency

    sampling, features, runs = open_actions(recipe)
    actions = Actions(sampling, features, runs)
    page = build_page(actions, page_title(recipe, actions))
    try:
        serve(page, recipe)
    except OSError as error:  # gradio does not say which of the two it is
        raise UserError(
            f"port: {recipe.port} at {recipe.host} is taken, or host is not an address of this machine; choose "
            f"another, such as port={recipe.port + 1}"
        ) from error


def open_actions(recipe: Recipe) -> tuple[PageActions | None, FeatureActions | None, RunsView | None]:
    """Open what the recipe names: the model, its encoder with the images of `data`, and the runs.

    Raises UserError if something cannot be read, or nothing is named.
    """
    runs = RunsView(recipe.runs) if recipe.runs else None
    if not recipe.model:
        if runs is None:
            raise UserError("model: not given; expected a model, or runs=<run folder> to watch it")
        return None, None, runs
    limits = Limits(images=recipe.max_n, steps=recipe.max_steps, pixels=recipe.max_pixels)
    kind = read_weights(recipe.model).kind
    view = open_view(recipe, kind)
    pool = None
    if recipe.data:
        with renaming_keys({"data.source": "data", "data.split": "split"}):
            pool = ImagePool(view, open_source(recipe.data, recipe.split), recipe.pool)
    sampling = PageActions(load_for_sampling(recipe, process_state().device), limits) if kind in GENERATORS else None
    return sampling, FeatureActions(view, limits, pool), runs
