"""Commands of addp as child processes, which receive this process's signals and never outlive it."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from addp_core.base.errors import UserError
from addp_core.base.launch import ADDP as ADDP
from addp_core.training.signals import SignalHandler

log = logging.getLogger("addp")

PATIENCE = 600  # seconds to wait for a run that was told to stop
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

# Runs a command that the kernel (Linux) sends SIGTERM to when the process that started it dies, however it dies.
LAUNCHER = """
import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
    prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Stopped(Exception):
    """A signal has arrived: the running children receive it too, and no more are started."""


def command_line(arguments: Sequence[str], processes: int = 1) -> str:
    """Return what one would type for `addp <arguments>`, on so many processes."""
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", str(processes), "-m", "addp_core"]
    return shlex.join([*(torchrun if processes > 1 else ["addp"]), *arguments])


def last_lines(path: Path, count: int = 1) -> str:
    """Return the last lines of a log, without empty ones and without states that a progress bar overwrote.

    Raises OSError if the log cannot be read.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        text = file.read().decode(errors="replace")  # in text mode, each state of a progress bar would be a line
    lines = [line.rstrip().rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-count:])


class Children(SignalHandler):
    """Runs commands, in any thread. SIGTERM, SIGUSR1 and Ctrl-C reach them as SIGTERM, on which trainings write a
    checkpoint.

    A context manager: if the main thread enters it, signals are handled inside of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()  # the handler may interrupt a thread that holds it

    def run_addp(
        self, arguments: Sequence[str], output: Path, processes: int = 1, environment: Mapping[str, str] | None = None
    ) -> int:
        """Run `addp <arguments>`, append what it writes to `output` and return its exit code. Raises Stopped.

        environment: variables that it has besides those of this process.
        """
        prefix = ADDP if processes == 1 else [*TORCHRUN, str(processes), "-m", "addp_core"]
        with self._lock, output.open("a") as file:
            if self.stopped:
                raise Stopped
            file.write(f"$ {command_line(arguments, processes)}\n")
            file.flush()
            child = launch([*prefix, *arguments], file, {**os.environ, **(environment or {})})
            self._running.add(child)
            if self.stopped:  # the signal came while it started
                child.terminate()
        try:
            code = child.wait()
        finally:
            self._running.discard(child)
        if self.stopped:
            raise Stopped
        return code

    def sleep(self, seconds: float) -> None:
        """Sleep, in any thread. Raises Stopped."""
        time.sleep(seconds)
        if self.stopped:
            raise Stopped

    def wait_until_free(self, folder: Path) -> None:
        """Wait for what a killed process left at work in a run folder: it finishes a step and writes a checkpoint.

        Raises Stopped.
        """
        if not (folder / ".lock").exists():
            return
        from addp_core.training.run_folder import lock_out, release_out  # loads torch

        for second in range(PATIENCE):
            try:
                lock_out(folder)
            except UserError as error:
                if second == 0:
                    log.info("waiting: %s", error)
                self.sleep(1)
            else:
                release_out(folder)
                return

    def _receive(self, number: int, _frame: object) -> None:
        self.stopped = True
        with self._lock:
            for child in self._running:
                child.terminate()
        log.warning("stopping; waiting for the running commands to write their checkpoints")
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(signal.SIGINT, signal.default_int_handler)


def launch(command: Sequence[str], file: IO[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own, whose output goes to `file`; it ends when this process does."""
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid())]
    # in a session of its own, so that Ctrl-C in the terminal reaches it only once, through this process
    return subprocess.Popen(
        [*launcher, *command],
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=file,
        env=environment,
        start_new_session=True,
    )
