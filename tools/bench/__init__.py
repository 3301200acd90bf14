"""`addp bench`, `addp sweep` and `addp report`: all benchmarks of several checkpoints, in one table and one report."""
