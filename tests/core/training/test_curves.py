"""Curves of metrics."""

from addp_core.training.curves import points


def test_long_curves_are_thinned_and_odd_lines_skipped():
    lines = [{"step": i, "loss": float(i)} for i in range(10_000)]
    lines += [{"step": 10_000, "loss": None}, {"step": 10_001, "loss": float("nan")}, {"loss": 1.0}]
    thinned = points(lines, "loss")
    assert len(thinned) == 400
    assert thinned[0] == (12.0, 12.0)
    assert points([{"step": 1, "top1": 3.0}, {"step": 1, "top1": 5.0}], "top1") == [(1.0, 5.0)]
