"""Signals that ask a training run to stop."""

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Context manager that turns signals into flags, which the training loop reads once per step.

    SIGTERM and SIGUSR1 set `stop`, SIGINT sets `interrupt`; a second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.stop = False  # exit with code 0, so that a scheduler requeues the job
        self.interrupt = False  # exit with code 1
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupt = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
        else:
            self.stop = True
