"""`addp seg test`: mIoU, aAcc and mAcc of a trained segmentor on the validation split, or of class maps on the disk.

Prints the figures of each class and their means, and writes them to `<out>/metrics.json`. `constant_mIoU` is that of a
map which shows the most frequent class everywhere.
"""

import json
import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from seg.scenes import SceneConfig, check_pairs, class_names, find_pairs, maps_of
from seg.settings import TestConfig, base_config, fill_model, fill_runtime, fill_test, load_segmentor, rank

log = logging.getLogger("addp")

MAPS = "maps"  # in the folder


@dataclass
class Recipe:
    """Keys of `addp seg test`."""

    out: Annotated[str, "folder for metrics.json"]
    data: SceneConfig
    model: Annotated[str, "a run of `addp seg train` or its model.safetensors"] = ""
    predictions: Annotated[
        str, "instead of a model: a folder of class maps, placed and numbered as the annotations"
    ] = ""
    test: TestConfig = field(default_factory=TestConfig)
    precision: Annotated[Literal["fp32", "fp16"], "arithmetic; fp16 needs a GPU"] = "fp32"
    maps: Annotated[bool, "also write the class maps to <out>/maps, placed and numbered as the annotations"] = False


def run(recipe: Recipe) -> None:
    """Evaluate, print, write. UserError for a set that does not fit the model or cannot be read."""
    import torch

    if bool(recipe.model) == bool(recipe.predictions):
        raise UserError("model: expected either model=<run of addp seg train> or predictions=<folder of class maps>")
    if recipe.precision != "fp32" and not torch.cuda.is_available():
        raise UserError(f"precision={recipe.precision}: needs a GPU, there is none; use fp32")
    data, out = recipe.data, Path(recipe.out)
    classes = class_names(data.source, data.classes)
    pairs = find_pairs(data.source, "val")
    if rank() == 0:
        check_pairs(pairs, len(classes), data.check)
    cfg, state = base_config(), None
    if recipe.model:
        segmentor, state = load_segmentor(recipe.model)
        if segmentor.classes != classes:
            raise UserError(
                f"data.classes: {data.source} has {len(classes)} classes ({', '.join(classes[:3])}, ...), expected the "
                f"model's {len(segmentor.classes)} ({', '.join(segmentor.classes[:3])}, ...)"
            )
        sizes = {"crop": data.crop or segmentor.crop, "scale": data.scale or segmentor.scale}
        fill_model(cfg, replace(segmentor, **sizes))
        fill_test(cfg, recipe.test)
    else:
        folder, root = Path(recipe.predictions), maps_of(data.source, "val")
        names = [pair.classes.relative_to(root) for pair in pairs]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"predictions: {folder / missing[0]} is missing; expected a map for each of the annotations"
            )
        cfg.model = {"type": "StoredMaps", "folder": str(folder), "root": str(root), "classes": len(classes)}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); choose another folder") from error
    fill_runtime(cfg, out, data.workers, data.source, data.classes)
    figures, per_class = evaluate(cfg, recipe, state)
    if per_class:  # on the first process alone
        report(classes, figures, per_class, out)


def evaluate(cfg: Any, recipe: Recipe, state: dict[str, Any] | None) -> tuple[dict[str, float], dict[str, Any]]:
    """mmengine's test loop -> (means in percent, each class's)."""
    from seg.launch import loading, start_runner
    from seg.runner import fill

    for part in ("train", "val"):
        for key in (f"{part}_dataloader", f"{part}_cfg"):
            cfg.pop(key)
    for key in ("optim_wrapper", "param_scheduler", "val_evaluator"):
        cfg.pop(key, None)
    cfg.default_hooks.checkpoint = None
    cfg.test_cfg.fp16 = recipe.precision == "fp16"
    if recipe.maps:
        maps, root = Path(recipe.out) / MAPS, maps_of(recipe.data.source, "val")
        cfg.test_evaluator.update(maps=str(maps), root=str(root))
    runner = start_runner(cfg)
    if state is not None:
        fill(getattr(runner.bare, "module", runner.bare), state, recipe.model)
    with loading(runner):
        figures = runner.test()
    [metric] = runner.test_loop.evaluator.metrics
    return figures, getattr(metric, "per_class", {})


def report(classes: tuple[str, ...], figures: dict[str, float], per_class: dict[str, Any], out: Path) -> None:
    """A table on stdout, and metrics.json."""
    width = max(map(len, (*classes, "class")))
    lines = [f"{'class':<{width}}  {'IoU':>6}  {'Acc':>6}"]
    for name, iou, accuracy in zip(classes, per_class["IoU"], per_class["Acc"], strict=True):
        lines.append(f"{name:<{width}}  {iou:6.2f}  {accuracy:6.2f}")
    lines.append("  ".join(f"{key} {value:.2f}" for key, value in figures.items()))
    sys.stdout.write("\n".join(lines) + "\n")
    table = {
        key: [None if value != value else round(float(value), 4) for value in row] for key, row in per_class.items()
    }
    content = {**figures, "classes": list(classes), "per_class": table}
    write_atomically(out / "metrics.json", (json.dumps(content, indent=1) + "\n").encode())
    log.info("seg test: mIoU %.2f, in %s", figures["mIoU"], out / "metrics.json")
