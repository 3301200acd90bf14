"""Run folders as `addp app` shows them while they grow: curves of their metrics, and their newest preview images."""

import io
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from addp_core.base.errors import UserError
from addp_core.base.files import TEMPORARY_PREFIX
from addp_core.base.paths import FINISHED_FILE, METRICS_FILE, expand_home
from addp_core.training.curves import COLORS, Panel, draw, points, read_metrics
from addp_core.training.metrics import NOT_PLOTTED
from gen.page_html import Section, Tile, legend, render

SHOWN = len(COLORS)  # runs at a time: as many as there are colors
DEPTH = 5  # folders between one that is given and a run in it: those of a bench, and not the classes of a dataset
PREVIEW = re.compile(r"(.+)-(\d+)\.png")
END_OF_PNG = b"IEND\xaeB`\x82"
NO_RUN = "There is no run yet: the page shows one as soon as its metrics.jsonl is written."

Runs: TypeAlias = dict[str, Path]  # name -> folder
Seen: TypeAlias = tuple[tuple[str, int, int], ...]  # path, size and time of the last change of every file that is shown


class RunsView:
    """The runs in some folders. Each is a run, or holds runs at any depth.

    Raises UserError if one of them is no folder.
    """

    def __init__(self, folders: Sequence[str]):
        self.folders = [expand_home(folder).resolve() for folder in folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise UserError(f"runs: {folder} is not a folder; expected a run folder, or a folder of runs")

    def find(self) -> Runs:
        """Return the runs that are there now, the one whose metrics are newest first, and those without any last."""
        found: dict[Path, tuple[bool, float]] = {}  # whether there are metrics, and when they were written
        names: dict[Path, str] = {}
        for folder in self.folders:
            for name, folders, _ in os.walk(folder):
                path = Path(name)
                try:
                    stat = (path / METRICS_FILE).stat()
                    found[path] = stat.st_size > 0, stat.st_mtime
                    names[path] = str(path.relative_to(folder.parent))
                except OSError:
                    if len(path.relative_to(folder).parts) < DEPTH:
                        continue
                folders.clear()  # a run holds no runs
        short = Counter(names.values())
        newest_first = sorted(found, key=lambda path: found[path], reverse=True)
        return {names[path] if short[names[path]] == 1 else str(path): path for path in newest_first}

    def choose(self, names: Sequence[str]) -> Runs:
        """Return the runs with these names, or the newest if none is named; at most SHOWN, in the order of names."""
        runs = self.find()
        chosen = [name for name in names if name in runs] or list(runs)
        return {name: runs[name] for name in sorted(chosen[:SHOWN])}

    def render(self, runs: Runs) -> str:
        """Return the curves and the newest previews of some runs as HTML."""
        if not runs:
            return render([Section(NO_RUN)])
        lines = {name: read_metrics(folder / METRICS_FILE) for name, folder in runs.items()}
        keys = dict.fromkeys(key for run in lines.values() for line in run for key in line)
        panels = []
        for key in keys:
            curves = {name: [curve] for name, run in lines.items() if (curve := points(run, key))}
            if curves and key not in ("step", *NOT_PLOTTED):
                svg = draw(Panel(key, "step", curves, legend=False), list(runs))
                panels.append(Tile(svg, "", type="image/svg+xml"))
        states = [
            (color, f"{name}: {describe(folder, lines[name])}")
            for color, (name, folder) in zip(COLORS, runs.items(), strict=False)
        ]
        previews = [preview for name, folder in runs.items() for preview in newest_previews(name, folder)]
        sections = [Section("", panels, wide=True)]
        if previews:
            sections.append(Section("newest previews", previews, wide=True))
        return render(sections, legend(states))


def seen(runs: Runs) -> Seen:
    """Return what tells whether the runs have changed since they were last shown."""
    files = []
    for folder in runs.values():
        for path in (folder / METRICS_FILE, folder / FINISHED_FILE, *folder.glob("images/*.png")):
            try:
                stat = path.stat()
            except OSError:
                continue
            files.append((str(path), stat.st_size, stat.st_mtime_ns))
    return tuple(files)


def describe(folder: Path, lines: Sequence[dict[str, float]]) -> str:
    """Return how far a run is."""
    steps = [line["step"] for line in lines if "step" in line]
    text = f"step {steps[-1]:,}" if steps else "no metrics yet"
    if (folder / FINISHED_FILE).exists():
        return f"{text}, finished"
    try:
        written = time.localtime((folder / METRICS_FILE).stat().st_mtime)
    except OSError:
        return text
    return f"{text}, written {time.strftime('%Y-%m-%d %H:%M:%S', written)}"


def newest_previews(name: str, folder: Path) -> list[Tile]:
    """Return the newest complete image of each kind in the folder of a run; one that is still being written is none."""
    steps: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("images/*.png")):
        if (match := PREVIEW.fullmatch(path.name)) and not path.name.startswith(TEMPORARY_PREFIX):
            steps.setdefault(match[1], []).append((int(match[2]), path))
    tiles = []
    for kind, paths in steps.items():
        for step, path in sorted(paths, reverse=True):
            try:
                content = path.read_bytes()
                if not content.endswith(END_OF_PNG):
                    continue
                width = Image.open(io.BytesIO(content), formats=["PNG"]).width
            except (OSError, ValueError, Image.DecompressionBombError):
                continue
            tiles.append(Tile(content, f"{name}: {kind}, step {step:,}", width))
            break
    return tiles
