"""`addp det predict`: boxes, masks and scores on a folder of images.

Writes <out>/<image>.png with everything drawn, detections.json in COCO's results format (with `file_name` in each), and
images.json with the images' ids and the categories, as COCO files have them.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from accelerate.utils import gather_object
from annotated_types import Ge, Interval
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from addp_core.base.errors import UserError, renaming_keys
from addp_core.data.images import ImageError, write_png
from addp_core.data.sources import open_source
from addp_core.training.compute import accelerate_model
from addp_core.training.engine import process_state
from det.drawing import draw
from det.eval import make_folder, write_json
from det.model import load_detector, to_tensor

log = logging.getLogger("addp")


@dataclass
class Recipe:
    """Keys of `addp det predict`."""

    model: Annotated[str, "a run of `addp det train`, or its file"]
    images: Annotated[str, "folder of images, flat or nested"]
    out: Annotated[str, "folder for the pictures and the JSON files"]
    score: Annotated[float, Interval(ge=0, le=1), "draw what is at least this sure; the JSON holds everything"] = 0.5
    most: Annotated[int, Ge(1), "of an image's objects, the surest, are drawn"] = 100


def run(recipe: Recipe) -> None:
    """Look at every image; those that cannot be read are named and passed over."""
    out = make_folder(recipe.out)
    state = process_state()
    with renaming_keys({"data.source": "images", "data.split": "images"}):
        source = open_source(recipe.images)
    model = load_detector(recipe.model).to(state.device).requires_grad_(False)
    accelerate_model(model)
    root = Path(recipe.images).expanduser()
    entries, results, unreadable = [], [], []
    mine = range(state.process_index, len(source), state.num_processes)
    for index in tqdm(mine, desc="detect", unit="img", disable=None if state.is_main_process else True):
        name = os.path.relpath(source.name(index), root)
        try:
            image = to_tensor(source.open_image(index)[0].decode())
        except ImageError as error:
            log.warning("%s: %s; passed over", source.name(index), error)
            unreadable.append(name)
            continue
        (found,) = model.detect([image.to(state.device)])
        height, width = image.shape[-2:]
        entries.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        results += [{**result, "file_name": name} for result in found.results(index + 1, model.file.categories)]
        drawn = draw(image, found, model.file.categories, recipe.score, recipe.most)
        write_png(to_pil_image(drawn), out / f"{name}.png")
    entries, results, unreadable = map(gather_object, (entries, results, unreadable))
    if not state.is_main_process:
        return
    if not entries:
        raise UserError(f"images: none of the {len(unreadable)} images in {root} can be read")
    categories = [{"id": category.id, "name": category.name} for category in model.file.categories]
    write_json(out / "detections.json", sorted(results, key=lambda result: result["image_id"]))
    listed = {"images": sorted(entries, key=lambda entry: entry["id"]), "annotations": [], "categories": categories}
    write_json(out / "images.json", listed)
    sure = sum(result["score"] >= recipe.score for result in results)
    log.info("%d images in %s, %d objects this sure, %d images unreadable", len(entries), out, sure, len(unreadable))
