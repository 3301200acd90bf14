"""The sections of the report of a bench on differences between arms: in their settings, and beside the paper's."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tools.bench.benchmarks import BENCHMARKS
from tools.bench.comparison import AGREES, DISAGREES, ERRORS, NOT_MEASURED, UNDECIDED, Comparison, compare_with_paper
from tools.bench.document import NONE, Block, Cell, Heading, Row, Table, Text
from tools.bench.results import BenchResults

# -------------------- settings


def differing_settings(bench: BenchResults) -> Iterator[Block]:
    """Yield a table of the settings in which arms differ, of their pretraining or encoder, if there are any."""
    settings = {arm: entry.get("settings") or {} for arm, entry in bench.arms.items()}
    keys = dict.fromkeys(key for of_arm in settings.values() for key in of_arm)
    differing = [key for key in keys if len({str(of_arm.get(key)) for of_arm in settings.values()}) > 1]
    # random weights have no pretraining: its row would be empty
    shown = {arm: of_arm for arm, of_arm in settings.items() if of_arm or arm != bench.random}
    if not differing:
        return
    yield Heading("What the arms differ in", 3)
    rows = [
        [arm, *(_text(of_arm[key]) if key in of_arm else NONE for key in differing)] for arm, of_arm in shown.items()
    ]
    yield Table(["arm", *differing], [Row(row) for row in rows], left_aligned=True)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None or value == "" else str(value)


# -------------------- scores


def against_the_paper(bench: BenchResults) -> Iterator[Block]:
    """Yield the section on the differences that the recipe has the paper's numbers of, with a verdict on each."""
    wanted = bench.paper.differences()
    if not wanted:
        return
    yield Heading("Against the paper")
    absent = [arm for arm in dict.fromkeys(arm for pair in wanted for arm in pair) if arm not in bench.arms]
    comparisons = list(compare_with_paper(bench))
    counts = Counter(each.verdict for each in comparisons)
    if comparisons:
        order = [verdict for verdict in (AGREES, DISAGREES, UNDECIDED, NOT_MEASURED) if counts[verdict]]
        yield Text(f"Of {len(comparisons)} differences: {', '.join(f'{each} {counts[each]}' for each in order)}.")
        yield Table(
            ["difference", "metric", "paper", "measured", "standard error", "verdict"],
            [Row(_cells(each)) for each in comparisons],
            caption=_caption(bench, comparisons),
        )
    if absent:
        yield Text(f"Not arms of this bench, and so without a measured difference: {', '.join(absent)}.")


def _cells(comparison: Comparison) -> list[Cell | str]:
    metric, measured = comparison.metric, comparison.measured
    error = NONE if measured is None or measured.error is None else f"{measured.error:.{metric.digits + 1}f}"
    return [
        f"{comparison.arm} - {comparison.baseline}",
        f"{BENCHMARKS[comparison.benchmark].title}: {metric.label}",
        metric.format_published(comparison.paper, "+"),
        NONE if measured is None else f"{measured.value:+.{metric.digits}f}",
        error,
        Cell(comparison.verdict, comparison.reason),
    ]


def _caption(bench: BenchResults, comparisons: list[Comparison]) -> str:
    sentences = [
        "The difference of the means over seeds and its standard error. Agrees, disagrees: the measured difference is "
        f"more than {ERRORS:g} standard errors and has the paper's sign, or the other one. Undecided: it is less, "
        "there is one seed, or the paper has no difference.",
        stand_ins(bench, [each.metric.key for each in comparisons]),
    ]
    if bench.unlike_paper():
        sentences.append("Only the signs compare: the data, sizes and budgets are not the paper's.")
    return " ".join(filter(None, sentences))


def stand_ins(bench: BenchResults, keys: list[str]) -> str:
    """Return which of the metrics with these keys stand for others of the paper, as a sentence; "" if none does.

    They do so only where the recipe has the paper's numbers.
    """
    if not bench.paper.arms:
        return ""
    names = {metric.key: metric.name for each in BENCHMARKS.values() for metric in each.metrics}
    stand_ins = [metric for each in BENCHMARKS.values() for metric in each.metrics if metric.stands_for]
    parts = [f"{each.name} stands for the paper's {names[each.stands_for]}" for each in stand_ins if each.key in keys]
    return f"{' and '.join(parts)}." if parts else ""
