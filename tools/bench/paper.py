"""The ADDP paper, whose numbers the report shows beside measured ones.

Each benchmark has those of the paper's models: `published`. A recipe can name those of its arms: the section `paper`.
"""

from addp_core.base.errors import UserError, did_you_mean
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.recipe import PaperKeys

SOURCE = "ADDP paper, arXiv 2306.05423 (ICLR 2024)"
ENCODER_PARAMETERS = {"ADDP ViT-B": 86e6, "ADDP ViT-L": 304e6}  # of the models in the report's first table


def check_paper(keys: PaperKeys) -> None:
    """Raise UserError if the section `paper` of a recipe names a benchmark or a metric that does not exist."""
    for arm, numbers in keys.arms.items():
        for benchmark, values in numbers.items():
            if benchmark not in BENCHMARKS:
                expected = f"one of {', '.join(BENCHMARKS)}{did_you_mean(benchmark, BENCHMARKS)}"
                raise UserError(f"paper.arms.{arm}: found {benchmark!r}, expected {expected}")
            known = [metric.key for metric in BENCHMARKS[benchmark].metrics if not metric.stands_for]
            for metric in values:
                if metric not in known:
                    expected = f"metrics ({', '.join(known)}){did_you_mean(metric, known)}"
                    raise UserError(f"paper.arms.{arm}.{benchmark}: found {metric!r}, expected {expected}")
