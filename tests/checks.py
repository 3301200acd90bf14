"""Checks that several tests share."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from addp_core.base.errors import UserError

shards_on_cpus = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 shards on GPUs only"
)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two modules have equal state dicts."""
    state_a, state_b = a.state_dict(), b.state_dict()
    return state_a.keys() == state_b.keys() and all(torch.equal(state_a[key], state_b[key]) for key in state_a)


def assert_user_error(function: Callable[[], Any], *parts: str) -> str:
    """Check that `function` raises a `UserError` whose one-line message contains all parts; return the message."""
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


@contextlib.contextmanager
def start_method(method: str) -> Iterator[None]:
    """Start data workers in the block by this method of multiprocessing."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_forkserver_preload(["addp_core.training.engine", "addp_core.recipes.config"])  # as in toy_stage
    multiprocessing.set_start_method(method, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)
