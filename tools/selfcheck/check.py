"""`addp doctor check=true`: runs the checks one after another, and writes a table and a JSON file of what was found."""

import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.tables import text_table
from tools.children import Stopped
from tools.selfcheck.checks import CHECKS, CheckName
from tools.selfcheck.commands import CommandFailed, Commands, Device, TimeUp
from tools.selfcheck.outcome import Outcome

log = logging.getLogger("addp")

PATIENCE, MIN_PATIENCE = 5, 60  # a check that takes so many times what is expected, and so many seconds, hangs


@dataclass
class Run:
    """A run of the checks. environment: the report of `addp doctor`. file: where the report is written."""

    names: Sequence[CheckName]
    device: Device
    seconds: float
    environment: dict[str, Any]
    file: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)  # seconds

    def run(self) -> None:
        """Run the checks. Ctrl-C and SIGTERM end the running one; what was done is in the file then."""
        folder, begin = Path(tempfile.mkdtemp(prefix="addp-check-")), time.monotonic()
        self.write()
        try:
            with Commands(folder, self.device) as commands:
                for name in self.names:
                    self.outcomes[name] = self._run(name, commands, begin + self.seconds - time.monotonic())
                    self.write()
        except Stopped:
            for name in self.names:
                self.outcomes.setdefault(name, Outcome("skipped", "interrupted", {}))
            self.write()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _run(self, name: CheckName, commands: Commands, left: float) -> Outcome:
        """Run a check, or skip it if it needs more seconds than are left."""
        check = CHECKS[name]
        commands.pace = self.pace
        needed = check.seconds * self.pace
        least = needed if check.minimum is None else check.minimum * self.pace
        place = f"check {self.names.index(name) + 1} of {len(self.names)}"
        if least > left:
            log.info("%s, %s: skipped, no time left for it", place, name)
            note = f"needs about {least:.0f} s, {max(left, 0):.0f} s of seconds={self.seconds:g} are left"
            return Outcome("skipped", note, {})
        log.info("%s, %s: %s; %s left", place, name, check.title, _duration(min(self.remaining(), left)))
        begin, limit = time.monotonic(), max(PATIENCE * needed, MIN_PATIENCE)
        commands.deadline = begin + min(left, limit)
        try:
            outcome = check.run(commands)
        except TimeUp as error:
            outcome = Outcome("skipped" if left < limit else "failed", f"{error}; expected {needed:.0f} s", {})
        except CommandFailed as error:
            outcome = Outcome("failed", str(error), {})
        self.spent[name] = time.monotonic() - begin
        log.info("%s, %s: %s in %.0f s: %s", place, name, outcome.state, self.spent[name], outcome.note)
        return outcome

    @property
    def pace(self) -> float:
        """How many times as long as on two CPU cores the checks have taken so far."""
        passed = [name for name in self.names if name in self.outcomes and self.outcomes[name].state == "ok"]
        expected = sum(CHECKS[name].seconds for name in passed)
        return sum(self.spent[name] for name in passed) / expected if expected else 1.0

    def remaining(self) -> float:
        """Return about how many seconds the checks that have not run will take."""
        return self.pace * sum(CHECKS[name].seconds for name in self.names if name not in self.outcomes)

    def report(self) -> dict[str, Any]:
        """Return what the JSON file holds; checks that have not run yet are not in it."""
        checks = [
            {"check": name, **asdict(outcome), "seconds": round(self.spent.get(name, 0.0), 1)}
            for name, outcome in self.outcomes.items()
        ]
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": asdict(self.device),
            "checks": checks,
            "failed": self.failed,
            "environment": self.environment,
        }

    @property
    def failed(self) -> list[str]:
        """The checks that failed."""
        return [name for name, outcome in self.outcomes.items() if outcome.state == "failed"]

    def write(self) -> None:
        """Write the JSON file. Raises UserError if it cannot be written."""
        try:
            write_atomically(self.file, (json.dumps(self.report(), indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"out: {self.file} cannot be written ({error.strerror}); expected a file") from error

    def as_text(self) -> str:
        """Return the table, and what each failure means."""
        environment = self.environment
        torch, hosts = environment["torch"], environment["machine"]
        gpus = ", ".join(device["name"] for device in torch["devices"]) or "none"
        rows = [["check", "result", "seconds", "what was found"]]
        for name, outcome in self.outcomes.items():
            rows.append([name, outcome.state, f"{self.spent.get(name, 0.0):.0f}", outcome.note])
        text = (
            f"addp {environment['addp']}, Python {environment['python']}, torch {torch['version']}\n"
            f"{hosts['cores']} CPU cores, {hosts['memory_gib']} GiB; GPUs: {gpus}; checked on: {self.device.name}\n\n"
            f"{text_table(rows, left_columns=4)}\n"
        )
        text += "".join(f"{name} failed: {CHECKS[name].failure}\n" for name in CHECKS if name in self.failed)
        return f"{text}written to {self.file}: attach it to a report of a problem\n"


def check(
    names: Sequence[CheckName], device: str, seconds: float, environment: dict[str, Any], file: Path, as_json: bool
) -> None:
    """Run the checks, print the result and end with code 1 if one failed or the run was interrupted.

    Args:
        names: the checks, all if empty.
        device: cpu, cuda, or empty for a GPU if there is one.
        seconds: about how long they may take together.
        environment: the report of `addp doctor`.
        file: where the JSON report is written.
        as_json: print the report in place of the table.

    Raises:
        UserError: if torch does not work, the device does not exist or the file cannot be written.
    """
    run = Run(
        [name for name in CHECKS if name in names or not names],
        _device(device, environment["torch"], environment["problems"]),
        seconds,
        environment,
        file,
    )
    run.run()
    sys.stdout.write(json.dumps(run.report(), indent=2) + "\n" if as_json else run.as_text())
    interrupted = any(outcome.note == "interrupted" for outcome in run.outcomes.values())
    if interrupted or run.failed:
        raise SystemExit(1)


def _device(name: str, torch: dict[str, Any], problems: list[str]) -> Device:
    if not torch["version"]:
        raise UserError(f"check: torch cannot be used: {problems[0] if problems else 'it is not installed'}")
    gpus = torch["devices"]
    if name == "cuda" and not gpus:
        raise UserError("device: found cuda, but torch sees no GPU; expected device=cpu")
    if name == "cpu" or not gpus:
        return Device("cpu")
    return Device("cuda", len(gpus), gpus[0]["gib"])


def _duration(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s"
