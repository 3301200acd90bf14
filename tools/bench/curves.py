"""Curves of a report, as SVG on no ground: of runs, from their metrics.jsonl, and of scores against images seen."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POINTS = 400  # of a curve; longer ones are averaged in as many parts
INK = "#80868c"  # of axes and words: readable on white and on black
COLOURS = ("#2f7fd6", "#e0751c", "#2f9e5b", "#c8508c", "#8a6fd1", "#9c8a12", "#4fa3a5", "#b5523b")

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Curves in one frame: name -> those of its seeds; levels: name -> height of a line across, two at most."""

    title: str
    x: str
    curves: Mapping[str, Sequence[Points]]
    levels: Mapping[str, float] = field(default_factory=dict)
    marked: bool = False  # each point is a measurement of its own


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; none where it is missing. A line cut off by a kill is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def points(lines: Sequence[Mapping[str, float]], key: str, x: str = "step") -> Points:
    """(x, key) of the lines that have both; per x the largest value, thinned to POINTS."""
    best: dict[float, float] = {}
    for line in lines:
        values = line.get(x), line.get(key)
        if all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            best[values[0]] = max(values[1], best.get(values[0], -math.inf))
    whole = sorted(best.items())
    part = -(-len(whole) // POINTS) or 1
    groups = (whole[start : start + part] for start in range(0, len(whole), part))
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]


def draw(panel: Panel, names: Sequence[str]) -> bytes:
    """SVG of a panel. `names`: all curves of the report, in the order of their colours."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    words = {"svg.fonttype": "none", "svg.hashsalt": "addp", "font.family": "sans-serif", "text.parse_math": False}
    tinted = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with rc_context(words | tinted):
        figure = Figure((4.4, 3.2))
        axes = figure.add_axes((0.15, 0.16, 0.82, 0.74))  # a layout engine takes seconds
        for name, seeds in panel.curves.items():
            for i, curve in enumerate(seeds):
                marker = "o" if panel.marked or len(curve) < 3 else None
                label = name if i == 0 else None
                axes.plot(*zip(*curve, strict=True), color=colours[name], lw=1.4, marker=marker, ms=4, label=label)
        for (name, level), style in zip(panel.levels.items(), ("--", ":"), strict=False):
            axes.axhline(level, color=INK, lw=1.2, ls=style, label=name)
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel(panel.x, fontsize=10)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.curves) + len(panel.levels) > 1:
            axes.legend(fontsize=9, frameon=False)
        with io.BytesIO() as file:
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
            return file.getvalue()
