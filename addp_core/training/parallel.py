"""Fully sharded data parallelism, `train.parallel=fsdp`: torch's `fully_shard` (FSDP2; FSDP: arXiv 2304.11277) splits
weights, gradients, the optimizer's state and the moving average between the processes of a run.

Each tensor is split along its first dimension. Weights are gathered in float32, and autocast rounds them as it does
without FSDP, so that both compute the same up to the order of sums. accelerate can set FSDP up too, but on GPUs only,
and by environment variables that stay set for the next run in the same process.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from addp_core.base.errors import UserError
from addp_core.networks.layers import Block


def shard(model: nn.Module, device: torch.device) -> None:
    """Split the parameters of a model, in place: each transformer block is a group, and the rest is another.

    The processes start from rank 0's weights, as with DDP. Raises UserError if torch does not shard on this device.
    """
    check_device(device)
    broadcast_tensors(model.state_dict().values())
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def check_device(device: torch.device) -> None:
    """Raise UserError if this version of torch does not shard on the device: 2.6 does so on GPUs only."""
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise UserError(
            f"train.parallel=fsdp: torch {torch.__version__} shards on GPUs only; "
            "expected torch 2.7 or newer for CPUs, or train.parallel=ddp"
        )


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that rank 0 has, in place."""
    for tensor in tensors:
        broadcast(tensor)


def local_shard(value: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be split."""
    return value.to_local() if isinstance(value, DTensor) else value


def full_tensor(value: Any) -> Any:
    """Return the whole tensor, gathered from all processes if it is split; other values as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


# -------------------- the optimizer's state


def optimizer_state_for(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer, as a checkpoint holds it, in the form that this optimizer loads.

    Tensors of the shape of a split parameter are split like it. Checkpoints that were written under accelerate's FSDP
    have the names of parameters instead of their positions.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stored = [key for group in state["param_groups"] for key in group["params"]]
    position = {key: i for i, key in enumerate(stored)}
    groups, first = [], 0
    for group in state["param_groups"]:
        end = first + len(group["params"])
        groups.append({**group, "params": list(range(first, end))})
        first = end
    values = {
        position[key]: {name: _split_like(parameters[position[key]], value) for name, value in of_parameter.items()}
        for key, of_parameter in state["state"].items()
    }
    return {**state, "state": values, "param_groups": groups}


def _split_like(parameter: Tensor, value: Any) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


# -------------------- the parts of a checkpoint


def own_part(tree: Any, rank: int) -> Any:
    """Return what this process stores of a tree of dicts: its rows of tensors that are split; rank 0 also the rest.

    All processes must call this together.
    """
    if isinstance(tree, DTensor) and tree.placements == (Shard(0),):
        return tree.to_local()
    tree = full_tensor(tree)
    if not isinstance(tree, dict):
        return tree if rank == 0 else None
    parts = {key: own_part(value, rank) for key, value in tree.items()}
    return {key: part for key, part in parts.items() if part is not None or rank == 0}


def join_parts(parts: list[Any]) -> Any:
    """Put together what `own_part` returned on all processes, in their order."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: join_parts([part[key] for part in parts if key in part]) for key in first}
    return torch.cat(parts) if len(parts) > 1 else first
