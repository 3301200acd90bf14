"""`launch=slurm`: a training as a job of Slurm, whose processes srun starts, and which goes on after each interruption.

The job's log is `<out>/slurm-<number>.txt`. It runs the recipe that `prepare_out` has checked and written.
"""

import logging
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from annotated_types import Ge

from addp_core.base.errors import UserError
from addp_core.base.launch import ADDP, world_size
from addp_core.base.paths import FINISHED_FILE, RECIPE_FILE
from addp_core.base.slurm import SCRIPT_FILE, check_options, check_slurm, jobs_in_queue, submit_script, write_script
from addp_core.recipes.verbs import verb_of
from addp_core.training.config import TrainConfig

log = logging.getLogger("addp")

WHERE = "launch=slurm"
JOB = "training"  # the name of its job in the run folder
SBATCH = "slurm.sbatch"
FULL = "full"  # the mode of `addp linprobe` that trains as `train` says
# srun takes the number of cores from its own variable or option only. One process that fails ends all.
SRUN = 'srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}'
# A training that a signal stops exits with 0; before it has begun, and in commands without checkpoints, the signal
# kills it. A run that is extended has finished before.
UNFINISHED = '{{ [ "$code" -eq 0 ] || [ "$code" -gt 128 ]; }} && ! [ {finished} -nt {script} ]'

LaunchChoice = Annotated[
    Literal["local", "slurm"], "run here, or submit a job that does, as the section `slurm` says (compute only)"
]


@dataclass
class SlurmConfig:
    """The job that launch=slurm submits; other processes and machines compute the same (compute only)."""

    partition: Annotated[str, "partition; empty: the cluster's default"] = ""
    account: Annotated[str, "account; empty: your default"] = ""
    time: Annotated[
        str,
        "time limit of the job, as in 24:00:00 or 7-00:00:00; two minutes before, the run writes a checkpoint and the "
        "job goes back into the queue, as often as it takes; empty: the partition's",
    ] = ""
    nodes: Annotated[int, Ge(1), "machines"] = 1
    gpus: Annotated[int, Ge(0), "GPUs on each of them (--gpus-per-node); 0: the job asks for none"] = 0
    processes: Annotated[int | None, Ge(1), "processes on each of them; null: one for each GPU, or a single one"] = None
    cpus: Annotated[int | None, Ge(1), "CPU cores of each process; null: the cluster's default"] = None
    mem: Annotated[str, "memory on each machine, as in 200G; empty: the cluster's default"] = ""
    sbatch: Annotated[
        list[str], "further options of sbatch, as in ['--qos=long','--exclude=gpu7'], which replace those above"
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_options(self.sbatch, "sbatch")
        for key in ("partition", "account", "time", "mem"):
            if not (value := getattr(self, key)).isprintable():
                raise ValueError(f"{key}: found {value!r}, expected one line of text")

    @property
    def tasks(self) -> int:
        """Processes of the job."""
        return self.nodes * self._processes

    @property
    def _processes(self) -> int:
        return self.processes or self.gpus or 1

    @property
    def options(self) -> list[str]:
        """The options of sbatch."""
        given = {
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "nodes": self.nodes,
            "ntasks-per-node": self._processes,
            "gpus-per-node": self.gpus,
            "cpus-per-task": self.cpus,
            "mem": self.mem,
        }
        return [*(f"--{name}={value}" for name, value in given.items() if value), *self.sbatch]


KEYS = frozenset({"launch", "slurm", *(f"slurm.{key.name}" for key in fields(SlurmConfig))})


def is_for_slurm(recipe: Any) -> bool:
    """Check whether a recipe, which may lack the key, asks for a job."""
    return getattr(recipe, "launch", "local") == "slurm"


def number_of_processes(recipe: Any) -> int:
    """Return the number of processes that will train: those of the job, or those of this command."""
    return recipe.slurm.tasks if is_for_slurm(recipe) else world_size()


def check_training(recipe: Any, section: TrainConfig | None = None) -> None:
    """Raise UserError if the processes of a run cannot train as a section `train` says.

    A job has other devices than the machine that submits it, and makes the checks of devices when it begins.

    Args:
        recipe: of the run.
        section: the one to check, if it is not the recipe's own.
    """
    if section is None:
        section = getattr(recipe, "train", None)
        if not isinstance(section, TrainConfig) or getattr(recipe, "mode", FULL) != FULL:
            return
    from addp_core.training.optimization import check_optimizer
    from addp_core.training.processes import check_batch, check_precision

    check_batch(section, number_of_processes(recipe))
    if not is_for_slurm(recipe):
        check_precision(section.precision)
        check_optimizer(section)


def check_submission(out: Path, recipe: Any) -> None:
    """Check that a job for this run folder can be submitted; exit with code 0 if one is in the queue.

    Raises UserError if this is no machine of a cluster, or one of several processes, or if the processes of the job
    cannot share the batch.
    """
    if world_size() > 1:
        raise UserError(f"{WHERE}: found in {world_size()} processes, expected one; start it without torchrun or srun")
    check_slurm(WHERE)
    check_training(recipe)
    if number := jobs_in_queue(out, WHERE).get(JOB):
        log.info("out=%s: job %s is in the queue or runs; nothing to submit", out, number)
        raise SystemExit(0)


def submit(out: Path, recipe: Any) -> NoReturn:
    """Submit the job that runs `<out>/recipe.yaml`, write its number to stdout, and exit with code 0."""
    verb = verb_of(type(recipe))
    command = [*ADDP, *verb.split(), str(out / RECIPE_FILE), "launch=local"]
    unfinished = UNFINISHED.format(
        finished=shlex.quote(str(out / FINISHED_FILE)), script=shlex.quote(str(out / SCRIPT_FILE))
    )
    name = f"addp-{out.resolve().name}"
    script = write_script(out, name, recipe.slurm.options, f"{SRUN} {shlex.join(command)}", unfinished)
    number = submit_script(out, JOB, script, [], SBATCH)
    sys.stdout.write(f"{number} {out}\n")
    sys.stdout.flush()
    log.info("job %s trains on %d processes; its log: %s", number, recipe.slurm.tasks, out / f"slurm-{number}.txt")
    raise SystemExit(0)
