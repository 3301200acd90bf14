"""`addp seg predict`: show each image beside its predicted class map, with a legend of the classes and their shares.

Writes `<out>/<name>.png`, and the class map alone to `<out>/maps/<name>.png`, with the labels of the annotations (0 is
unused, the first class is 1) and the legend's colors. Images that share a name keep their extension:
`<name>.jpg.png`.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.paths import expand_home
from addp_core.data.images import ImageError, write_png
from addp_core.data.sources import ImageFiles, ImageSource, open_source, refuse_results_among_images
from addp_core.training.processes import process_state
from seg.mmseg_config import import_mmseg
from seg.recipe import PredictRecipe as Recipe
from seg.scenes import class_colors, to_class_map
from seg.segmentor import load_segmentor
from seg.test import MAPS_FOLDER

log = logging.getLogger("addp")


def run(recipe: Recipe) -> None:
    """Predict and write the class maps. Several processes share the images; unreadable ones are logged and skipped."""
    source, paths = open_images(recipe.images)
    names, out = output_names(paths)[: recipe.n], Path(recipe.out)
    results = [folder / name for folder in (out, out / MAPS_FOLDER) for name in names]
    refuse_results_among_images(source, recipe.images, results)
    segmentor, state = load_segmentor(recipe.model)
    import_mmseg()
    from seg.launch import ClassMapPredictor

    processes = process_state()
    predict = ClassMapPredictor(segmentor, state, recipe.model, recipe.test, recipe.precision)
    colors, unreadable = class_colors(len(segmentor.classes)), []
    assigned = range(processes.process_index, len(names), processes.num_processes)
    for index in tqdm(assigned, unit="img", disable=not processes.is_main_process):
        try:
            image = source.open_image(index)[0].decode()
        except ImageError as error:
            log.warning("%s: %s; skipped", source.name(index), error)
            unreadable.append(index)
            continue
        labels = predict(image).numpy()
        write_png(draw_prediction(image, labels, segmentor.classes, colors, recipe.paint), out / names[index])
        write_png(to_class_map(labels, colors), out / MAPS_FOLDER / names[index])
    unreadable = gather_object(unreadable)
    if len(unreadable) == len(names):
        raise UserError(f"images: none of the {len(names)} images in {recipe.images} can be read")
    if processes.is_main_process:
        log.info("seg predict: %d images in %s, %d unreadable", len(names) - len(unreadable), out, len(unreadable))


def open_images(images: str) -> tuple[ImageSource, list[Path]]:
    """Return the images and their paths below `images`. Raises UserError if there are none."""
    path = expand_home(images)
    if path.is_file() and path.suffix.lower() != ".tar":
        return ImageFiles(path.parent, [path.name]), [Path(path.name)]
    with renaming_keys({"data.source": "images", "data.split": "images"}):
        source = open_source(images, whole=True)
        return source, list(map(Path, source.names_below(images)))


def output_names(images: Sequence[Path]) -> list[Path]:
    """Return the file name of the result of each image, relative to `out`; all differ."""
    counts = Counter(path.with_suffix("") for path in images)
    return [
        path.with_suffix(".png") if counts[path.with_suffix("")] == 1 else path.with_name(f"{path.name}.png")
        for path in images
    ]


def draw_prediction(
    image: Image.Image, labels: np.ndarray, classes: tuple[str, ...], colors: np.ndarray, opacity: float
) -> Image.Image:
    """Draw the image, the image under its classes' colors, and the legend, side by side."""
    painted = Image.blend(image, Image.fromarray(colors[labels]), opacity)
    counts = np.bincount(labels.flatten(), minlength=len(classes))
    present = [i for i in np.argsort(-counts) if counts[i]]
    line_height, width, height = 14, image.width, image.height
    texts = [f"{classes[i]} {100 * counts[i] / labels.size:.1f}%" for i in present]
    font = ImageFont.load_default(11)
    legend_width = 24 + max(int(font.getlength(text)) for text in texts)
    sheet = Image.new("RGB", (2 * width + legend_width, max(height, line_height * len(texts) + 4)), "white")
    sheet.paste(image, (0, 0))
    sheet.paste(painted, (width, 0))
    draw = ImageDraw.Draw(sheet)
    for row, (i, text) in enumerate(zip(present, texts, strict=True)):
        top = 2 + row * line_height
        draw.rectangle((2 * width + 4, top + 1, 2 * width + 14, top + 11), tuple(map(int, colors[i])))
        draw.text((2 * width + 19, top), text, "black", font)
    return sheet
