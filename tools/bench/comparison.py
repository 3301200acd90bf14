"""Differences between arms: what the paper reports, what a bench has measured, and whether the two agree."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.bench.metric import Metric
from tools.bench.results import BenchResults

AGREES, DISAGREES, UNDECIDED, NOT_MEASURED = "agrees", "disagrees", "undecided", "not measured"
ERRORS = 2.0  # a difference of fewer standard errors is not told from none


@dataclass(frozen=True)
class MeasuredDifference:
    """The difference of two arms' means over seeds, and its standard error: None if one of them has a single seed."""

    value: float
    error: float | None

    @property
    def is_beyond_noise(self) -> bool:
        return self.error is not None and abs(self.value) > ERRORS * self.error


def measured_difference(values: Sequence[float], baseline: Sequence[float]) -> MeasuredDifference:
    """Return the difference between the values of an arm's seeds and those of another arm's."""
    difference = statistics.mean(values) - statistics.mean(baseline)
    if min(len(values), len(baseline)) < 2:
        return MeasuredDifference(difference, None)
    error = (statistics.variance(values) / len(values) + statistics.variance(baseline) / len(baseline)) ** 0.5
    return MeasuredDifference(difference, error)


@dataclass(frozen=True)
class Comparison:
    """The difference of an arm to another in a metric, in the paper and here.

    Attributes:
        arm: The arm.
        baseline: The arm to which the difference is.
        benchmark: The benchmark.
        metric: The metric that was measured, or would be.
        values: The paper's values of both arms.
        measured: The difference that was measured, None as long as one of the two is missing.
    """

    arm: str
    baseline: str
    benchmark: str
    metric: Metric
    values: tuple[float, float]
    measured: MeasuredDifference | None

    @property
    def paper(self) -> float:
        """The paper's difference, without the digits that subtraction adds."""
        return round(self.values[0] - self.values[1], 6)

    @property
    def verdict(self) -> str:
        return self._judge()[0]

    @property
    def reason(self) -> str:
        """Why the verdict is neither that the two agree nor that they disagree."""
        return self._judge()[1]

    def _judge(self) -> tuple[str, str]:
        if self.measured is None:
            return NOT_MEASURED, ""
        if self.paper == 0:
            return UNDECIDED, "the paper has no difference"
        if self.measured.error is None:
            return UNDECIDED, "one seed"
        if not self.measured.is_beyond_noise:
            return UNDECIDED, "within two standard errors"
        return (AGREES if (self.measured.value > 0) == (self.paper > 0) else DISAGREES), ""

    def entry(self) -> dict[str, str | float | None]:
        """Return it as bench.json has it."""
        return {
            "arm": self.arm,
            "baseline": self.baseline,
            "benchmark": self.benchmark,
            "metric": self.metric.stands_for or self.metric.key,
            "measured_metric": self.metric.key,
            "paper": self.paper,
            "measured": self.measured.value if self.measured else None,
            "standard_error": self.measured.error if self.measured else None,
            "verdict": self.verdict,
            "reason": self.reason,
        }


def compare_with_paper(bench: BenchResults) -> Iterator[Comparison]:
    """Yield a comparison for each metric in which the paper has both arms of a difference, if both are arms here."""
    for arm, baseline in bench.paper.differences():
        if arm not in bench.arms or baseline not in bench.arms:
            continue
        for benchmark in bench.included_benchmarks():
            for metric in bench.metrics(benchmark):
                first, second = (bench.published(each, benchmark, metric) for each in (arm, baseline))
                if first is None or second is None:
                    continue
                values, others = (bench.values(benchmark, each, metric) for each in (arm, baseline))
                measured = measured_difference(values, others) if values and others else None
                yield Comparison(arm, baseline, benchmark, metric, (first, second), measured)
