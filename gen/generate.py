"""`addp generate`: write generated images as PNG files.

Image i depends on the seed and on i alone. Several processes can therefore share the work, and the same command
continues an interrupted run.
"""

import logging
import math
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from addp_core.method.addp import ADDP
from addp_core.method.mage import MAGE
from addp_core.method.sampler import sample
from addp_core.training.compute import autocast
from addp_core.training.pace import SAMPLING, mark_pace
from addp_core.training.processes import process_state
from addp_core.weights.fingerprint import fingerprint
from gen.image_folder import check_folder, claim_folder, image_path, write_grid, write_image
from gen.model import load_for_sampling
from gen.recipe import GenerateRecipe as Recipe

log = logging.getLogger("addp")

# On a CPU, so many images are computed together that their tokens are about as many as these, with any `batch`: fewer
# rows of a matrix leave most of the time to overheads, more gain nothing.
ROWS_AT_ONCE = 256


def run(recipe: Recipe) -> None:
    """Write the images that do not exist yet, then the grid.

    Raises UserError if the folder cannot be written, or holds images made with other settings or weights.
    """
    state = process_state()
    if state.is_main_process:
        check_out_of(recipe)
    model = load_for_sampling(recipe, state.device, recipe.compile)  # a folder is not claimed for a model that fails
    with claim_folder(Path(recipe.out), recipe, _may_change(), fingerprint(model)):
        _write_images(recipe, model, state)


def check_out_of(recipe: Recipe, weights: str = "") -> None:
    """Raise UserError, as early as a command can tell, if `out` holds images made with other settings or weights.

    weights: fingerprint of the model; "" if it is not loaded yet.
    """
    check_folder(Path(recipe.out), recipe, _may_change(), weights)


def _may_change() -> set[str]:
    """Return the keys that change no image."""
    return {"out", "n", "grid"} | (set() if torch.accelerator.is_available() else {"batch"})


def _write_images(recipe: Recipe, model: ADDP | MAGE, state: PartialState) -> None:
    """Write the images that do not exist yet, shared among all processes, then the grid."""
    has_gpu, out = torch.accelerator.is_available(), Path(recipe.out)
    together = recipe.batch if has_gpu else max(1, ROWS_AT_ONCE // model.config.tokens)
    size = math.ceil(recipe.batch / together) * together
    batches = [range(first, min(first + size, recipe.n)) for first in range(0, recipe.n, size)]
    # Rank 0 lists the folder for all processes: files appear while the other processes would still be listing it.
    pending = [[numbers for numbers in batches if not all(image_path(out, i).exists() for i in numbers)]]
    broadcast_object_list(pending)
    assigned = pending[0][state.process_index :: state.num_processes]
    missing, share = (sum(map(len, part)) for part in (pending[0], assigned))
    log.info(
        "%d of %d images to generate, %d of them by this process (%d processes)",
        missing,
        recipe.n,
        share,
        state.num_processes,
    )
    mark_pace(SAMPLING, 0)
    with tqdm(total=share, unit="img", disable=not state.is_main_process) as bar:
        for numbers in assigned:
            # The rounding of a matrix product can depend on its number of rows, and rounding can flip an id: images
            # that are computed together always are, the unwanted ones of the last batch too.
            n = math.ceil(len(numbers) / together) * together
            with autocast(recipe.precision, state.device):
                images = sample(
                    model, n, **vars(recipe.sampling), seed=recipe.seed, first=numbers.start, batch=together
                )
            for i, image in zip(numbers, images, strict=False):
                write_image(image, image_path(out, i))
            bar.update(len(numbers))
            mark_pace(SAMPLING, len(numbers) * state.num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        if recipe.grid:
            write_grid(out, min(recipe.n, recipe.grid))
        log.info("%d images in %s", recipe.n, out)
