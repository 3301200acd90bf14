"""`addp det eval`: average precision of boxes and masks on COCO files, by COCO's own evaluation.

The figures go to stdout; with `out`, also to figures.json there, and what was found to results.json in COCO's format.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.training.compute import accelerate_model
from addp_core.training.engine import process_state
from det.coco import evaluate, open_coco
from det.config import CocoFiles
from det.model import check_categories, detect_all, load_detector


@dataclass
class Recipe:
    """Keys of `addp det eval`."""

    model: Annotated[str, "a run of `addp det train`, or its file"]
    data: CocoFiles = field(default_factory=CocoFiles)
    split: Annotated[Literal["val", "train"], "part of the set"] = "val"
    per_class: Annotated[bool, "average precision of each category too"] = False
    out: Annotated[str, "folder for figures.json and results.json; empty: no files"] = ""
    json: Annotated[bool, "print JSON instead of a table"] = False


def run(recipe: Recipe) -> None:
    """Find everything on the set's images, then compare."""
    out = make_folder(recipe.out) if recipe.out else None
    state = process_state()
    coco = open_coco(recipe.data, recipe.split)
    model = load_detector(recipe.model)
    check_categories(model, coco)
    model = model.to(state.device).requires_grad_(False)
    accelerate_model(model)
    results = detect_all(model, coco)
    if not state.is_main_process:
        return
    figures = evaluate(coco.dataset(), results, recipe.per_class)
    if out:
        write_json(out / "results.json", results)
        write_json(out / "figures.json", figures)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n" if recipe.json else table(figures))


def table(figures: dict[str, float | None]) -> str:
    """A line a figure, boxes beside masks, in percent as the papers give them."""
    names = [name.removeprefix("box_") for name in figures if name.startswith("box_")]
    width = max(map(len, names))
    rows = [("", "box", "mask"), *((name, *(figures[f"{kind}_{name}"] for kind in ("box", "mask"))) for name in names)]
    lines = (f"{name:<{width}}  {_cell(box):>6}  {_cell(mask):>6}" for name, box, mask in rows)
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{100 * value:.2f}"


def make_folder(out: str) -> Path:
    """UserError where it cannot be made."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); choose another folder") from error
    return Path(out)


def write_json(path: Path, content: Any) -> None:
    """The whole file or none; UserError where it cannot be written."""
    try:
        write_atomically(path, json.dumps(content).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
