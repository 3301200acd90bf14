"""A metric: where a run's results have it, and how the report shows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A metric: its key in bench.json and its column in the report.

    result: where the results.json of a run has it (dots lead inwards). curve: its key in the lines of metrics.jsonl.
    factor: what both are multiplied by, as 100 for per cent. optional: no column unless it has been measured.
    """

    key: str
    label: str
    digits: int = 1
    lower_is_better: bool = False
    optional: bool = False
    result: str = ""
    curve: str = ""
    factor: float = 1.0

    def read(self, results: Mapping[str, Any]) -> float:
        """Return its value from the content of a results.json. Raises KeyError if it is not there."""
        value: Any = results
        for part in self.result.split("."):
            value = value[part]
        return self.factor * value

    def format(self, value: float) -> str:
        return f"{value:.{self.digits}f}"
