"""Print, for docs/many-gpus.md, how a training of two processes ends after each fault: `python tests/fault_table.py`.

The stage is that of `toy_stage`, with a checkpoint every 4 steps; what is lost are the steps between the last
checkpoint and the fault. It takes some minutes.
"""

import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import TIMEOUT, Ended, Fault, run_ranks
from toy_stage import checkpoint_names

from addp_core.base.tables import markdown_table

SETTINGS = ["train.steps=100000", "train.evaluate_every=8", "train.log_every=1", "train.preview_every=0"]
SHARDED = "train.parallel=fsdp"

FAULTS: dict[str, list[Fault]] = {
    "error at the start, rank 0": [Fault("user error", "start", 0)],
    "error at the start, rank 1": [Fault("user error", "start", 1)],
    "error in a step, rank 0": [Fault("error", "step", 0, 11)],
    "error in a step, rank 1": [Fault("error", "step", 1, 11)],
    "error in validation, rank 1": [Fault("error", "validation", 1)],
    "error in a checkpoint, rank 1": [Fault("error", "checkpoint", 1, 3)],
    "SIGTERM to rank 1 in a step": [Fault("SIGTERM", "step", 1, 11)],
    "SIGTERM to torchrun": [Fault("SIGTERM", "step", 1, 11, to_launcher=True)],
    "SIGKILL to rank 0": [Fault("SIGKILL", "step", 0, 11)],
    "SIGKILL to rank 1": [Fault("SIGKILL", "step", 1, 11)],
    "SIGKILL to torchrun": [Fault("SIGKILL", "step", 1, 11, to_launcher=True)],
    "disk full, rank 0": [Fault("disk full", "saving", 0, 3, repeated=True)],
    "disk full, rank 1 (fsdp)": [Fault("disk full", "saving", 1, 3, repeated=True)],
    "rank 0 slower than the timeout (5 s)": [Fault("delay", "step", 0, 11, seconds=600)],
}


def row(name: str, launcher: str, folder: Path) -> list[str]:
    """Let a fault happen under a launcher; return the row of the table."""
    (fault,) = FAULTS[name]
    out, timeout = folder / "run", "5" if "timeout" in name else "0"
    settings = [f"out={out}", *SETTINGS, *([SHARDED] if "fsdp" in name else [])]
    try:
        ended = run_ranks(
            ["toy", *settings],
            folder / "job",
            launcher="torchrun" if launcher == "torchrun" else "plain",
            fault=fault,
            environment={TIMEOUT: timeout},
        )
    except AssertionError as error:
        return [name, launcher, "does not end", "", "", str(error)[-200:]]
    return [name, launcher, f"{ended.seconds:.1f}", exit_codes(ended), lost(ended, out), "; ".join(ended.lines)]


def exit_codes(ended: Ended) -> str:
    """Return the exit codes: of the ranks, or of torchrun and those of the ranks that it reports."""
    codes = ", ".join(map(str, ended.codes))
    reported = re.findall(r"rank\s*: (\d+).*?exitcode\s*: (-?\d+)", ended.launcher, re.DOTALL)
    return codes + (f" ({', '.join(code for _, code in sorted(reported))})" if reported else "")


def lost(ended: Ended, out: Path) -> str:
    """Return how many steps have to be repeated."""
    steps = [int(step) for step in re.findall(r"step (\d+)/", ended.text)]
    saved = [int(name.removeprefix("step-")) for name in checkpoint_names(out)] if steps else []
    return f"{max(steps) - max(saved)} steps" if saved else "nothing"


def main() -> None:
    """Print the table."""
    rows = []
    for name in FAULTS:
        for launcher in ("torchrun", "plain"):
            if "torchrun" in name and launcher == "plain":
                continue
            folder = Path(tempfile.mkdtemp())
            rows.append(row(name, launcher, folder))
            sys.stderr.write(f"{rows[-1]}\n")
            shutil.rmtree(folder)
    sys.stdout.write(f"{os.cpu_count()} CPU cores, {platform.platform()}\n\n")
    header = ["fault", "launcher", "seconds", "exit codes", "lost", "line"]
    sys.stdout.write(markdown_table([header, *rows]))


if __name__ == "__main__":
    main()
