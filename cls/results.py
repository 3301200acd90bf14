"""What a training in this room keeps of its validations: the best weights so far and the scores."""

import json
from pathlib import Path

from torch import nn

from addp_core.base.files import write_atomically
from addp_core.training.run_folder import tolerant
from addp_core.weights.checkpoint import save_model
from cls.evaluation import Scores

BEST_MODEL, BEST_NOTE, RESULTS = "model-best.safetensors", "best.json", "results.json"


def keep_best(model: nn.Module, step: int, scores: Scores, out: Path) -> None:
    """Write the scores of `step` and of the best step so far to results.json, and the best step's model beside it.

    What a full disk does not take is left out, and said to be; the best step is the best whose model was written.
    """
    last = {"step": step, **scores.figures}
    note = out / BEST_NOTE
    best = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    # A run that fell back to an older checkpoint meets its best step a second time.
    if best is None or last["top1"] > best["top1"] or step == best["step"]:
        with tolerant(out / BEST_MODEL):
            save_model(model, out / BEST_MODEL)
            write_atomically(note, json.dumps(last).encode())
            best = last
    results = {"images": scores.images, "classes": len(scores.confusion), "last": last, "best": best}
    with tolerant(out / RESULTS):
        write_atomically(out / RESULTS, json.dumps(results, indent=1).encode())
