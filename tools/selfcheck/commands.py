"""The commands of the check: child processes with a time limit, which may be told to stop on the way."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addp_core.base.paths import METRICS_FILE
from tools.children import ADDP, TORCHRUN, Children, Stopped, last_lines, launch

POLL_SECONDS = 0.05


class CommandFailed(Exception):
    """A command ended with an error or not in time; the text says so in one line."""


class TimeUp(CommandFailed):
    """A command was ended because its time was up."""


@dataclass
class Device:
    """Where the checks compute: `name` is cpu or cuda, `gpus` their number, `gib` the memory of the first."""

    name: str
    gpus: int = 0
    gib: float = 0.0


@dataclass
class Commands(Children):
    """Runs commands, whose output goes to a folder, until a deadline of `time.monotonic`."""

    folder: Path
    device: Device
    deadline: float = math.inf
    pace: float = 1.0  # how many times as long as on two CPU cores the checks take here

    def __post_init__(self) -> None:
        super().__init__()

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def addp(
        self,
        name: str,
        arguments: Sequence[str],
        processes: int = 1,
        device: str = "",
        stop_when: Callable[[], bool] | None = None,
    ) -> None:
        """Run `addp <arguments>`, which gets SIGTERM once `stop_when` returns True; device: in place of the check's."""
        prefix = ADDP if processes == 1 else [*TORCHRUN, str(processes), "-m", "addp_core"]
        self._run(name, [*prefix, *arguments], device or self.device.name, stop_when)

    def python(self, name: str, *arguments: str) -> None:
        """Run `python -m <arguments>`."""
        self._run(name, [sys.executable, "-m", *arguments], self.device.name, None)

    def _run(self, name: str, command: Sequence[str], device: str, stop_when: Callable[[], bool] | None) -> None:
        output = self.folder / f"{name}.txt"
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        seconds = max(self.seconds_left(), 1)
        with self._lock, output.open("a") as file:
            if self.stopped:
                raise Stopped
            child = launch(command, file, {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **hidden})
            self._running.add(child)
        try:
            code = self._wait(child, stop_when)
        finally:
            self._running.discard(child)
        if self.stopped:
            raise Stopped
        if code is None:
            raise TimeUp(f"{name}: did not end within {seconds:.0f} s")
        if code:
            raise CommandFailed(f"{name}: ended with code {code}: {last_lines(output) or 'no output'}")

    def _wait(self, child: "subprocess.Popen[bytes]", stop_when: Callable[[], bool] | None) -> int | None:
        """Return the exit code, or None of a command that was killed at the deadline."""
        while True:
            try:
                return child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if stop_when and stop_when():
                    child.terminate()
                    stop_when = None
                if self.seconds_left() < 0 and not self.stopped:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                    return None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics so far."""
    file = run / METRICS_FILE
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]
