"""The report of `addp evaluate`: evaluation.json, with one row for each setting, and the same as a table in text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.tables import text_table

REPORT_FILE = "evaluation.json"  # in the folder of `addp evaluate`
UNFINISHED_FILE = "evaluation-unfinished.json"  # beside it: the rows so far, until there are all of them
# Metrics in the order of the table. FID, IS and KID are defined on Inception's features alone; with a classifier's, the
# same formulas are called FD, CS (classifier score) and KD.
METRIC_LABELS = {
    "fid": "FID",
    "fd": "FD",
    "is_mean": "IS",
    "cs_mean": "CS",
    "precision": "precision",
    "recall": "recall",
    "kid_mean": "KID x 1000",
    "kd_mean": "KD x 1000",
}
KERNEL_DISTANCES = ("kid_mean", "kd_mean")  # shown times 1000


def write_report(report: dict[str, Any], out: Path, complete: bool) -> None:
    """Write `out`/evaluation.json. Rows that are not `complete` go elsewhere, and leave the report before in place."""
    path = out / (REPORT_FILE if complete else UNFINISHED_FILE)
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    if complete:
        (out / UNFINISHED_FILE).unlink(missing_ok=True)


def read_report(path: Path) -> dict[str, Any]:
    """Read the report in the folder `path`, or the file `path` itself. Raises UserError if it is not a report."""
    path = path / REPORT_FILE if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {"features": report["features"], "rows": list(report["rows"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"evaluation: {path} is not a report of `addp evaluate` ({error})") from error


def format_report(report: dict[str, Any]) -> str:
    """Format the report as a text table, with standard deviations after the means."""
    columns = [key for key in METRIC_LABELS if key in report["rows"][0]]
    lines = [["images", "n", *(METRIC_LABELS[key] for key in columns)]]
    for row in report["rows"]:
        cells = [row["name"], str(row["images"])]
        for key in columns:
            scale = 1000 if key in KERNEL_DISTANCES else 1
            text = f"{row[key] * scale:.3f}"
            deviation = row.get(key.replace("_mean", "_std")) if key.endswith("_mean") else None
            cells.append(text if deviation is None else f"{text} ± {deviation * scale:.3f}")
        lines.append(cells)
    reference = report["reference"]
    if resize := report.get("reference_resize"):
        reference += f" (resized by {resize} interpolation)"
    head = [f"features: {report['features']}", f"reference: {reference}"]
    if described := describe_precision_recall(report):
        head.append(f"precision and recall: {described}")
    return "\n".join([*head, "", text_table(lines)])


def describe_precision_recall(report: Mapping[str, Any]) -> str:
    """Return what precision and recall were computed from, "" if the report does not say."""
    about = report.get("precision_recall")
    return f"{about['features']}, k = {about['neighbors']}" if about else ""
