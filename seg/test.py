"""`addp seg test`: mIoU, aAcc and mAcc on the validation split, of a trained segmentor or of class maps in files.

Prints the metrics of each class and their means, and writes them to `<out>/metrics.json`. `constant_mIoU` is the chance
level: the mIoU of predicting the most frequent class everywhere.
"""

import json
import logging
import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.launch import rank
from addp_core.base.tables import text_table
from addp_core.training.precision import matrix_width, resolve_precision
from seg.mmseg_checkpoint import MmsegSegmentor
from seg.mmseg_config import (
    fill_inference,
    fill_model,
    fill_runtime,
    read_base_config,
)
from seg.recipe import TestRecipe as Recipe
from seg.scenes import check_pairs, class_map_folder, find_pairs, read_class_names
from seg.segmentor import Segmentor, load_segmentor, load_tensors

log = logging.getLogger("addp")

MAPS_FOLDER = "maps"  # in `out`


def run(recipe: Recipe) -> None:
    """Evaluate, print and write. Raises UserError if the dataset cannot be read or does not fit the model."""
    import torch

    if bool(recipe.model) == bool(recipe.predictions):
        raise UserError("model: expected either model=<run of addp seg train> or predictions=<folder of class maps>")
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise UserError(f"precision={recipe.precision}: needs a GPU, but none is available; use bf16 or fp32")
    data, out = recipe.data, Path(recipe.out)
    classes = read_class_names(data.source, data.classes)
    pairs = find_pairs(data.source, "val", log_dropped=rank() == 0)
    if rank() == 0:
        check_pairs(pairs, classes, data.check)
    cfg, state = read_base_config(), None
    if recipe.model:
        segmentor, state = load_segmentor(recipe.model)
        compare_classes(segmentor, classes, data.source)
        fill_model(cfg, replace(segmentor, crop=data.crop or segmentor.crop, scale=data.scale or segmentor.scale))
        if isinstance(segmentor, Segmentor) and segmentor.cnn is None:  # its positions are those of training's crops
            cfg.model.backbone.img_size = (segmentor.crop, segmentor.crop)
        fill_inference(cfg, recipe.test)
    else:
        folder, root = Path(recipe.predictions), class_map_folder(data.source, "val")
        names = [pair.class_map.relative_to(root) for pair in pairs]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"predictions: {folder / missing[0]} is missing; expected a class map for each annotation")
        cfg.model = {"type": "StoredMaps", "folder": str(folder), "root": str(root), "classes": len(classes)}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); choose another folder") from error
    fill_runtime(cfg, out, data.workers, data.source, data.classes)
    metrics, per_class = evaluate(cfg, recipe, state)
    if per_class:  # on rank 0 alone
        report(classes, metrics, per_class, out)


def compare_classes(segmentor: Segmentor | MmsegSegmentor, classes: tuple[str, ...], source: str) -> None:
    """Raise UserError if a dataset has other classes than the model.

    mmseg's datasets have names of their own: there the same number of classes is enough, and other names are logged.
    """
    if segmentor.classes == classes:
        return
    pairs = zip_longest(classes, segmentor.classes, fillvalue=None)
    number, (found, expected) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    if isinstance(segmentor, MmsegSegmentor) and len(segmentor.classes) == len(classes):
        others = sum(a != b for a, b in zip(classes, segmentor.classes, strict=True))
        if rank() == 0:
            log.warning(
                "data.classes: %d of %d names differ from the model's: class %d is %r in %s and %r in the model; taken "
                "to be the same",
                *(others, len(classes), number, found, source, expected),
            )
        return
    raise UserError(
        f"data.classes: {source} has {len(classes)} classes, expected the model's {len(segmentor.classes)}: class "
        f"{number} is {found or 'none'!r} in the dataset and {expected or 'none'!r} in the model"
    )


def evaluate(cfg: Any, recipe: Recipe, state: dict[str, Any] | None) -> tuple[dict[str, float], dict[str, Any]]:
    """Run mmengine's test loop; return the means in percent, and the metrics of each class (empty but on rank 0)."""
    from seg.launch import compute_in, data_workers, start_runner

    for part in ("train", "val"):
        for key in (f"{part}_dataloader", f"{part}_cfg"):
            cfg.pop(key)
    for key in ("optim_wrapper", "param_scheduler", "val_evaluator"):
        cfg.pop(key, None)
    cfg.default_hooks.checkpoint = None
    cfg.test_cfg.fp16 = recipe.precision == "fp16"
    if recipe.maps:
        maps, root = Path(recipe.out) / MAPS_FOLDER, class_map_folder(recipe.data.source, "val")
        cfg.test_evaluator.update(maps=str(maps), root=str(root))
    runner = start_runner(cfg)
    if state is not None:
        model = runner.unwrapped_model
        network = getattr(model, "module", model)  # the segmentor in a SegTTAModel
        load_tensors(network, state, recipe.model)
        width = matrix_width(network)
        if resolve_precision(recipe.precision, next(network.parameters()).device, width) == "bf16":
            compute_in("bf16", network, training=False)
    with data_workers(runner):
        metrics = runner.test()
    [metric] = runner.test_loop.evaluator.metrics
    return metrics, getattr(metric, "per_class", {})


def report(classes: tuple[str, ...], metrics: dict[str, float], per_class: dict[str, Any], out: Path) -> None:
    """Print the metrics as a table, and write metrics.json."""
    rows = [["class", "IoU", "Acc"]]
    for name, iou, accuracy in zip(classes, per_class["IoU"], per_class["Acc"], strict=True):
        rows.append([name, f"{iou:.2f}", f"{accuracy:.2f}"])
    summary = "  ".join(f"{key} {value:.2f}" for key, value in metrics.items())
    sys.stdout.write(f"{text_table(rows)}{summary}\n")
    without_nan = {
        key: [None if value != value else round(float(value), 4) for value in values]
        for key, values in per_class.items()
    }
    content = {**metrics, "classes": list(classes), "per_class": without_nan}
    write_atomically(out / "metrics.json", (json.dumps(content, indent=1) + "\n").encode())
    log.info("seg test: mIoU %.2f, in %s", metrics["mIoU"], out / "metrics.json")
