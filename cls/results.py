"""What a training run keeps of its validations: the best checkpoint so far and the metrics."""

import json
from pathlib import Path

from torch import nn

from addp_core.base.files import write_atomically
from addp_core.training.run_folder import log_write_errors
from addp_core.weights.saving import save_model
from cls.evaluation import Scores

BEST_MODEL, BEST_METRICS, RESULTS = "model-best.safetensors", "best.json", "results.json"


def keep_best(model: nn.Module, step: int, scores: Scores, out: Path) -> None:
    """Write the metrics of `step` and of the best step so far to results.json, and the best step's model beside it.

    What does not fit on the disk is skipped with a warning; the best step is the best one whose model was written.
    """
    last = {"step": step, **scores.metrics}
    best_path = out / BEST_METRICS
    best = json.loads(best_path.read_text(encoding="utf-8")) if best_path.exists() else None
    # A run that fell back to an older checkpoint reaches its best step a second time.
    if best is None or last["top1"] > best["top1"] or step == best["step"]:
        with log_write_errors(out / BEST_MODEL):
            save_model(model, out / BEST_MODEL)
            write_atomically(best_path, json.dumps(last).encode())
            best = last
    results = {"images": scores.images, "classes": len(scores.confusion), "last": last, "best": best}
    with log_write_errors(out / RESULTS):
        write_atomically(out / RESULTS, json.dumps(results, indent=1).encode())
