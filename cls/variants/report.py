"""The results of `addp robustness` as results.json, as a Markdown table and as CSV."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from addp_core.base.files import write_atomically
from addp_core.base.tables import markdown_table
from addp_core.data.corruptions import CORRUPTIONS, SEVERITIES
from cls.results import RESULTS
from cls.variants.datasets import DATASETS, IMAGENET_C_KEYS, TOP1_KEYS, DatasetPart, format_missing
from cls.variants.evaluation import Counts
from cls.variants.mce import ALEXNET_ERRORS, corruption_errors
from cls.variants.store import write_errors

MARKDOWN, CSV = "robustness.md", "robustness.csv"


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write results.json, robustness.md and robustness.csv."""
    with write_errors(out):
        write_atomically(out / RESULTS, (json.dumps(report, indent=1) + "\n").encode())
        write_atomically(out / MARKDOWN, markdown_report(report).encode())
        write_atomically(out / CSV, csv_report(report).encode())


def summarize(model: str, results: Mapping[DatasetPart, Counts]) -> dict[str, Any]:
    """Return the content of results.json, with metrics in percent.

    A dataset's `score` is its contribution to the average: top-1, or 1 - mCE.
    """
    report: dict[str, Any] = {"model": model, "rows": []}
    for key in dict.fromkeys(part.key for part in results):
        of_dataset = {part: counts for part, counts in results.items() if part.key == key}
        counts = list(of_dataset.values())
        row: dict[str, Any] = {"key": key, "set": DATASETS[key], "cells": len(counts)}
        row |= {"images": sum(part.images for part in counts), "classes": counts[0].classes}
        row["top1"] = float(np.mean([part.top1 for part in counts]))
        row["top5"] = float(np.mean([part.top5 for part in counts]))
        if unreadable := sum(len(part.unreadable) for part in counts):
            row["unreadable"] = unreadable
        if key in IMAGENET_C_KEYS:
            row |= _summarize_corruptions(of_dataset)
        elif key in TOP1_KEYS:
            row["score"] = row["top1"]
        report["rows"].append(row)
    scores = {row["key"]: row["score"] for row in report["rows"] if "score" in row}
    report["not_averaged"] = [DATASETS[key] for key in TOP1_KEYS if key not in scores]
    report["not_averaged"] += [] if any(key in scores for key in IMAGENET_C_KEYS) else [DATASETS[IMAGENET_C_KEYS[0]]]
    report["average"] = None if report["not_averaged"] else float(np.mean(list(scores.values())))
    return report


def _summarize_corruptions(results: Mapping[DatasetPart, Counts]) -> dict[str, Any]:
    """Return the errors of each corruption of ImageNet-C, mCE, the score 1 - mCE, and what is missing."""
    errors: dict[str, dict[int, float]] = {}
    for part, counts in results.items():
        errors.setdefault(part.corruption, {})[part.severity] = 1 - counts.top1 / 100
    corruptions: dict[str, dict[str, Any]] = {name: {**row} for name, row in corruption_errors(errors).items()}
    for name, by_severity in errors.items():
        corruptions[name]["errors"] = {str(severity): 100 * error for severity, error in by_severity.items()}
    mce = float(np.mean([row["ce"] for row in corruptions.values()]))
    missing = [(name, level) for name in CORRUPTIONS for level in SEVERITIES if level not in errors.get(name, {})]
    incomplete = [f"{part.corruption} {part.severity} ({part.lacks})" for part in results if part.lacks]
    text = "; ".join(filter(None, [format_missing(missing), *incomplete]))
    return {"mce": mce, "score": 100 - mce, "missing": text, "corruptions": corruptions}


def markdown_report(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown tables with notes."""
    lines = [["dataset", "images", "classes", "top-1", "score"]]
    for row in report["rows"]:
        images = f"{row['images']:,}" + (f" in {row['cells']} parts" if row["cells"] > 1 else "")
        score = f"{row['score']:.1f}" + ("*" if row.get("missing") else "") if "score" in row else "-"
        lines.append([row["set"], images, str(row["classes"]), f"{row['top1']:.1f}", score])
    imagenet_c = next((row for row in report["rows"] if "mce" in row), None)
    star = "*" if imagenet_c and imagenet_c["missing"] else ""
    if report["average"] is not None:
        lines.append(["average", "", "", "", f"{report['average']:.1f}{star}"])
    notes = ["score: top-1, or 1 - mCE for ImageNet-C; the average is the mean of the four scores, as in the paper."]
    if report["not_averaged"]:
        missing = ", ".join(report["not_averaged"])
        notes = [f"score: top-1, or 1 - mCE for ImageNet-C. There is no average without {missing}."]
    notes += [
        f"{row['unreadable']:,} images of {row['set']} cannot be read and are not counted; the same command tries them "
        "again."
        for row in report["rows"]
        if "unreadable" in row
    ]
    text = f"model: {report['model']}, metrics in percent\n\n{markdown_table(lines)}\n"
    if imagenet_c:
        text += f"\n{DATASETS[imagenet_c['key']]}\n\n{markdown_table(_corruption_lines(imagenet_c, star))}\n"
        if star:
            parts = len(CORRUPTIONS) * len(SEVERITIES)
            notes.append(f"\\* averaged over {imagenet_c['cells']} of {parts} parts. Missing: {imagenet_c['missing']}.")
        if imagenet_c["key"] == "corrupt":
            notes.append(
                "The corruptions were generated: do not compare these results with results on the published ImageNet-C."
            )
    return text + "\n" + "\n".join(notes) + "\n"


def _corruption_lines(row: Mapping[str, Any], star: str) -> list[list[str]]:
    """Return the lines of a table of errors: a line for each corruption, a column for each severity."""
    header = ["error", *map(str, SEVERITIES), "mean", "AlexNet", "CE"]
    lines = [
        [name]
        + [f"{errors['errors'][str(s)]:.1f}" if str(s) in errors["errors"] else "-" for s in SEVERITIES]
        + [f"{errors['error']:.1f}", f"{100 * ALEXNET_ERRORS[name]:.1f}", f"{errors['ce']:.1f}"]
        for name, errors in row["corruptions"].items()
    ]
    return [header, *lines, [f"mCE{star}", *[""] * 7, f"{row['mce']:.1f}"]]


def csv_report(report: Mapping[str, Any]) -> str:
    """Return the report as CSV: a line for each dataset, and one for the average."""
    columns = ["set", "images", "classes", "cells", "top1", "top5", "mce", "score", "missing"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["rows"])
    if report["average"] is not None:
        writer.writerow({"set": "average", "score": report["average"]})
    return text.getvalue()
