"""Settings of all tests: one thread per worker, no network, no log handlers left over from another test."""

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Set before torch is imported, here and in every process that a test starts.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ADDP_MEASURE_KERNELS"] = "0"  # the same kernels in each run of the tests, and no file in the user's cache
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *SLURM):
    os.environ.pop(name, None)

settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("suite")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _remove_log_handlers() -> Iterator[None]:
    """Remove log handlers: the command line makes one for the stderr of its test, which later tests do not have."""
    yield
    log = logging.getLogger("addp")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
