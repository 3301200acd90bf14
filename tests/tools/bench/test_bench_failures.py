"""`addp bench`: steps that fail, that another process works on, and a bench that is killed."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_commands import bench_command, bench_json, commands_run, last_line, set_behavior, states

from addp_core.recipes.cli import main
from tools import children

ONLY = "bench.only=[finetune,det/a,det/b]"


def test_a_step_that_another_process_works_on_is_left_alone(toys, fake, tmp_path, capsys):
    out = tmp_path / "out"
    line = bench_command(toys, out, "bench.only=det/a", "bench.share=true")
    assert main(line) == 0
    changed = [*line, "det.set={train.steps: 7}"]
    with locked_by_another_process(out / "det" / "a") as process:
        assert main(changed) == 2
        assert f"process {process.pid}" in last_line(capsys)
    assert not (out / "before").exists()
    assert main(changed) == 0
    assert (out / "before" / "det-a-1" / "step.json").exists()


@contextlib.contextmanager
def locked_by_another_process(folder: Path) -> Iterator[subprocess.Popen]:
    """Let another process lock a folder, as one that works in it would."""
    code = f"""
    import fcntl, os, sys
    file = os.open({str(folder / ".lock")!r}, os.O_RDWR | os.O_CREAT)
    fcntl.lockf(file, fcntl.LOCK_EX)
    os.write(file, f"process {{os.getpid()}}".encode())
    print("locked", flush=True)
    sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process  # it ends when its input is closed


def test_a_failed_step_blocks_only_the_steps_that_need_it(toys, fake, tmp_path, capsys):
    out = tmp_path / "out"
    set_behavior(fake, fail="finetune/b")
    line = bench_command(toys, out, "random=false")
    with pytest.raises(SystemExit, match="1"):
        main(line)
    error = last_line(capsys)
    assert "2 of 10 steps failed: finetune/b, robustness/b" in error
    assert error.endswith(f"see {out}/finetune/b/log.txt")
    steps = {step["name"]: step for step in bench_json(out)["steps"]}
    assert (steps["finetune/b"]["state"], steps["finetune/b"]["error"]) == ("failed", "addp: nothing works today")
    assert (steps["robustness/b"]["state"], steps["robustness/b"]["error"]) == ("blocked", "blocked by finetune/b")
    assert [name for name, step in steps.items() if step["state"] == "done"] == [
        *("finetune/a", "linprobe/a", "linprobe/b", "robustness/a", "det/a", "det/b", "seg/a", "seg/b")
    ]
    commands_run(fake, out)
    (fake / "behavior.json").unlink()
    assert main(line) == 0
    assert commands_run(fake, out) == ["sweep finetune/b", "robustness robustness/b/seed0"]


def start_bench(arguments: list[str]) -> subprocess.Popen:
    """Start a bench in a process of its own, with fake_addp.py as its children."""
    code = f"""
    import sys
    from addp_core.recipes.cli import main
    from tools import children
    children.ADDP = {children.ADDP!r}
    sys.exit(main({arguments!r}))
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.stderr is not None
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def running_children() -> int:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return sum(line.split()[1:2] == children.ADDP[1:] for line in listed.splitlines())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_bench_continues(toys, fake, tmp_path, capsys, number):
    out = tmp_path / "out"
    line = bench_command(toys, out, datasets=("imagenet", "coco"))
    line = [*(argument for argument in line if not argument.startswith("bench.only")), ONLY]
    set_behavior(fake, hang="det/a")
    process = start_bench(line)
    try:
        wait_for(fake / "hangs", process)
        assert main(line) == 2  # a second bench in the same folder
        assert f"process {process.pid} on" in last_line(capsys)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == (1 if number == signal.SIGTERM else -signal.SIGKILL)
    for _ in range(100):
        if not running_children():
            break
        time.sleep(0.1)
    assert running_children() == 0  # no orphans
    if number == signal.SIGTERM:
        assert "the same command continues" in errors
    assert states(out)["det/a"] == states(out)["det/b"] == "missing"
    assert commands_run(fake, out)[-1] == "sweep det/a"
    (fake / "behavior.json").unlink()
    assert main(line) == 0
    assert commands_run(fake, out) == ["sweep det/a", "det det/a/pictures", "sweep det/b", "det det/b/pictures"]
    table = capsys.readouterr().out
    uninterrupted = [argument.replace(str(out), str(tmp_path / "uninterrupted")) for argument in line]
    assert main(uninterrupted) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == table.splitlines()[:-1]  # the last one is the report's path
