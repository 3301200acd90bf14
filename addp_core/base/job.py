"""The processes of one job begin together, and end together when one of them fails.

torch's process group cannot tell a rank that takes its time from one that has died, and a rank that waits in a
collective operation hears nothing until its timeout. So each process has a connection to rank 0, and a thread that
listens on it. Rank 0 learns of errors by a message, and of dead processes because their connections end; it writes the
reason once and tells the others, and all leave at once.
"""

import contextlib
import datetime
import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from addp_core.base.errors import UserError
from addp_core.base.launch import Place, assign_devices, check_launch, rank, this_place, world_size

JOIN_LIMIT = 600.0  # seconds in which all processes of a job have to begin
LINGER = 20.0  # seconds that rank 0 waits for them after an error in their places, to tell it to all
GRACE = 1.0  # seconds that an error waits for that of another rank, of which it may be a consequence
ANSWER_LIMIT = 5.0  # seconds in which rank 0 answers an error
SIGNAL_LIMIT = 25.0  # seconds that a process may wait for others after a signal; launchers kill after 30
LIMITED_SIGNALS = {signal.SIGTERM, signal.SIGINT}  # not SIGUSR1, by which schedulers warn minutes before the end
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # finds a machine that vanished within 25 s

CONTINUE = "all processes end; start the same command again to continue"


def join() -> None:
    """Wait until all processes of this job have begun, and watch them from then on. A single process does not wait.

    Sets LOCAL_RANK to the index of this process's GPU among those that it sees.

    Raises:
        UserError: if the environment names no process of a job, a process does not come, or two would share a GPU.
    """
    global _member
    check_launch()
    if _member is not None:
        return
    if world_size() == 1:
        if not os.environ.get("MASTER_ADDR"):
            os.environ.pop("LOCAL_RANK", None)  # by which accelerate would look for a process group
        return
    member = FirstRank() if rank() == 0 else OtherRank()
    member.meet()
    member.start()
    _member = member


def leave() -> None:
    """Leave the job, because this process has done its command."""
    global _member
    if _member is not None:
        _member.leave()
        _member = None


def fail(code: int, line: str, details: str = "") -> None:
    """End all processes of the job, because of an error in this one. Returns if there is no job.

    Args:
        code: the exit code of all.
        line: the reason, which rank 0 writes to stderr if it is the first; nothing is written if it is empty.
        details: what this process writes to stderr before.
    """
    if _member is not None:
        _member.fail(code, line, details)


def handled_signal() -> None:
    """Note that the handler of a signal has been called, so that this process can react to it."""
    if _member is not None:
        _member.last_handled = time.monotonic()


@dataclass
class Failure:
    """Why a job ends: the exit code, the reason, and the rank that failed."""

    code: int
    line: str
    rank: int

    def write(self) -> None:
        """Write the reason to stderr."""
        write_line(self.line, self.rank)


def write_line(line: str, of_rank: int) -> None:
    """Write one line of the command to stderr, on behalf of a rank."""
    program = "addp" if of_rank == 0 else f"addp (rank {of_rank})"
    if line:  # not by sys.stderr, whose lock the main thread may hold
        os.write(2, f"{program}: {' '.join(line.splitlines())}\n".encode())


# -------------------- connections


@dataclass(eq=False)
class Connection:
    """A connection between two processes that send each other dicts, each as a line of JSON."""

    socket: socket.socket
    peer: Place | None = None  # known after its first message
    rest: bytes = b""

    def __post_init__(self) -> None:
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                self.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Send a message, unless the other process has gone."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come, or None if the other process has gone."""
        try:
            data = self.socket.recv(65536)
            *lines, self.rest = (self.rest + data).split(b"\n")
            return [json.loads(line) for line in lines] if data else None
        except (OSError, ValueError):
            return None


def open_store(limit: float) -> Any:
    """Return torch's store of the job, through which all learn where rank 0 listens. Rank 0 serves it, or torchrun."""
    import torch

    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank() == 0 and not by_torchrun,
        timeout=datetime.timedelta(seconds=limit),
        wait_for_workers=False,
        multi_tenant=True,  # the process group opens it again
    )


def store_key() -> str:
    """Return the entry of the store that says where rank 0 listens; torchrun may start the processes again."""
    return f"addp/rank 0/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def listen() -> socket.socket:
    """Return a socket that listens on a free port, by IPv6 and IPv4 where the machine has both."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


# -------------------- the members of a job


class Member(ABC):
    """One process of the job: its connections, and the thread that watches them."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.sockets: list[socket.socket] = []
        self.store: Any = None  # kept, since its server ends with it
        self.left = False
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.signaled_at: float | None = None  # when a signal came whose handler has not been called yet
        self.last_handled = -1e9  # when the handler of a signal was called

    @abstractmethod
    def meet(self) -> None:
        """Wait for the other processes, and set LOCAL_RANK. Raises UserError if that fails."""

    @abstractmethod
    def handle(self, connection: Connection) -> None:
        """Read from a connection, and end this process if it says so."""

    @abstractmethod
    def fail(self, code: int, line: str, details: str = "") -> NoReturn:
        """End the job because of an error in this process."""

    @abstractmethod
    def leave(self) -> None:
        """Tell the others that this process is done."""

    def register(self, connection: Connection) -> Connection:
        """Watch a connection."""
        self.sockets.append(connection.socket)
        self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        return connection

    def start(self) -> None:
        """Start the thread that watches the connections, the signals to this process, and torchrun."""
        if threading.current_thread() is threading.main_thread():
            reading, writing = socket.socketpair()
            self.sockets += [reading, writing]
            writing.setblocking(False)
            signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
            self.selector.register(reading, selectors.EVENT_READ)
        threading.Thread(target=self._watch, name="job", daemon=True).start()

    def forget(self) -> None:
        """Close the connections in a process forked from this one, which would outlive it with them."""
        for each in self.sockets:
            each.close()
        with contextlib.suppress(ValueError):  # another thread forked
            signal.set_wakeup_fd(-1)

    def _watch(self) -> None:
        while not self.left:
            for key, _ in self.selector.select(timeout=1.0):
                if isinstance(key.data, Connection):
                    self.handle(key.data)
                elif LIMITED_SIGNALS & set(key.fileobj.recv(4096)):  # type: ignore[union-attr]
                    self.signaled_at = time.monotonic()
            self._check_signals()
            self._check_torchrun()

    def _check_signals(self) -> None:
        """End the job if a signal came long ago and this process, waiting for others in C++, could not handle it."""
        if self.signaled_at is None or self.left:
            return
        if self.last_handled > self.signaled_at - GRACE:  # the handler may be called before this thread gets its turn
            self.signaled_at = None
        elif time.monotonic() - self.signaled_at > SIGNAL_LIMIT:
            line = f"stopped by a signal, after waiting {SIGNAL_LIMIT:.0f} s for other processes; {CONTINUE}"
            threading.Thread(target=self.fail, args=(1, line)).start()  # while this thread listens for the answer
            self.signaled_at = None

    def _check_torchrun(self) -> None:
        """Stop as after SIGTERM if torchrun was killed, since nothing else would end this process."""
        if self.torchrun is not None and os.getppid() != self.torchrun and not self.left:
            if rank() == 0:
                write_line(f"torchrun (process {self.torchrun}) was killed; stopping as after SIGTERM", 0)
            self.torchrun = None
            os.kill(os.getpid(), signal.SIGTERM)


class FirstRank(Member):
    """Rank 0, to which all others are connected."""

    def __init__(self) -> None:
        super().__init__()
        self.others: dict[int, Connection] = {}  # by rank
        self.token = secrets.token_hex(8)  # by which they are known, since anyone may connect
        self.lock = threading.Lock()  # of the first failure

    def meet(self) -> None:
        try:
            self._meet()
        except UserError:
            if self.store is not None:
                with contextlib.suppress(UserError):
                    self._wait_for_others(min(LINGER, JOIN_LIMIT))
            self._tell(code=2)
            raise

    def _meet(self) -> None:
        listener = listen()
        self.sockets.append(listener)
        try:
            self.store = open_store(JOIN_LIMIT)
            self.store.set(store_key(), f"{listener.getsockname()[1]} {self.token}")
        except RuntimeError as error:
            raise UserError(
                f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}: rank 0 cannot "
                f"listen there ({str(error).splitlines()[0]}); expected this machine and a free port, and RANK=0 once"
            ) from error
        self.selector.register(listener, selectors.EVENT_READ)
        self._wait_for_others(JOIN_LIMIT)
        self.selector.unregister(listener)
        peers = [self.others[other].peer for other in range(1, world_size())]
        local_ranks = assign_devices([this_place(), *(peer for peer in peers if peer is not None)])
        os.environ["LOCAL_RANK"] = str(local_ranks[0])
        for other, connection in self.others.items():
            connection.send(local_rank=local_ranks[other])

    def _wait_for_others(self, limit: float) -> None:
        deadline = time.monotonic() + limit
        while len(self.others) < world_size() - 1:
            for key, _ in self.selector.select(timeout=1.0):
                if isinstance(key.data, Connection):
                    self._greet(key.data)
                else:
                    self.register(Connection(key.fileobj.accept()[0]))  # type: ignore[union-attr]
            if time.monotonic() > deadline:
                missing = ", ".join(str(other) for other in range(1, world_size()) if other not in self.others)
                raise UserError(
                    f"WORLD_SIZE={world_size()}: rank {missing} did not begin within {limit / 60:g} minutes; expected "
                    f"{world_size()} processes with the same MASTER_ADDR and MASTER_PORT; see their messages"
                )

    def _greet(self, connection: Connection) -> None:
        """Read from a process that has not begun yet."""
        messages = connection.receive()
        if messages is None:
            self.selector.unregister(connection.socket)
            if connection.peer is not None:
                raise UserError(f"{connection.peer} ended before all processes had begun; see its messages")
        for message in messages or []:
            if message.pop("token", None) != self.token:
                return
            peer = connection.peer = Place(**message)
            if peer.rank == 0 or peer.rank in self.others:
                connection.send(code=2)
                raise UserError(f"RANK={peer.rank}: found in two processes, expected each rank once; see {peer}")
            self.others[peer.rank] = connection
            if peer.world_size != world_size():
                raise UserError(
                    f"WORLD_SIZE={peer.world_size}: found for {peer}, expected {world_size()} as for rank 0; "
                    "give all processes the same"
                )

    def handle(self, connection: Connection) -> None:
        messages = connection.receive()
        if messages is None:
            self.selector.unregister(connection.socket)
            if connection.peer is not None and connection.peer.rank in self.others and not self.left:
                self._end(Failure(1, f"{connection.peer} was killed or has crashed; {CONTINUE}", 0))
        for message in messages or []:
            if connection.peer is None:
                return
            if "code" in message:
                self._end(Failure(**message))
            self.others.pop(connection.peer.rank)  # it is done

    def fail(self, code: int, line: str, details: str = "") -> NoReturn:
        if details:
            time.sleep(GRACE)
        self._end(Failure(code, line, 0), details)

    def leave(self) -> None:
        self.left = True
        self._tell(done=True)

    def _end(self, failure: Failure, details: str = "") -> NoReturn:
        self.lock.acquire()  # never released: the first failure ends this process
        os.write(2, details.encode())
        failure.write()
        self._tell(code=failure.code)
        os._exit(failure.code)

    def _tell(self, **message: Any) -> None:
        for connection in list(self.others.values()):
            connection.send(**message)


class OtherRank(Member):
    """A process with another rank than 0, which is connected to rank 0."""

    connection: Connection
    welcomed = False  # whether rank 0 has met all processes

    def meet(self) -> None:
        deadline = time.monotonic() + JOIN_LIMIT
        while True:
            if self._connect():
                break
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}: rank 0 did not "
                    f"begin there within {JOIN_LIMIT / 60:g} minutes; see its messages"
                )
            time.sleep(0.1)
        while not self.welcomed:
            for _ in self.selector.select(timeout=1.0):  # a signal interrupts it
                self.handle(self.connection)

    def _connect(self) -> bool:
        """Connect to rank 0, if it has begun."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if self.store is None:
            with contextlib.suppress(OSError, RuntimeError):  # nobody listens yet
                socket.create_connection((address, port), timeout=10).close()  # the store's own wait is deaf to signals
                self.store = open_store(limit=min(60.0, JOIN_LIMIT))
            return False
        try:
            if not self.store.check([store_key()]):
                return False
            port_of_rank_0, token = self.store.get(store_key()).decode().split()
            self.connection = Connection(socket.create_connection((address, int(port_of_rank_0)), timeout=10))
        except (OSError, RuntimeError):
            self._lose_rank_0()
        self.connection.send(token=token, **asdict(this_place()))
        self.register(self.connection)
        return True

    def handle(self, connection: Connection) -> None:
        messages = connection.receive()
        if messages is None and not self.left:
            self._lose_rank_0()
        for message in messages or []:
            if "code" in message:
                os._exit(message["code"])
            if "local_rank" in message:
                os.environ["LOCAL_RANK"] = str(message["local_rank"])
                self.welcomed = True
            self.left = "done" in message

    def _lose_rank_0(self) -> NoReturn:
        if rank() == 1:  # one line is enough
            write_line(f"rank 0 was killed or has crashed; {CONTINUE}", 1)
        os._exit(1)

    def fail(self, code: int, line: str, details: str = "") -> NoReturn:
        time.sleep(GRACE)
        os.write(2, details.encode())
        failure = Failure(code, line, rank())
        if not self.left:
            self.connection.send(**asdict(failure))
            time.sleep(ANSWER_LIMIT)  # rank 0 writes the line, and its answer ends this process
        failure.write()
        os._exit(code)

    def leave(self) -> None:
        self.left = True
        self.connection.send(done=True)


_member: Member | None = None  # this process


def _forget_member() -> None:
    global _member
    if _member is not None:
        _member.forget()
        _member = None


os.register_at_fork(after_in_child=_forget_member)
