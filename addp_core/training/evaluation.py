"""What the processes of a run agree on after each batch of an evaluation: whether to stop, and whether too many images
were unreadable.
"""

import torch
from accelerate.utils import gather_object

from addp_core.data.stream import ReadErrors
from addp_core.training.processes import process_state
from addp_core.training.signals import stop_requested


class EvaluationStopped(Exception):
    """A signal asked a training run to stop while it evaluated. The run leaves, and evaluates when it continues."""


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
