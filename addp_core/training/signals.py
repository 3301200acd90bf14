"""Signals that ask a command to stop."""

import signal
import threading
from abc import ABC, abstractmethod
from types import FrameType
from typing import Any, TypeVar

Handler = TypeVar("Handler", bound="SignalHandler")


class SignalHandler(ABC):
    """Context manager in which SIGTERM, SIGUSR1 and SIGINT call `_receive`, if the main thread enters it."""

    def __init__(self) -> None:
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self: Handler) -> Handler:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    @abstractmethod
    def _receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""


class StopSignals(SignalHandler):
    """Context manager that turns signals into flags, which the training loop reads once per step.

    SIGTERM and SIGUSR1 set `stop`, SIGINT sets `interrupt`; a second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stop = False  # exit with code 0, so that a scheduler requeues the job
        self.interrupt = False  # exit with code 1

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupt = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
        else:
            self.stop = True
