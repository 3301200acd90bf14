"""A step of `addp bench`: one benchmark, or the pretraining, of one arm; its folder, its commands and what its result
depends on.
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from addp_core.recipes.config import dump
from tools.bench import sweep
from tools.bench.arguments import digest, keys_without_effect
from tools.bench.arms import PRETRAINED, Arm
from tools.bench.metric import Metric
from tools.children import command_line

STEP, LOG, SWEEP = "step.json", "log.txt", "sweep.yaml"  # in a step's folder
PREDICTIONS, INPAINTED = "pictures", "inpaint"  # and these, which hold nothing but images


@dataclass(frozen=True)
class Command:
    """Arguments of `addp`, and the number of processes that torchrun starts for it."""

    arguments: list[str]
    processes: int = 1


@dataclass
class Step:
    """One benchmark, or the pretraining, of one arm, in `out/<benchmark>/<arm>`.

    Attributes:
        processes: Number of processes of each training and evaluation.
        commands: The commands, run in this order.
        trials: The sweep of a benchmark that trains.
        metrics: What is read from the runs of the sweep.
        in_sequence: Whether each command needs the one before.
        needs: Names of the steps that have to be done before.
        basis: What all results in the folder depend on.
        files: Digests of files that the settings name, which they depend on as well.
        needed: Fingerprint and `pretrainings` of the steps in `needs` whose results this one reads.
        left_out: Why the step is not part of the bench, "" if it is.
        lacks_key: Whether that is because a key of the recipe is not given, such as a dataset.
    """

    benchmark: str
    arm: Arm
    out: Path
    seeds: list[int] = field(default_factory=list)
    processes: int = 1
    commands: list[Command] = field(default_factory=list)
    trials: sweep.Recipe | None = None
    metrics: tuple[Metric, ...] = ()
    in_sequence: bool = False
    needs: list[str] = field(default_factory=list)
    basis: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    needed: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)
    left_out: str = ""
    lacks_key: bool = False

    @property
    def name(self) -> str:
        return f"{self.benchmark}/{self.arm.name}"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def lines(self) -> list[str]:
        """The commands as one would type them."""
        return [command_line(command.arguments, command.processes) for command in self.commands]

    @property
    def basis_digest(self) -> str:
        """Digest of `basis` and `files`: with another one, the results in the folder are void."""
        return digest(self._whole_basis)

    @property
    def _whole_basis(self) -> dict[str, Any]:
        return self.basis | ({"files": self.files} if self.files else {})

    @property
    def fingerprint(self) -> str:
        """Digest of everything: a finished step with another one runs again and reuses the runs that still hold."""
        ignored = keys_without_effect()
        commands = [
            [argument for argument in command.arguments if argument.partition("=")[0] not in ignored]
            for command in self.commands
        ]
        needed = [self.needed] if self.needed else []
        return digest([self._whole_basis, commands, self.trials.grid if self.trials else {}, self.seeds, *needed])

    @property
    def pretrainings(self) -> dict[str, int]:
        """Each seed's seed of the pretraining that it starts from, in a bench that pretrains; {} elsewhere."""
        if not self.arm.pretrained_by or self.arm.init != PRETRAINED:
            return {}
        return {str(seed): seed if len(self.arm.seeds) > 1 else self.arm.seeds[0] for seed in self.seeds}

    def record(self) -> dict[str, Any]:
        """Return the content of its step.json, {} if there is none."""
        path = self.folder / STEP
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def has_other_pretrainings(self, record: dict[str, Any]) -> bool:
        """Check whether a seed of the step.json started from another pretraining than it does now."""
        before = record.get("pretrainings", {})
        return any(before.get(seed, number) != number for seed, number in self.pretrainings.items())

    def describes(self, record: dict[str, Any]) -> bool:
        """Check whether a step.json is about this step as it is now, rather than with other settings or inputs."""
        blocked = record.get("state") == "blocked"  # its pretrainings are those of what is in the folder
        return record.get("fingerprint") == self.fingerprint and (blocked or not self.has_other_pretrainings(record))

    def about(self) -> dict[str, Any]:
        """Return what step.json says of the step itself, and of seeds whose runs are in the folder from before."""
        about = {"basis": self.basis_digest, "fingerprint": self.fingerprint, "commands": self.lines}
        pretrainings = self.record().get("pretrainings", {}) | self.pretrainings
        return about | ({"pretrainings": pretrainings} if pretrainings else {})

    def holds(self, record: dict[str, Any]) -> bool:
        """Check whether the runs of a step.json hold for this step, which may have more of them.

        Also if it is from before the content of files counted, and needed steps without their grid and seeds.
        """
        needs = {name: fingerprint for name, (fingerprint, _) in self.needed.items()}
        bases = (None, self.basis_digest, digest(self.basis), digest(self.basis | {"needs": needs}))
        return record.get("basis") in bases and not self.has_other_pretrainings(record)

    @property
    def done(self) -> bool:
        record = self.record()
        return record.get("state") == "done" and self.describes(record)


def prepare_folder(step: Step) -> str:
    """Make the step's folder and write what its commands read.

    Void results move to `out/before` first; returns where to, "" if there were none.
    """
    moved_to = ""
    if not step.holds(step.record()):
        target = _folder_for_void_results(step)
        target.parent.mkdir(exist_ok=True)
        step.folder.rename(target)
        moved_to = str(target)
    step.folder.mkdir(parents=True, exist_ok=True)
    for name in (PREDICTIONS, INPAINTED):
        shutil.rmtree(step.folder / name, ignore_errors=True)
    if step.trials:
        (step.folder / SWEEP).write_text(dump(step.trials), encoding="utf-8")
    return moved_to


def _folder_for_void_results(step: Step) -> Path:
    """Return `out/before/<benchmark>-<arm>-<the next free number>`."""
    prefix = step.out / "before" / f"{step.benchmark}-{step.arm.name}"
    suffixes = [re.sub(r".*-", "", path.name) for path in prefix.parent.glob(f"{prefix.name}-*")]
    number = max((int(suffix) for suffix in suffixes if suffix.isdecimal()), default=0) + 1
    return prefix.with_name(f"{prefix.name}-{number}")
