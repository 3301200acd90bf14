"""A metric: where a run's results have it, and how the report shows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A metric: its key in bench.json and its column in the report.

    result: where the results.json of a run has it (dots lead inwards). curve: its key in the lines of metrics.jsonl.
    factor: what both are multiplied by, as 100 for per cent. optional: no column unless it has been measured.
    stands_for: the metric of the paper in whose place it is measured where that one cannot be, as FD for FID.
    """

    key: str
    label: str
    digits: int = 1
    lower_is_better: bool = False
    optional: bool = False
    result: str = ""
    curve: str = ""
    factor: float = 1.0
    stands_for: str = ""

    def read(self, results: Mapping[str, Any]) -> float:
        """Return its value from the content of a results.json. Raises KeyError if it is not there."""
        value: Any = results
        for part in self.result.split("."):
            value = value[part]
        return self.factor * value

    @property
    def name(self) -> str:
        """The label without its arrow."""
        return self.label.rstrip(" ↑↓")

    def format(self, value: float) -> str:
        return f"{value:.{self.digits}f}"

    def format_published(self, value: float, sign: str = "") -> str:
        """Return a value of the paper with all of its digits, or with as many as the metric's if it has fewer."""
        decimals = len(repr(float(value)).partition(".")[2].rstrip("0"))
        return f"{value:{sign}.{max(self.digits, decimals)}f}"
