"""The benchmarks of `addp bench`, one file each. A new one is a class in this folder and a name in `BENCHMARKS`."""

from tools.bench.benchmark import Benchmark
from tools.bench.benchmarks.det import Detection
from tools.bench.benchmarks.finetune import Finetune, FinetuneOnePercent, FinetuneTenPercent
from tools.bench.benchmarks.generation import Generation
from tools.bench.benchmarks.linprobe import LinearProbe
from tools.bench.benchmarks.robustness import Robustness
from tools.bench.benchmarks.seg import Segmentation
from tools.bench.benchmarks.seg_probe import SegmentationProbe

# in the order of the recipe's sections, of the steps and of the report
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Generation(),
        Finetune(),
        FinetuneTenPercent(),
        FinetuneOnePercent(),
        LinearProbe(),
        Robustness(),
        Detection(),
        Segmentation(),
        SegmentationProbe(),
    )
}
