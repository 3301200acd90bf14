"""Which of a job's processes this one is, by the environment that torchrun, `accelerate launch` or `srun` gives it."""

import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from addp_core.base.errors import UserError

ADDP = [sys.executable, "-m", "addp_core"]  # the command line in another process
REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of several processes; LOCAL_RANK can be derived

# srun gives these to the processes that it starts, and only to them; a batch script and the shell of salloc have some
# of the other variables as well.
SLURM_RANK, SLURM_WORLD_SIZE = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
SLURM_TASKS = "SLURM_NTASKS"  # that srun would start
PORTS = range(15000, 32000)  # below those that Linux gives to clients


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
    for name in (*REQUIRED, "LOCAL_RANK", SLURM_RANK, SLURM_WORLD_SIZE, SLURM_TASKS):
        os.environ.pop(name, None)


def take_place_from_slurm() -> None:
    """Set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from Slurm's variables, if srun started this process as one of
    several. What is set before stays; without an effect under torchrun, and in an interactive shell.
    """
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", SLURM_RANK)}
    tasks = slurm_tasks()
    if given["RANK"] or tasks < 2 or given["WORLD_SIZE"] not in ("", str(tasks)) or _in_pseudo_terminal():
        return
    derived = {
        "RANK": given[SLURM_RANK],
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": first_host(os.environ.get("SLURM_STEP_NODELIST", "")),
        # jobs may share a machine, as may steps of one job
        "MASTER_PORT": str(PORTS[(_number("SLURM_JOB_ID", 0) + 997 * _number("SLURM_STEP_ID", 0)) % len(PORTS)]),
    }
    for name, value in derived.items():
        if value and not os.environ.get(name):
            os.environ[name] = value


def slurm_tasks() -> int:
    """Return the number of processes that srun started with this one; 0 if srun has not started it."""
    return _number(SLURM_WORLD_SIZE, 0)


def first_host(nodes: str) -> str:
    """Return the first machine of a list in Slurm's notation: gpu[003-007,012],big1 -> gpu003."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]  # at a comma outside of brackets
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _in_pseudo_terminal() -> bool:
    return bool(os.environ.get("SLURM_PTY_PORT"))  # srun --pty


def check_launch() -> None:
    """Check that the environment names one of several processes, or none.

    Raises UserError otherwise: each process would take itself for the only one.
    """
    given = {name: os.environ[name] for name in (*REQUIRED, "LOCAL_RANK") if os.environ.get(name)}
    for name in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & given.keys():
        if not given[name].isdecimal():
            raise UserError(f"{name}={given[name]}: found this in the environment, expected a whole number from 0")
    if not {"RANK", "LOCAL_RANK"} & given.keys() and world_size() == 1:
        if slurm_tasks() > 1:
            shell = "the shell of srun --pty" if _in_pseudo_terminal() else f"the environment without {SLURM_RANK}"
            raise UserError(
                f"{SLURM_WORLD_SIZE}={slurm_tasks()}: found in {shell}, expected 1; write srun before addp, or unset "
                f"{SLURM_WORLD_SIZE} for a single process"
            )
        return
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in given]
    if world_size() > 1:
        missing = [name for name in REQUIRED if name not in given]
    if missing:
        found = next(name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in given)
        in_slurm = f" (srun started {slurm_tasks()} processes)" if slurm_tasks() else ""
        raise UserError(
            f"{found}={given[found]}: found in the environment{in_slurm} without {', '.join(missing)}; expected all of "
            f"{', '.join(REQUIRED)}, or none; start the processes with torchrun or srun, or unset {found}"
        )
    if rank() >= world_size():
        raise UserError(
            f"RANK={rank()}: found in the environment with WORLD_SIZE={world_size()}, expected 0 to {world_size() - 1}"
        )


def describe_unused_tasks() -> str:
    """Return what is odd if this process runs alone in an allocation of Slurm for several, otherwise ""."""
    tasks = _number(SLURM_TASKS, 1)
    if tasks < 2 or world_size() > 1 or slurm_tasks():
        return ""
    return f"{SLURM_TASKS}={tasks}, but one process runs, since srun did not start it; write srun before addp for all"


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
