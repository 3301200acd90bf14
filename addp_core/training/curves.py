"""Curves as SVG with a transparent background: metrics of runs, and scores against images seen."""

import io
import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

MAX_POINTS = 400  # of a curve; longer ones are averaged in groups
INK = "#787e84"  # of axes and text: readable on white and on black
COLORS = ("#2f7fd6", "#e0751c", "#2f9e5b", "#c8508c", "#8a6fd1", "#9c8a12", "#4fa3a5", "#b5523b")
STYLING = threading.Lock()  # matplotlib's settings are those of all threads

Points: TypeAlias = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Curves in one frame. curves: name -> a curve for each seed; levels: name -> height of a horizontal line, at most
    two; markers: mark each point, for curves of few measurements; legend: say which curve is
    which, if they are several.
    """

    title: str
    x: str
    curves: Mapping[str, Sequence[Points]]
    levels: Mapping[str, float] = field(default_factory=dict)
    markers: bool = False
    legend: bool = True


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl, [] if it is missing; a line that a kill has cut off is skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def points(lines: Sequence[Mapping[str, float]], key: str, x: str = "step") -> Points:
    """Return (x, key) of the lines that have both, with the largest value for each x, thinned to MAX_POINTS."""
    largest: dict[float, float] = {}
    for line in lines:
        at, value = line.get(x), line.get(key)
        if (
            isinstance(at, int | float)
            and isinstance(value, int | float)
            and math.isfinite(at)
            and math.isfinite(value)
        ):
            largest[at] = max(value, largest.get(at, -math.inf))
    curve = sorted(largest.items())
    size = -(-len(curve) // MAX_POINTS) or 1
    groups = (curve[start : start + size] for start in range(0, len(curve), size))
    return [(sum(at for at, _ in g) / len(g), sum(value for _, value in g) / len(g)) for g in groups]


def draw(panel: Panel, names: Sequence[str]) -> bytes:
    """Return a panel as SVG. names: of all curves, in the order of their colors."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "addp",
        "font.family": "sans-serif",
        "text.parse_math": False,
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with STYLING, rc_context(style):
        figure = Figure((4.4, 3.2))
        axes = figure.add_axes((0.15, 0.16, 0.82, 0.74))  # a layout engine takes seconds
        for name, seeds in panel.curves.items():
            for i, curve in enumerate(seeds):
                marker = "o" if panel.markers or len(curve) < 3 else None
                label = name if i == 0 else None
                axes.plot(*zip(*curve, strict=True), color=colors[name], lw=1.4, marker=marker, ms=4, label=label)
        for (name, level), line in zip(panel.levels.items(), ("--", ":"), strict=False):
            axes.axhline(level, color=INK, lw=1.2, ls=line, label=name)
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel(panel.x, fontsize=10)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=9)
        axes.grid(color=INK, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.legend and len(panel.curves) + len(panel.levels) > 1:
            axes.legend(fontsize=9, frameon=False)
        with io.BytesIO() as file:
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
            return file.getvalue()
