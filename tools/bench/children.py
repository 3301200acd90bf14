"""Commands of addp as processes that end with this one: signals go on to them, and so does this process's death."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger("addp")

ADDP = [sys.executable, "-m", "addp_core"]
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
    """A signal has come: children were told to stop, no more of them are started."""


def command_line(words: Sequence[str], processes: int = 1) -> str:
    """What one would type for `addp <words>`, on so many processes."""
    many = ["torchrun", "--standalone", "--nproc_per_node", str(processes), "-m", "addp_core"]
    return shlex.join([*(many if processes > 1 else ["addp"]), *words])


def ending(path: Path, lines: int = 1) -> str:
    """The last lines of a log, without empty ones and what a progress bar wrote over. OSError: it cannot be read."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        text = file.read().decode(errors="replace")  # opened as text, a bar's states would be lines
    whole = [line.rstrip().rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in whole if line][-lines:])


class Children:
    """Starts commands, in any thread; SIGTERM, SIGUSR1 and Ctrl-C reach them as SIGTERM, upon which trainings write a
    checkpoint.

    A context: signals are handled inside of it, where it is entered in the main thread.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen] = set()
        self._before: dict[int, Any] = {}
        self._lock = threading.RLock()  # the handler may interrupt its own thread inside of it

    def __enter__(self) -> "Children":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def addp(self, words: Sequence[str], output: Path, processes: int = 1) -> int:
        """The exit code of `addp <words>`; what it writes is appended to `output`. Raises Stopped."""
        start = ADDP if processes == 1 else [*TORCHRUN, str(processes), "-m", "addp_core"]
        with self._lock, output.open("a") as file:
            if self.stopped:
                raise Stopped
            file.write(f"$ {command_line(words, processes)}\n")
            file.flush()
            child = self._start([*start, *words], file)
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

    def pause(self, seconds: float) -> None:
        """Sleep, in any thread. Raises Stopped."""
        time.sleep(seconds)
        if self.stopped:
            raise Stopped

    def _start(self, command: Sequence[str], file: Any) -> subprocess.Popen:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid())]
        # a session of its own: Ctrl-C in the terminal comes by way of this process, once
        return subprocess.Popen(
            [*launcher, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )

    def _receive(self, number: int, _frame: object) -> None:
        self.stopped = True
        with self._lock:
            for child in self._running:
                child.terminate()
        log.warning("stopping; waiting for what runs to write its checkpoint")
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(signal.SIGINT, signal.default_int_handler)
