"""Evaluation during training: what the processes of a run agree on after each batch (whether to stop, and whether too
many images were unreadable), and what it costs.
"""

import time

import torch
from accelerate.utils import gather_object

from addp_core.base.errors import UserError
from addp_core.data.stream import ReadErrors, error_limit
from addp_core.training.processes import process_state
from addp_core.training.signals import stop_requested


class EvaluationStopped(Exception):
    """A signal asked a training run to stop while it evaluated. The run leaves, and evaluates when it continues."""


class EvaluationCost:
    """Context manager around each evaluation that measures what evaluations take of the run's time."""

    def __init__(self) -> None:
        self.start = time.perf_counter()  # of this command: a continued run counts anew
        self.begin = self.start  # of the newest evaluation
        self.seconds = self.total = 0.0  # of the newest evaluation; of all

    def __enter__(self) -> "EvaluationCost":
        self.begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.begin
        self.total += self.seconds

    def metrics(self) -> dict[str, float]:
        """Return the seconds of the newest evaluation, and the share in percent that all have of the time since the
        command began.
        """
        share = 100 * self.total / max(time.perf_counter() - self.start, 1e-9)
        return {"evaluation_seconds": self.seconds, "evaluation_share": share}


def check_evaluation(errors: ReadErrors, limit: int) -> ReadErrors:
    """Return the unreadable images of all processes if there are more than `limit`, and an empty list otherwise.

    errors: (name, reason) of those that this process has met in this evaluation so far.
    All processes must call this equally often, and get the same answer.
    Raises EvaluationStopped, on all processes, if a signal has asked the training run on any of them to stop.
    """
    state = process_state()
    stop, unreadable = stop_requested(), len(errors)
    if state.num_processes > 1:
        values = torch.tensor([stop, unreadable], dtype=torch.int64, device=state.device)
        torch.distributed.all_reduce(values)
        stop, unreadable = values.tolist()
    if stop:
        raise EvaluationStopped
    return gather_object(errors) if unreadable > limit else []


def check_unreadable(errors: ReadErrors, max_errors: float, images: int) -> None:
    """Raise UserError, on all processes, if they have met more unreadable images than `max_errors` allows, or all.

    errors: those of this process. images: how many the processes evaluate together.
    """
    limit = min(error_limit(max_errors, images), images - 1)
    if unreadable := check_evaluation(errors, limit):
        name, reason = unreadable[-1]
        raise UserError(
            f"data.max_errors: more than {limit} of {images} images are unreadable, most recently {name} ({reason}); "
            "repair or remove them, or raise data.max_errors"
        )
