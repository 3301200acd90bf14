"""Signals that ask a command to stop."""

import signal
import threading
from abc import ABC, abstractmethod
from types import FrameType
from typing import Any, ClassVar, TypeVar

from addp_core.base.job import handled_signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

Handler = TypeVar("Handler", bound="SignalHandler")


class SignalHandler(ABC):
    """Context manager in which SIGTERM, SIGUSR1 and SIGINT call `_receive`, if the main thread enters it."""

    def __init__(self) -> None:
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self: Handler) -> Handler:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        handled_signal()
        self._receive(number, frame)

    @abstractmethod
    def _receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""


class StopSignals(SignalHandler):
    """Context manager that turns signals into flags, which the training loop reads once per step.

    SIGTERM and SIGUSR1 set `stop`, SIGINT sets `interrupt`; a second SIGINT raises KeyboardInterrupt at once.
    `stop_requested` tells functions that the loop calls, such as an evaluation, about the flags.
    """

    active: ClassVar["StopSignals | None"] = None  # the one whose context has been entered

    def __init__(self) -> None:
        super().__init__()
        self.stop = False  # exit with code 0, so that a scheduler requeues the job
        self.interrupt = False  # exit with code 1

    def __enter__(self) -> "StopSignals":
        super().__enter__()
        StopSignals.active = self
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        StopSignals.active = None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupt = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
        else:
            self.stop = True


def stop_requested() -> bool:
    """Check whether a signal has asked the training run of this process to stop; False outside of training."""
    active = StopSignals.active
    return active is not None and (active.stop or active.interrupt)
