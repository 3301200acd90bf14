"""How fast a command works: a file to which its loops append how many images they have processed, and when.

`addp bench estimate=true` names the file in the environment; without it nothing is written.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from addp_core.base.launch import rank

PACE_FILE = "ADDP_PACE_FILE"  # the variable that names the file

# Phases. What they count are images, of `heads` the share of all heads that are trained on features.
VALIDATION, SAMPLING, FEATURES, HEADS = "validation", "sampling", "features", "heads"


@dataclass(frozen=True)
class Mark:
    """So much more has been processed in a phase, one of those above, at this time (seconds since 1970)."""

    phase: str
    amount: float
    time: float


def mark_pace(phase: str, amount: float) -> None:
    """Record that rank 0 has processed `amount` more images of a phase; 0 when the phase begins."""
    path = os.environ.get(PACE_FILE)
    if path and rank() == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([phase, amount, time.time()]) + "\n")


def read_pace(path: Path) -> list[Mark]:
    """Return what has been recorded so far; [] if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be incomplete
    return [Mark(*json.loads(line)) for line in lines]
