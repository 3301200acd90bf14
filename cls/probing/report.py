"""The results of the fast mode of `addp linprobe`: results.json, metrics.jsonl, a plot, and a table on stdout."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from addp_core.base.files import write_atomically
from addp_core.base.launch import rank
from addp_core.base.paths import METRICS_FILE
from addp_core.base.tables import text_table
from cls.probing.recipe import FastConfig
from cls.results import RESULTS

log = logging.getLogger("addp")


def metric_names(row: dict[str, Any]) -> list[str]:
    """Return the names of the metrics in a row of results, in the order of the table's columns."""
    return [name for name in ("held_out", "top1", "top5", "knn") if name in row]


def best_row(rows: list[dict[str, Any]], config: FastConfig) -> dict[str, Any]:
    """Return the row of the best block and pooling, on the images that chose the learning rates."""
    metric = "held_out" if config.held_out else "top1"
    best = max(rows, key=lambda row: row[metric])
    if len(config.lrs) > 2 and best["lr"] in (min(config.lrs), max(config.lrs)):
        log.warning("the best learning rate, %g, is at the end of fast.lrs; a wider range may be better", best["lr"])
    return best


def write_results(
    out: Path,
    rows: list[dict[str, Any]],
    best: dict[str, Any],
    config: FastConfig,
    *,
    norm: str,
    classes: int,
    train_images: int,
    val_images: int,
) -> None:
    """Write results.json, metrics.jsonl and the plot over blocks."""
    chosen_on = (
        f"{config.held_out:.0%} of the training images" if config.held_out else "the validation images themselves"
    )
    results = {
        "images": val_images,
        "classes": classes,
        "trained_on": train_images,
        "picked_by": chosen_on,
        "norm": norm,
        "best": best,
        "lrs": config.lrs,
        "rows": rows,
    }
    lines = [{"step": row["block"], **{name: row[name] for name in row if name != "sweep"}} for row in rows]
    write_atomically(out / RESULTS, json.dumps(results, indent=1).encode())
    write_atomically(out / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())
    plot_by_block(rows, out / "images" / "blocks.png")


def plot_by_block(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot top-1 accuracy over blocks, a line for each pooling and classifier."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="block", ylabel="top-1 on validation (%)")
    for number, pooling in enumerate(dict.fromkeys(row["pooling"] for row in rows)):
        pooled = [row for row in rows if row["pooling"] == pooling]
        for metric, style, label in (("top1", "o-", "linear"), ("knn", "s--", "k-NN")):
            if metric in pooled[0]:
                blocks, values = zip(*((row["block"], row[metric]) for row in pooled), strict=True)
                axes.plot(blocks, values, style, color=f"C{number}", label=f"{label}, {pooling}")
    axes.set_xticks(sorted({row["block"] for row in rows}))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def print_results(out: Path, mode: str) -> None:
    """Print the results of a finished run to stdout, on rank 0: a table in the fast mode, else results.json."""
    if rank() != 0 or not (out / RESULTS).exists():
        return
    results = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    sys.stdout.write(results_table(results) if mode == "fast" else json.dumps(results, indent=1) + "\n")


def results_table(results: dict[str, Any]) -> str:
    """Return a table with a line for each block and pooling, the best one marked with a star."""
    rows = results["rows"]
    titles = {"held_out": "held out", "top1": "top-1", "top5": "top-5", "knn": "k-NN"}
    lines = [["block", "pooling", "lr", *(titles[name] for name in metric_names(rows[0])), ""]]
    for row in rows:
        metrics = [f"{row[name]:.2f}" for name in metric_names(row)]
        star = "*" if row == results["best"] else ""
        lines.append([str(row["block"]), row["pooling"], f"{row['lr']:g}", *metrics, star])
    note = (
        f"percent of {results['images']} validation images, {results['classes']} classes; "
        f"learning rates and best row (*) chosen on {results['picked_by']}"
    )
    if (norm := results.get("norm", "none")) != "none":
        note += f"; norm={norm}"
    return f"{text_table(lines, left_columns=0)}\n{note}\n"
