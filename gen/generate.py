"""`addp generate`: write generated images as PNG files.

Image i depends on the seed and on i alone. Several processes can therefore share the work, and the same command
continues an interrupted run.
"""

import logging
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from addp_core.method.sampler import sample
from addp_core.training.compute import autocast
from addp_core.training.pace import SAMPLING, mark_pace
from addp_core.training.processes import process_state
from gen.image_folder import claim_folder, claim_weights, image_path, write_grid, write_image
from gen.model import load_for_sampling
from gen.recipe import GenerateRecipe as Recipe

log = logging.getLogger("addp")


def run(recipe: Recipe) -> None:
    """Write the images that do not exist yet, then the grid.

    Raises UserError if the folder cannot be written, or holds images made with other settings or weights.
    """
    has_gpu = torch.accelerator.is_available()
    state = process_state()
    out = Path(recipe.out)
    model = load_for_sampling(recipe, state.device, recipe.compile)  # a folder is not claimed for a model that fails
    if state.is_main_process:
        claim_folder(out, recipe, may_change={"out", "n", "grid"} | (set() if has_gpu else {"batch"}))
        claim_weights(out, model)

    batches = range(-(-recipe.n // recipe.batch))
    # Rank 0 lists the folder for all processes: files appear while the other processes would still be listing it.
    pending = [
        [batch for batch in batches if not all(image_path(out, i).exists() for i in image_numbers(recipe, batch))]
    ]
    broadcast_object_list(pending)
    assigned = pending[0][state.process_index :: state.num_processes]
    missing, share = (sum(len(image_numbers(recipe, batch)) for batch in part) for part in (pending[0], assigned))
    log.info(
        "%d of %d images to generate, %d of them by this process (%d processes)",
        missing,
        recipe.n,
        share,
        state.num_processes,
    )
    mark_pace(SAMPLING, 0)
    with tqdm(total=share, unit="img", disable=not state.is_main_process) as bar:
        for batch in assigned:
            numbers = image_numbers(recipe, batch)
            # The rounding of a matrix product can depend on its number of rows, and rounding can flip an id. On a CPU,
            # one image at a time is as fast as a batch; a GPU always computes whole batches of the same images.
            first, n, at_once = batch * recipe.batch, recipe.batch, recipe.batch
            if not has_gpu:
                n, at_once = len(numbers), 1
            with autocast(recipe.precision, state.device):
                images = sample(model, n, **vars(recipe.sampling), seed=recipe.seed, first=first, batch=at_once)
            for i, image in zip(numbers, images, strict=False):
                write_image(image, image_path(out, i))
            bar.update(len(numbers))
            mark_pace(SAMPLING, len(numbers) * state.num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        if recipe.grid:
            write_grid(out, min(recipe.n, recipe.grid))
        log.info("%d images in %s", recipe.n, out)


def image_numbers(recipe: Recipe, batch: int) -> range:
    """Return the numbers of the images in this batch; the last batch may be incomplete."""
    return range(batch * recipe.batch, min((batch + 1) * recipe.batch, recipe.n))
