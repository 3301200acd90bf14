"""Which of a job's processes this one is, by the environment that torchrun, `accelerate launch` or a script around
`srun` gives it.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from addp_core.base.errors import UserError

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of several processes; LOCAL_RANK can be derived


def rank() -> int:
    """Return the rank of this process, from 0; 0 without a launcher."""
    return _number("RANK", 0)


def world_size() -> int:
    """Return the number of processes of the job; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default  # `check_launch` refuses what is not a number


def run_alone() -> None:
    """Forget what the environment says about other processes, in this process and those that it starts."""
    for name in (*REQUIRED, "LOCAL_RANK"):
        os.environ.pop(name, None)


def check_launch() -> None:
    """Check that the environment names one of several processes, or none.

    Raises UserError otherwise: each process would take itself for the only one.
    """
    given = {name: os.environ[name] for name in (*REQUIRED, "LOCAL_RANK") if os.environ.get(name)}
    for name in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & given.keys():
        if not given[name].isdecimal():
            raise UserError(f"{name}={given[name]}: found this in the environment, expected a whole number from 0")
    if not {"RANK", "LOCAL_RANK"} & given.keys() and world_size() == 1:
        return
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in given]
    if world_size() > 1:
        missing = [name for name in REQUIRED if name not in given]
    if missing:
        found = next(name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in given)
        slurm = " (under srun, RANK is $SLURM_PROCID)" if "SLURM_PROCID" in os.environ else ""
        raise UserError(
            f"{found}={given[found]}: found in the environment without {', '.join(missing)}; expected all of "
            f"{', '.join(REQUIRED)}, or none; start the processes with torchrun{slurm} or unset {found}"
        )
    if rank() >= world_size():
        raise UserError(
            f"RANK={rank()}: found in the environment with WORLD_SIZE={world_size()}, expected 0 to {world_size() - 1}"
        )


# -------------------- the place of a process on its machine


@dataclass
class Place:
    """A process of the job, its machine and its GPUs."""

    rank: int
    world_size: int
    host: str
    machine: str  # differs between machines, even of one name
    pid: int
    local_rank: int | None  # None if the launcher did not say
    devices: list[str]  # identities of the GPUs that the process sees

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def this_place() -> Place:
    """Return the place of this process."""
    host, boot_id = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id")
    machine = f"{host} {boot_id.read_text().strip()}" if boot_id.exists() else host
    local_rank = os.environ.get("LOCAL_RANK")
    if not local_rank and os.environ.get("SLURM_PROCID") == os.environ.get("RANK"):
        local_rank = os.environ.get("SLURM_LOCALID")
    index = int(local_rank) if local_rank else None
    return Place(rank(), world_size(), host, machine, os.getpid(), index, visible_devices())


def visible_devices() -> list[str]:
    """Return the identities of the GPUs that this process sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def assign_devices(places: list[Place]) -> list[int]:
    """Return LOCAL_RANK of each process, by rank: the index of its GPU among those that it sees.

    A process that sees a single GPU uses it: the launcher gave each its own. Without LOCAL_RANK, the index is the
    number of lower ranks on the same machine. Raises UserError if two processes would share a GPU.
    """
    indices: list[int] = []
    owners: dict[tuple[str, str], Place] = {}
    for place in places:
        lower = [other for other in places[: place.rank] if other.machine == place.machine]
        index = len(lower) if place.local_rank is None else place.local_rank
        visible = len(place.devices)
        index = 0 if visible == 1 else index
        if visible and index >= visible:
            raise UserError(
                f"LOCAL_RANK={index}: {place} sees {visible} GPUs, expected one for each process; "
                "start as many processes on a machine as it has GPUs"
            )
        if visible:
            owner = owners.setdefault((place.machine, place.devices[index]), place)
            if owner is not place:
                raise UserError(
                    f"CUDA_VISIBLE_DEVICES: {owner} and {place} would share the GPU {place.devices[index]}, expected "
                    "one for each process; start as many processes on a machine as it has GPUs"
                )
        indices.append(index)
    return indices
