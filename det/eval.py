"""`addp det eval`: average precision of boxes and masks on COCO files, by COCO's own evaluation. Boxes alone are
evaluated if the detector or the annotations have no masks.

The metrics go to stdout. With `out`, they are also written to figures.json there, and the detections to results.json in
COCO's results format.
"""

import json
import sys

from addp_core.base.tables import text_table
from addp_core.training.compute import accelerate_model, autocast
from addp_core.training.precision import matrix_width, resolve_precision
from addp_core.training.processes import process_state
from det.coco import open_coco
from det.inference import check_categories, evaluate_detector
from det.model import load_detector
from det.output import make_folder, write_json
from det.recipe import EvalRecipe as Recipe


def run(recipe: Recipe) -> None:
    """Detect objects on all images of the split, then compute the metrics."""
    out = make_folder(recipe.out) if recipe.out else None
    state = process_state()
    model = load_detector(recipe.model)
    dataset = open_coco(recipe.data, recipe.split, masks="auto" if model.architecture.masks else False)
    check_categories(model, dataset)
    model = model.to(state.device).requires_grad_(False)
    accelerate_model(model)
    precision = resolve_precision(recipe.precision, state.device, matrix_width(model))
    with autocast(precision, state.device):
        metrics, results = evaluate_detector(model, dataset, recipe.per_class)
    if not state.is_main_process:
        return
    if out:
        write_json(out / "results.json", results)
        write_json(out / "figures.json", metrics)
    sys.stdout.write(json.dumps(metrics, indent=2) + "\n" if recipe.json else format_table(metrics))


def format_table(metrics: dict[str, float | None]) -> str:
    """Return one line per metric with boxes and, if evaluated, masks side by side, in percent as in the papers."""
    names = [name.removeprefix("box_") for name in metrics if name.startswith("box_")]
    kinds = ["box", "mask"] if "mask_AP" in metrics else ["box"]
    rows = [["", *kinds]]
    rows += [[name, *(_percent(metrics[f"{kind}_{name}"]) for kind in kinds)] for name in names]
    return text_table(rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
