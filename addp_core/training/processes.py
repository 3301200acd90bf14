"""The processes of a run: the accelerator, devices and seeds."""

import atexit
import dataclasses
import datetime
import random
import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, send_to_device

from addp_core.base import rng
from addp_core.base.errors import UserError
from addp_core.base.launch import world_size
from addp_core.training.compute import turn_off_tf32
from addp_core.training.config import TrainConfig
from addp_core.training.environment import check_environment
from addp_core.training.precision import warn_if_not_native

# How long ranks wait for another, such as for rank 0 while it decodes or evaluates; dead ones are noticed by `job`.
GROUP_TIMEOUT = datetime.timedelta(hours=2)


def make_accelerator(precision: str, find_unused: bool) -> Accelerator:
    """Return accelerate's `Accelerator` for this process.

    Args:
        precision: "fp32", "bf16" or "fp16".
        find_unused: DDP's find_unused_parameters.

    Raises:
        UserError: if the device does not support the precision.
    """
    check_precision(precision)
    mixed_precision = "no" if precision == "fp32" else precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()  # accelerate keeps one precision per process; a bench may train with two
    join_group()
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=_use_cpu(),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
        )
    except ValueError as error:
        if precision == "fp32":
            raise
        raise UserError(f"train.precision={precision}: not supported on this device ({error}); try fp32") from error
    if accelerator.is_main_process:
        warn_if_not_native(precision, accelerator.device)
    return accelerator


def check_precision(precision: str) -> None:
    """Raise UserError if no device of this machine computes in a precision."""
    if precision == "fp16" and not torch.accelerator.is_available():  # accelerate would silently compute in float32
        raise UserError("train.precision=fp16: needs a GPU, but there is none; use bf16 or fp32")


def check_batch(config: TrainConfig, processes: int) -> None:
    """Raise UserError if the batch cannot be split among micro-steps and processes."""
    if config.micro_batch % processes:
        raise UserError(
            f"train.batch={config.batch}: found {config.accumulate} micro-steps x {processes} processes, "
            f"expected their product to divide it; take a multiple of {config.accumulate * processes}"
        )


def process_state() -> PartialState:
    """Return this process's device and its rank among the processes that torchrun started.

    The first call turns TF32 off; training and `compute.autocast` allow it again for the precisions that may use it.
    """
    turn_off_tf32()
    return join_group()


def join_group() -> PartialState:
    """Join torch's process group, if there are several processes, and leave it when this one ends.

    Raises UserError if the group is not that of the environment, or the environment says against the recipe what
    accelerate would do.
    """
    joins = not PartialState._shared_state
    if joins:
        check_environment({})
    state = PartialState(cpu=_use_cpu(), timeout=GROUP_TIMEOUT)
    if state.num_processes != world_size():
        raise UserError(
            f"WORLD_SIZE={world_size()}: found {state.num_processes} processes in the group, expected {world_size()}; "
            "give every process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun does"
        )
    if state.num_processes > 1 and state.device.type == "mps":
        raise UserError(
            f"WORLD_SIZE={world_size()}: found on a machine with Apple's GPU, expected 1: torch's processes cannot "
            "exchange its tensors; start the command without torchrun"
        )
    if joins and state.num_processes > 1:
        atexit.register(_leave_group)
    return state


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        # gloo's threads still free the tensors of the last exchange and need Python's lock for it; torch 2.6 would wait
        # for them while it holds the lock.
        time.sleep(0.1)
        torch.distributed.destroy_process_group()


def _use_cpu() -> bool:
    # Without an explicit `cpu`, accelerate does not connect several processes on CPUs.
    return not torch.accelerator.is_available()


def seed_everything(*parts: int | str) -> None:
    """Seed Python's, NumPy's and torch's global generators with `seed_for(*parts)`."""
    seed = rng.seed_for(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def move_to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a dataclass, list, dict or tensor to the device; other values stay as they are."""
    if not dataclasses.is_dataclass(batch) or isinstance(batch, type):
        return send_to_device(batch, device, non_blocking=True)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **send_to_device(fields, device, non_blocking=True))
