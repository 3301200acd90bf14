"""The statistics in which repeated measurements are reported."""

import statistics


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
