"""Another process that works in a folder."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CODE = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 1 on a-machine")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def at_work_in(folder: Path) -> Iterator[None]:
    """Let another process hold the lock of a folder, as commands do that write there."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-I", "-S", "-c", CODE, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            process.kill()
