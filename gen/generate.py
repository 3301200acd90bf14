"""`addp generate`: images to PNG. Image i depends on the seed and on i alone, so that processes can share the work and
a start over continues where the last one stopped.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from accelerate.utils import broadcast_object_list
from annotated_types import Ge, Gt
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.method.addp import ADDP
from addp_core.method.sampler import SampleConfig, sample
from addp_core.training.compute import Precision, arithmetic
from addp_core.training.engine import process_state
from addp_core.weights.checkpoint import fingerprint
from gen.common import (
    DecoderHeads,
    EncoderHeads,
    ModelSource,
    TokenizerSource,
    claim_folder,
    image_path,
    load_sampler,
    write_image,
)

log = logging.getLogger("addp")


@dataclass
class Recipe:
    """Keys of `addp generate`."""

    model: ModelSource
    out: Annotated[str, "folder for 000000.png, 000001.png, ... and grid.png"]
    n: Annotated[int, Ge(1), "number of images"] = 64
    seed: Annotated[int, "image i depends on this and on i alone"] = 0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    batch: Annotated[int, Gt(0), "images at a time on each process"] = 16
    grid: Annotated[int, Ge(0), "how many of the first images grid.png shows; 0 for none"] = 64
    precision: Precision = "fp32"
    tokenizer: TokenizerSource = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None


WEIGHTS = "weights.txt"  # in the folder: fingerprint of the model its images come from


def run(recipe: Recipe) -> None:
    """Write the images that are not there yet, then the grid.

    UserError where the folder cannot be written or holds images of other settings or weights.
    """
    gpu = torch.accelerator.is_available()
    state = process_state()
    out = Path(recipe.out)
    if state.is_main_process:
        claim_folder(out, recipe, free={"out", "n", "grid"} | (set() if gpu else {"batch"}))
    model = load_sampler(recipe, state.device)
    if state.is_main_process:
        claim_weights(out, model)

    batches = range(-(-recipe.n // recipe.batch))
    todo = [[b for b in batches if not all(image_path(out, i).exists() for i in numbers(recipe, b))]]
    broadcast_object_list(todo)  # one look at the folder for all: it fills while the others look
    mine = todo[0][state.process_index :: state.num_processes]
    missing, share = (sum(len(numbers(recipe, b)) for b in part) for part in (todo[0], mine))
    log.info(
        "%d images to make of %d, %d of them on this of %d processes", missing, recipe.n, share, state.num_processes
    )
    with tqdm(total=share, unit="img", disable=not state.is_main_process) as bar:
        for b in mine:
            # A product's rounding may depend on how many rows it has, and rounding may flip an id. One image at a time
            # is as fast on a CPU; a GPU always gets whole batches of the same images.
            first, n, at_once = b * recipe.batch, recipe.batch, recipe.batch
            if not gpu:
                n, at_once = len(numbers(recipe, b)), 1
            with arithmetic(recipe.precision, state.device):
                images = sample(model, n, **vars(recipe.sampling), seed=recipe.seed, first=first, batch=at_once)
            for i, image in zip(numbers(recipe, b), images, strict=False):
                write_image(image, image_path(out, i))
            bar.update(len(numbers(recipe, b)))
    state.wait_for_everyone()
    if state.is_main_process:
        if recipe.grid:
            write_grid(out, min(recipe.n, recipe.grid))
        log.info("%d images in %s", recipe.n, out)


def numbers(recipe: Recipe, batch: int) -> range:
    """Numbers of the wanted images in this batch."""
    return range(batch * recipe.batch, min((batch + 1) * recipe.batch, recipe.n))


def claim_weights(out: Path, model: ADDP) -> None:
    """UserError where the folder's images come from other weights than these, the same path or not."""
    note, now = out / WEIGHTS, fingerprint(model)
    if note.exists() and note.read_text(encoding="ascii") != now:
        raise UserError(f"{out}: holds images made with other weights; expected the same model, or another out=")
    write_atomically(note, now.encode())


def write_grid(out: Path, n: int) -> None:
    """grid.png of the first n images."""
    images = torch.stack([pil_to_tensor(Image.open(image_path(out, i))) for i in range(n)])
    write_image(make_grid(images / 255, nrow=max(int(n**0.5), 1), pad_value=1.0), out / "grid.png")
