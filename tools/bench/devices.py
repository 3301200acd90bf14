"""GPUs and cores for commands that run at the same time: each gets its own."""

import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager

from addp_core.base.cpu import usable_cores
from addp_core.base.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"  # which GPUs a process sees, by number or name (GPU-..., MIG-...)
THREADS = "OMP_NUM_THREADS"  # with which torch computes on a CPU; torchrun sets it to one for each process
JOBS_WITHOUT_GPU = 2  # of jobs=null


class DeviceShares:
    """The GPUs that this process sees, in equal shares for `jobs` commands at a time of `processes` processes each; and
    its cores, unless OMP_NUM_THREADS is set: commands that all compute with a thread for each core slow each other down
    many times over.

    Args:
        jobs: None for as many as there are GPUs for, or two without a GPU.
        processes: of each command, a GPU for each.
        processes_key: the key of `processes`, for messages.

    Raises:
        UserError: if there are too few GPUs.
    """

    def __init__(self, jobs: int | None, processes: int, processes_key: str = "processes"):
        devices = visible_devices()
        if devices and (jobs or 1) * processes > len(devices):
            visible, most = f"the GPUs are {VISIBLE}={','.join(devices)}", len(devices) // processes
            if not most:
                raise UserError(f"{processes_key}: found {processes}, but {visible}; expected {len(devices)} or fewer")
            raise UserError(
                f"jobs: found {jobs} with {processes_key}={processes}, which take {(jobs or 1) * processes} GPUs, but "
                f"{visible}; expected jobs={most} or fewer"
            )
        self.jobs = jobs or (len(devices) // processes if devices else JOBS_WITHOUT_GPU)
        self._shares: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        threads = str(max(usable_cores() // self.jobs, 1))
        for job in range(self.jobs):
            share = {}
            if devices and self.jobs > 1:
                share[VISIBLE] = ",".join(devices[job * processes : (job + 1) * processes])
            if processes == 1 and self.jobs > 1 and THREADS not in os.environ:
                share[THREADS] = threads
            self._shares.put(share)

    @contextmanager
    def take(self) -> Iterator[dict[str, str]]:
        """Yield the environment variables of a command that has a share to itself; waits until one is free."""
        share = self._shares.get()
        try:
            yield share
        finally:
            self._shares.put(share)


def visible_devices() -> list[str]:
    """Return the names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES takes them; [] without a GPU."""
    import torch  # takes seconds

    count = torch.cuda.device_count()
    names = [name.strip() for name in os.environ.get(VISIBLE, "").split(",")]
    if not count or VISIBLE not in os.environ:
        return [str(number) for number in range(count)]
    # a process uses a single MIG instance, however many it may use, so torch counts one
    return names if names[0].startswith("MIG-") else names[:count]
