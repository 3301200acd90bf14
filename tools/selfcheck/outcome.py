"""What a check found. The process that runs the checks reads this module too, so it imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ok", "failed", "skipped"]


@dataclass
class Outcome:
    """state: with the reason in `note`, one line. values: all numbers, for the JSON file."""

    state: State
    note: str
    values: dict[str, Any]
