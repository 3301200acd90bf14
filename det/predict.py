"""`addp det predict`: boxes, masks and scores on a folder of images.

Writes <out>/<image>.png with the detections drawn on the image, detections.json in COCO's results format (each entry
with its `file_name`), and images.json with the ids of the images and the categories, as in a COCO file.
"""

import logging
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from addp_core.base.errors import UserError, renaming_keys
from addp_core.data.images import ImageError, write_png
from addp_core.data.sources import open_source, refuse_results_among_images
from addp_core.training.compute import accelerate_model, autocast
from addp_core.training.precision import matrix_width, resolve_precision
from addp_core.training.processes import process_state
from det.drawing import draw_detections
from det.model import load_detector
from det.output import make_folder, write_json
from det.recipe import PredictRecipe as Recipe

log = logging.getLogger("addp")

DETECTIONS = "detections.json"  # in `out`


def run(recipe: Recipe) -> None:
    """Detect objects on every image; unreadable images are logged and skipped."""
    state = process_state()
    with renaming_keys({"data.source": "images", "data.split": "images"}):
        source = open_source(recipe.images, whole=True)
        names = source.names_below(recipe.images)
    drawings = [Path(recipe.out) / f"{name}.png" for name in names]
    refuse_results_among_images(source, recipe.images, [Path(recipe.out) / DETECTIONS, *drawings])
    out = make_folder(recipe.out)
    model = load_detector(recipe.model).to(state.device).requires_grad_(False)
    accelerate_model(model)
    precision = resolve_precision(recipe.precision, state.device, matrix_width(model))
    categories = model.architecture.categories
    entries: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    unreadable: list[str] = []
    indices = range(state.process_index, len(source), state.num_processes)
    for index in tqdm(indices, desc="detect", unit="img", disable=None if state.is_main_process else True):
        name = names[index]
        try:
            image = source.open_image(index)[0].pixels()
        except ImageError as error:
            log.warning("%s: %s; skipped", source.name(index), error)
            unreadable.append(name)
            continue
        with autocast(precision, state.device):
            (detections,) = model.detect([image.to(state.device)])
        height, width = image.shape[-2:]
        entries.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        results += [{**result, "file_name": name} for result in detections.to_results(index + 1, categories)]
        drawn = draw_detections(image, detections, categories, recipe.score, recipe.most)
        write_png(to_pil_image(drawn), drawings[index])
    entries, results, unreadable = map(gather_object, (entries, results, unreadable))
    if not state.is_main_process:
        return
    if not entries:
        raise UserError(f"images: none of the {len(unreadable)} images in {recipe.images} can be read")
    write_json(out / DETECTIONS, sorted(results, key=lambda result: result["image_id"]))
    write_json(
        out / "images.json",
        {
            "images": sorted(entries, key=lambda entry: entry["id"]),
            "annotations": [],
            "categories": [{"id": category.id, "name": category.name} for category in categories],
        },
    )
    detected = sum(result["score"] >= recipe.score for result in results)
    log.info(
        "wrote %d images to %s: %d objects with a score of at least %g, %d unreadable images",
        len(entries),
        out,
        detected,
        recipe.score,
        len(unreadable),
    )
