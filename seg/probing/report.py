"""The results of `addp seg probe`: results.json, metrics.jsonl, two pictures, and a table on stdout."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from addp_core.base.files import write_atomically
from addp_core.base.launch import rank
from addp_core.base.paths import METRICS_FILE
from addp_core.base.tables import text_table
from addp_core.data.images import write_png
from seg.probing.probes import Row, Scenes
from seg.probing.recipe import Recipe
from seg.scenes import IGNORED, ScenePair, class_colors, read_class_map, read_image

log = logging.getLogger("addp")

RESULTS = "results.json"
PROBE_NAMES = {"linear": "linear", "knn": "k-NN"}
TILE, CAPTION = 224, 16  # pixels: longest side of a picture, and height of the line above it


def best_rows(rows: Sequence[Row], recipe: Recipe) -> dict[str, Row]:
    """Return the best row of each probe, by the mIoU over held-out patches or, without them, by the mIoU."""
    metric, lrs = "held_out" if recipe.train.held_out else "mIoU", recipe.train.lrs
    best = {
        probe: max((row for row in rows if row["probe"] == probe), key=lambda row: row[metric])
        for probe in recipe.probes
    }
    if len(lrs) > 2 and "linear" in best and best["linear"]["lr"] in (min(lrs), max(lrs)):
        log.warning(
            "the best learning rate, %g, is at the end of train.lrs; a wider range may be better", best["linear"]["lr"]
        )
    return best


def write_results(out: Path, recipe: Recipe, scenes: Scenes, rows: Sequence[Row], best: Mapping[str, Row]) -> None:
    """Write results.json and metrics.jsonl."""
    chosen_on = (
        f"{recipe.train.held_out:.0%} of the training images" if recipe.train.held_out else "the validation images"
    )
    per_class = {probe: dict(zip(scenes.classes, row["iou"], strict=True)) for probe, row in best.items()}
    short = [{name: value for name, value in row.items() if name not in ("iou", "constant_mIoU")} for row in rows]
    results = {
        "images": len(scenes.listing),
        "classes": len(scenes.classes),
        "trained_on": len(scenes.train.labels),
        "picked_by": chosen_on,
        "constant_mIoU": rows[0]["constant_mIoU"],
        "best": {probe: short[rows.index(row)] for probe, row in best.items()},
        "iou": per_class,
        "rows": short,
    }
    lines = [{"step": row["block"], **{name: row[name] for name in row if name != "sweep"}} for row in short]
    write_atomically(out / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(out / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())


def plot_by_block(rows: Sequence[Row], path: Path) -> None:
    """Plot mIoU over blocks, a line for each probe, and that of the most frequent class everywhere."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="block", ylabel="mIoU on validation (%)")
    for probe, style in (("linear", "o-"), ("knn", "s--")):
        if points := [(row["block"], row["mIoU"]) for row in rows if row["probe"] == probe]:
            axes.plot(*zip(*points, strict=True), style, label=PROBE_NAMES[probe])
    axes.axhline(rows[0]["constant_mIoU"], color="gray", linestyle=":", label="most frequent class everywhere")
    axes.set_xticks(sorted({row["block"] for row in rows}))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def draw_predictions(
    pairs: Sequence[ScenePair], predictions: Mapping[str, Sequence[np.ndarray]], classes: int, path: Path
) -> None:
    """Draw images, their class maps, and those of each probe, side by side; pixels without a class are black.

    predictions: caption -> class maps UInt8[H,W], one for each of the first pairs.
    """
    colors = np.zeros((IGNORED + 1, 3), np.uint8)
    colors[:classes] = class_colors(classes)
    captions = ["image", "annotation", *predictions]
    count = min(map(len, predictions.values()))
    rows = []
    for number, pair in enumerate(pairs[:count]):
        truth = read_class_map(pair.class_map, None, classes)
        maps = [truth, *(class_maps[number] for class_maps in predictions.values())]
        rows.append([read_image(pair.image), *(Image.fromarray(colors[class_map]) for class_map in maps)])
    if not rows:
        return
    factor = TILE / max(max(row[0].size) for row in rows)
    heights = [round(factor * row[0].height) for row in rows]
    width, font = max(round(factor * row[0].width) for row in rows), ImageFont.load_default(11)
    sheet = Image.new("RGB", ((width + 4) * len(captions), CAPTION + sum(heights) + 4 * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        draw.text(((width + 4) * column + 2, 2), caption, "black", font)
    top = CAPTION
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            resampling = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
            tile = picture.resize((round(factor * picture.width), height), resampling)
            sheet.paste(tile, ((width + 4) * column, top))
        top += height + 4
    write_png(sheet, path)


def print_results(out: Path) -> None:
    """Print the table of a finished run to stdout, on rank 0."""
    if rank() == 0:
        sys.stdout.write(results_table(json.loads((out / RESULTS).read_text(encoding="utf-8"))))


def results_table(results: dict[str, Any]) -> str:
    """Return a table with a line for each block and probe, the best one of each probe marked with a star."""
    metrics = [name for name in ("held_out", "mIoU", "mAcc", "aAcc") if name in results["rows"][0]]
    lines = [["block", "probe", "lr", *(name.replace("_", " ") for name in metrics), ""]]
    for row in results["rows"]:
        lr = f"{row['lr']:g}" if "lr" in row else "-"
        star = "*" if row == results["best"][row["probe"]] else ""
        values = [f"{row[name]:.2f}" for name in metrics]
        lines.append([str(row["block"]), PROBE_NAMES[row["probe"]], lr, *values, star])
    note = (
        f"percent, on {results['images']} validation images with {results['classes']} classes; constant_mIoU "
        f"{results['constant_mIoU']:.2f}; learning rates and best rows (*) chosen on {results['picked_by']}"
    )
    return f"{text_table(lines, left_columns=0)}{note}\n"
