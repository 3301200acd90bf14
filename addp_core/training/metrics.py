"""What a run shows of itself: metrics.jsonl, trackers, progress, previews and curves."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from addp_core.base.files import atomic_replace, write_atomically
from addp_core.base.paths import METRICS_FILE, RECIPE_FILE
from addp_core.base.tables import duration
from addp_core.training.run_folder import log_write_errors
from addp_core.training.run_recipe import read_values
from addp_core.training.tracker_backends import TrackedRun, TrackerName
from addp_core.training.trackers import Trackers, is_training, rows, tagged

log = logging.getLogger("addp")

NOT_PLOTTED = ("epoch", "images")  # metrics that only count


class RunLogger:
    """Logs the metrics, progress and images of a run. A full disk costs their files, but does not stop the run."""

    def __init__(
        self,
        out: Path,
        name: str,
        step: int,
        total: int,
        trackers: Sequence[TrackerName] = ("tensorboard",),
        project: str = "",
    ):
        """Start logging after `step` of `total` steps; metrics of later steps, left by a stopped run, are dropped.

        Args:
            out: the run folder, with its recipe.yaml.
            name: what is trained.
            trackers: where the run is logged besides metrics.jsonl.
            project: its name in trackers that have projects.
        """
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self.out, self.total = out, total
        self.metrics = out / METRICS_FILE
        lines = list(_lines_until(self.metrics, step, total))
        write_atomically(self.metrics, b"".join(lines))
        self.file = self.metrics.open("a")
        recipe = out / RECIPE_FILE
        run = TrackedRun(out, name, project, step, read_values(recipe.read_text()) if recipe.exists() else {})
        self.trackers = Trackers(run, trackers, rows(map(json.loads, lines), out / "images", step))
        terminal = sys.stderr.isatty()
        self.bar = tqdm(desc=name, total=total, initial=step, unit="step", dynamic_ncols=True) if terminal else None
        self.redirection = contextlib.ExitStack()
        if terminal:  # messages go above the bar, not through it
            loggers = [logger for logger in (logging.getLogger(), log) if logger.handlers]
            self.redirection.enter_context(logging_redirect_tqdm(loggers))

    def advance(self) -> None:
        """Count one step in the progress bar; the metrics of the step before are complete."""
        self.trackers.advance()
        if self.bar is not None:
            self.bar.update()

    def log_training(self, metrics: Mapping[str, float | None], eta: float) -> None:
        """Log metrics of the steps since the last call: `step`, `epoch`, `loss`, `lr`, `img_s` and any others.

        `eta` is the expected time to the end in seconds.
        """
        self._write(int(metrics["step"] or 0), metrics)
        loss = "-" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        text = f"loss {loss}  lr {metrics['lr']:.3g}  {metrics['img_s']:.1f} img/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            step, epoch = metrics["step"], metrics["epoch"]
            log.info("step %d/%d  epoch %.2f  %s  eta %s", step, self.total, epoch, text, duration(eta))

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an evaluation."""
        self._write(step, {"step": step, **metrics})
        log.info("step %d  %s", step, "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))

    def save_images(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Write each batch, name -> Float[n,3,h,w] in [0, 1], as a near-square grid to images/<name>-<step>.png."""
        from torchvision.utils import save_image

        for name, batch in images.items():
            columns = max(1, round(len(batch) ** 0.5))
            with self._log_write_errors(f"images/{name}-{step}.png"):
                batch = batch.detach().float().clamp(0, 1).cpu()
                path = self.out / "images" / f"{name}-{step}.png"
                with atomic_replace(path) as temporary:  # `addp app` shows a run while it goes on
                    save_image(batch, temporary, nrow=columns, format="png")
                self.trackers.add(step, images={name: path})

    def has_evaluation(self, step: int) -> bool:
        """Check whether the evaluation after this step has been logged."""
        lines = map(json.loads, self.metrics.read_bytes().splitlines())
        return any(line["step"] == step and not is_training(line) for line in lines)

    def has_images(self, step: int) -> bool:
        """Check whether images of this step have been saved."""
        return any((self.out / "images").glob(f"*-{step}.png"))

    def plot_curves(self) -> None:
        """Plot every metric of metrics.jsonl over the steps, the loss first, to images/curves.png."""
        from matplotlib.figure import Figure

        series: dict[str, list[tuple[int, float]]] = {}
        for line in self.metrics.read_text().splitlines():
            metrics = json.loads(line)
            step = metrics.pop("step")
            for key, value in metrics.items():
                if value is not None and key not in NOT_PLOTTED:
                    series.setdefault(key, []).append((step, value))
        if not series:
            return
        columns = min(3, len(series))
        rows = -(-len(series) // columns)
        figure = Figure(figsize=(4 * columns, 2.6 * rows))
        figure.subplots_adjust(0.2 / columns, 0.2 / rows, 1 - 0.1 / columns, 1 - 0.12 / rows, wspace=0.25, hspace=0.4)
        for index, (key, points) in enumerate(series.items(), start=1):
            axes = figure.add_subplot(rows, columns, index, title=key)
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None, linewidth=1)
            axes.grid(alpha=0.3)
        with self._log_write_errors("images/curves.png"):
            figure.savefig(self.out / "images" / "curves.png", dpi=100)

    def finish(self) -> None:
        """Say that the run has reached its end, and plot its curves."""
        self.trackers.finish()
        self.plot_curves()

    def close(self) -> None:
        """Flush and close all files."""
        if self.bar is not None:
            self.bar.close()
        self.redirection.close()
        with self._log_write_errors(METRICS_FILE):
            self.file.close()
        self.trackers.close()

    def _write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        with self._log_write_errors(METRICS_FILE):
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
        self.trackers.add(step, tagged(metrics))

    def _log_write_errors(self, name: str) -> contextlib.AbstractContextManager[None]:
        return log_write_errors(self.out / name)


def _lines_until(metrics: Path, step: int, total: int) -> Iterator[bytes]:
    """Yield the complete lines of metrics.jsonl that a run which continues from `step` will not write again."""
    if not metrics.exists():
        return
    for line in metrics.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # a line that was cut off when the process was killed
            values = json.loads(line)
            final_evaluation = values["step"] == total and not is_training(values)  # repeated by the continued run
            if line.endswith(b"\n") and values["step"] <= step and not final_evaluation:
                yield line
