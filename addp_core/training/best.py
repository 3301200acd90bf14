"""The best model of a run so far, by a metric of its evaluations (`train.keep_best`).

<out>/model-best.safetensors  the model
<out>/best.json               the step and the metrics of its evaluation
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.files import write_atomically
from addp_core.training.run_folder import BEST_METRICS, BEST_MODEL, log_write_errors

log = logging.getLogger("addp")


def check_keep_best(metric: str, metrics: Mapping[str, bool]) -> None:
    """Raise UserError if a run cannot keep the best model by `metric`, one of `metrics` (`Stage.metrics`) or ""."""
    if not metric or metric in metrics:
        return
    if not metrics:
        raise UserError(
            f"train.keep_best={metric}: this run evaluates nothing; expected train.keep_best= (empty), or, in "
            "pretraining, evaluation.data=<images> or evaluation.held_out=0.05"
        )
    expected = ", ".join(metrics)
    raise UserError(
        f"train.keep_best: found {metric!r}, expected a metric that this run evaluates: {expected}"
        f"{did_you_mean(metric, metrics)}"
    )


def keep_best(
    out: Path,
    step: int,
    metrics: Mapping[str, float],
    metric: str,
    higher_is_better: Mapping[str, bool],
    write_model: Callable[[Path], Any],
) -> dict[str, Any] | None:
    """Keep the model of an evaluation if it is the best so far, and return the metrics of the best one.

    If the disk is full, or the evaluation has no value of the metric, that is logged, and the best model stays the one
    on the disk. Another `metric` than before begins anew.

    Args:
        out: the run folder.
        step: that was evaluated.
        metrics: its evaluation.
        metric: the one that decides; if it is empty, no model is kept.
        higher_is_better: of each metric.
        write_model: writes the model to a path, complete or not at all.
    """
    if not metric:
        return None
    path = out / BEST_METRICS
    best = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    value, before = metrics.get(metric, math.nan), (best or {}).get(metric, math.nan)
    if not math.isfinite(value):
        log.warning("step %d: not kept as the best model: found %s=%s", step, metric, metrics.get(metric, "no value"))
        return best
    better = value > before if higher_is_better[metric] else value < before
    # A run that fell back to an older checkpoint reaches its best step a second time.
    again = best is not None and best["step"] == step
    if not (better or again or math.isnan(before)):
        return best
    current = {"step": step, **metrics}
    with log_write_errors(out / BEST_MODEL):
        write_model(out / BEST_MODEL)
        write_atomically(path, json.dumps(current).encode())
        best = current
    return best
