"""Several processes of one command, started by torchrun or as plain processes (as `srun` starts them), with a fault in
one of them.

`run_ranks` starts them and waits until all are gone; `assert_one_line` checks that they ended in time and said why. The
command is that of the command line, or `toy key=value ...` for `toy_stage`. Faults are injected into the rank's process
by wrapping the function that is called at the named point, before the command begins.
"""

import errno
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

LIMIT = 30.0  # seconds in which all processes of a job are gone after a fault
FOLDER, FAULTS = "TEST_RANKS_FOLDER", "TEST_RANKS_FAULTS"  # environment variables of the ranks
TIMEOUT = "TEST_RANKS_TIMEOUT"  # another: seconds that ranks wait for each other

POINTS = {  # point: "module:name" of what is called there
    "start": "addp_core.training.engine:make_accelerator",
    "step": "addp_core.training.engine:_Run._step",
    "validation": "addp_core.training.engine:_Run._evaluate",
    "checkpoint": "addp_core.training.engine:_Run._checkpoint",
    "saving": "addp_core.training.checkpoints:save_tensors",  # within "checkpoint", on rank 0 alone without FSDP
}


@dataclass(frozen=True)
class Fault:
    """What happens to one rank.

    Attributes:
        what: "error" (RuntimeError), "user error", "disk full", "delay" of `seconds`, or the name of a signal that the
            rank sends to itself, `seconds` later.
        at: a name of `POINTS`, or "module:name" of a function.
        rank: the rank that gets it.
        count: the call of that function in which it happens, from 1; with `repeated`, also in those that follow.
        seconds: length of a delay, or until a signal.
        to_launcher: send the signal to the process that started the rank instead.
    """

    what: str
    at: str
    rank: int = 1
    count: int = 1
    seconds: float = 0.0
    to_launcher: bool = False
    repeated: bool = False


@dataclass
class Ended:
    """How a job ended.

    Attributes:
        codes: exit codes of the ranks (started as plain processes), or that of torchrun; negative after a signal.
        outputs: stdout and stderr of each rank.
        launcher: stdout and stderr of torchrun.
        seconds: from the fault, or from the start without one, until the last process was gone.
    """

    codes: list[int]
    outputs: list[str]
    launcher: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """The lines in which the command line says why the job ended, of all ranks."""
        return [line for output in self.outputs for line in output.splitlines() if line.startswith("addp")]

    @property
    def text(self) -> str:
        """All that was printed, for the messages of assertions."""
        return "\n".join([*(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.outputs)), self.launcher])


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def group_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the variables that a script around `srun` sets for one process."""
    group = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in group.items()}


def run_ranks(
    arguments: Sequence[str],
    folder: Path,
    n: int = 2,
    launcher: Literal["plain", "torchrun"] = "plain",
    fault: Fault | Sequence[Fault] = (),
    environment: Mapping[str, str | None] | Callable[[int], Mapping[str, str | None]] | None = None,
    before: Callable[[], None] | None = None,
    limit: float = 120.0,
) -> Ended:
    """Run a command on `n` processes and wait until all are gone.

    Args:
        arguments: of the command line, or "toy" and settings of `toy_stage`.
        folder: where the outputs of the ranks go; a new one for each job.
        n: number of processes.
        launcher: "torchrun", or "plain" for processes that have their place in the environment.
        fault: what happens to one of them, or to several.
        environment: further variables, of all ranks or by rank; None removes one.
        before: called in each plain process before the command.
        limit: seconds after the fault, or after the start, until processes that still run are killed and
            AssertionError is raised.
    """
    job = Job(folder, n, launcher, [fault] if isinstance(fault, Fault) else list(fault))
    try:
        job.start(list(arguments), environment or {}, before)
        return job.wait(limit)
    finally:
        job.kill()


def assert_ends(ended: Ended, codes: Sequence[int], *parts: str, limit: float = LIMIT) -> None:
    """Check that all ranks were gone within `limit` seconds with these codes, and that one line has all the parts."""
    assert ended.seconds < limit, ended.text
    assert ended.codes == list(codes), ended.text
    assert len(ended.lines) == 1, ended.text
    for part in parts:
        assert part in ended.lines[0], ended.text


@dataclass
class Job:
    """The processes of one job."""

    folder: Path
    n: int
    launcher: str
    faults: list[Fault]
    processes: list[BaseProcess] = field(default_factory=list)
    torchrun: subprocess.Popen | None = None
    begin: float = field(default_factory=time.time)

    def start(self, arguments: list[str], environment: Any, before: Callable[[], None] | None) -> None:
        """Start the processes."""
        self.folder.mkdir(parents=True)
        common = {FOLDER: str(self.folder), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
        common[FAULTS] = json.dumps([asdict(fault) for fault in self.faults])
        by_rank = environment if callable(environment) else lambda _: environment
        port = free_port()
        if self.launcher == "torchrun":
            assert before is None, "torchrun starts a program, not a function"
            command = ["-m", "torch.distributed.run", f"--nproc-per-node={self.n}", f"--master-port={port}", __file__]
            with (self.folder / "launcher.log").open("wb") as log:
                variables = changed(dict(os.environ), common | dict(by_rank(0)))
                self.torchrun = subprocess.Popen(
                    [sys.executable, *command, *arguments], stdout=log, stderr=log, env=variables
                )
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["addp_core.training.engine", "addp_core.recipes.config"])  # as in toy_stage
        for rank in range(self.n):
            variables = common | group_environment(rank, self.n, port) | dict(by_rank(rank))
            process = context.Process(target=run_rank, args=(arguments, rank, variables, before))
            process.start()
            self.processes.append(process)

    def wait(self, limit: float) -> Ended:
        """Wait until all processes are gone."""
        while self.alive():
            assert time.time() < self._begin() + limit, f"still running after {limit} s\n{self.ended().text}"
            time.sleep(0.02)
        return self.ended()

    def ended(self) -> Ended:
        """Return how the job has ended so far."""
        codes = [process.exitcode or 0 for process in self.processes]
        if self.torchrun:
            codes = [self.torchrun.poll() or 0]
        outputs = [self._read(f"rank-{rank}.log") for rank in range(self.n)]
        return Ended(codes, outputs, self._read("launcher.log"), time.time() - self._begin())

    def _begin(self) -> float:
        """Return when the fault happened, or when the job began."""
        return float(self._read("fault") or self.begin)

    def alive(self) -> bool:
        """Check whether a process of the job still runs, its data workers included."""
        launched = self.torchrun is not None and self.torchrun.poll() is None
        return launched or any(process.exitcode is None for process in self.processes) or bool(self._pids())

    def kill(self) -> None:
        """Kill whatever still runs."""
        for pid in self._pids():
            os.kill(pid, signal.SIGKILL)
        if self.torchrun:
            self.torchrun.kill()
            self.torchrun.wait()
        for process in self.processes:
            process.kill()
            process.join()

    def _pids(self) -> list[int]:
        """Return the processes that have this job's folder in their environment and run, but not torchrun itself."""
        recorded = {int(path.read_text() or 0) for path in self.folder.glob("pid-*")}
        return [pid for pid in recorded if pid and is_running(pid)]

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""


def is_running(pid: int) -> bool:
    """Check whether a process exists and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def changed(variables: dict[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return variables with changes, of which None removes one."""
    return {name: value for name, value in (variables | dict(changes)).items() if value is not None}


# -------------------- in the processes


def run_rank(
    arguments: list[str], rank: int, environment: Mapping[str, str | None], before: Callable[[], None] | None
) -> None:
    """Run the command in this process, as one rank of the job, and end the process."""
    import torch

    variables = changed(dict(os.environ), environment)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    folder = Path(os.environ[FOLDER])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (pytest's or multiprocessing's before)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if seconds := float(os.environ.get(TIMEOUT, 0)):
        from addp_core.training import processes

        processes.GROUP_TIMEOUT = timedelta(seconds=seconds)
    for fields in json.loads(os.environ[FAULTS]):
        if fields["rank"] == rank:
            inject(Fault(**fields), folder)
    if before:
        before()
    sys.exit(run_command(arguments))


def run_command(arguments: list[str]) -> int:
    """Run a command of `addp`, or `toy`, and return its exit code."""
    from addp_core.recipes import cli

    if arguments[0] != "toy":
        return cli.main(arguments)
    import toy_stage

    return toy_stage.exit_code(arguments[1:])


def inject(fault: Fault, folder: Path) -> None:
    """Wrap the function that is called at the fault's point."""
    module_name, _, path = POINTS.get(fault.at, fault.at).partition(":")
    owner = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, calls = getattr(owner, name), 0

    def with_fault(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.count:
            (folder / "fault").write_text(repr(time.time()))
        if calls == fault.count or (fault.repeated and calls > fault.count):
            happen(fault)
        return function(*args, **kwargs)

    setattr(owner, name, with_fault)


def happen(fault: Fault) -> None:
    """Let the fault happen to this process."""
    from addp_core.base.errors import UserError

    if fault.what == "error":
        raise RuntimeError("injected")
    if fault.what == "user error":
        raise UserError("injected=1: found a fault, expected none; inject no fault")
    if fault.what == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault.what == "delay":
        time.sleep(fault.seconds)
    else:
        process = os.getppid() if fault.to_launcher else os.getpid()
        send = threading.Timer(fault.seconds, os.kill, (process, signal.Signals[fault.what]))
        send.start()
        if not fault.seconds:
            send.join()


if __name__ == "__main__":
    run_rank(sys.argv[1:], int(os.environ["RANK"]), {}, None)
