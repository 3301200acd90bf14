"""What a training run keeps of its validations: the metrics and a confusion matrix."""

import csv
import io
import json
import warnings
from pathlib import Path
from typing import Any

from addp_core.base.files import write_atomically
from addp_core.base.fonts import find_font
from addp_core.training.run_folder import log_write_errors
from cls.evaluation import Scores

RESULTS, CONFUSION = "results.json", "confusion.csv"
METRICS = {"top1": True, "top5": True}  # of validation, and whether higher is better


def write_results(scores: Scores, step: int, best: dict[str, Any] | None, out: Path) -> None:
    """Write the metrics of `step` and of the best step so far to results.json.

    What does not fit on the disk is skipped with a warning; the best step is the best one whose model was written.
    """
    last = {"step": step, **scores.metrics}
    results = {"images": scores.images, "classes": len(scores.confusion), "last": last, "best": best}
    with log_write_errors(out / RESULTS):
        write_atomically(out / RESULTS, json.dumps(results, indent=1).encode())


def write_confusion(scores: Scores, class_names: tuple[str, ...], out: Path) -> None:
    """Write the confusion matrix (rows: true class, columns: prediction) as confusion.csv and images/confusion.png.

    What does not fit on the disk is skipped with a warning.
    """
    from matplotlib.figure import Figure

    # A folder's name need not be UTF-8: its other bytes are written as \udcff, which every program can read.
    class_names = tuple(name.encode(errors="backslashreplace").decode() for name in class_names)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true\\answer", *class_names])
    writer.writerows([name, *row] for name, row in zip(class_names, scores.confusion.tolist(), strict=True))
    with log_write_errors(out / CONFUSION):
        write_atomically(out / CONFUSION, text.getvalue().encode())
    fractions = scores.confusion / scores.confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(max(4.0, 0.3 * len(class_names)), 12.0)
    figure = Figure(figsize=(side + 1, side))
    title = f"top-1 {scores.metrics['top1']:.1f} %"
    axes = figure.add_subplot(title=title, xlabel="prediction", ylabel="true class")
    figure.colorbar(axes.imshow(fractions.numpy(), vmin=0, vmax=1, cmap="viridis"), label="fraction of the true class")
    if len(class_names) <= 40:
        axes.set_xticks(range(len(class_names)), class_names, rotation=90)
        axes.set_yticks(range(len(class_names)), class_names)
        font = find_font("".join(sorted({character for name in class_names for character in name})))
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_parse_math(False)  # a name may contain dollar signs
            label.set_fontproperties(Path(font) if font else None)
    with log_write_errors(out / "images" / "confusion.png"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # `find_font` has named them all, once
        figure.tight_layout()
        figure.savefig(out / "images" / "confusion.png", dpi=100)
