"""The trackers that a run can log to (`train.trackers`): accelerate's, with one run in each that a continued run goes
on with, and what each of them needs so that no step is missing or logged twice.

A step is logged once, as one row of all its metrics and images: `log` is called with increasing steps, and `sent` is
the last one that the tracker holds.
"""

import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from addp_core.base.errors import UserError

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]  # the keys of `BACKENDS`
PROJECT = "addp"  # the default of `train.tracker_project`

Images = Mapping[str, Any]  # name -> UInt8[H,W,3], a NumPy array


def check_installed(names: Iterable[str]) -> None:
    """Raise UserError if one of the trackers is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"train.trackers: {name} is not installed; expected pip install 'addp[trackers]', or a list without it"
            )


@dataclass(frozen=True)
class TrackedRun:
    """The run that is logged."""

    out: Path  # the run folder
    stage: str  # what is trained, such as "pretrain"
    project: str  # `train.tracker_project`
    step: int  # from which the run continues
    config: Mapping[str, Any]  # the recipe: full name of a key -> value

    @property
    def name(self) -> str:
        """The run's name in trackers: the run folder and the one around it."""
        return "/".join(part for part in self.out.resolve().parts[-2:] if part != "/")


class Backend(ABC):
    """One of accelerate's trackers.

    Args:
        run: the run that is logged.
        stored: what `record` returned for the same run before; empty if it is new to this tracker.
    """

    name: ClassVar[str]
    project_variable: ClassVar[str] = ""  # environment variable that takes precedence over `train.tracker_project`
    takes_back: ClassVar[bool] = False  # whether a continued run replaces rows that the stopped one has logged

    def __init__(self, run: TrackedRun, stored: Mapping[str, Any]):
        self.run = run
        self.project = os.environ.get(self.project_variable) or run.project
        self.stored = dict(stored) if stored.get("project", self.project) == self.project else {}
        self.sent: int = self.stored.get("step", -1)

    @abstractmethod
    def start(self) -> None:
        """Start the run, or continue it; set `sent` if the tracker itself knows better than `stored`."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float], images: Images) -> None:
        """Log the row of one step."""

    def finish(self, complete: bool) -> None:
        """Send what is left and end the run; `complete` says whether the training has reached its end."""
        self.tracker.finish()

    def record(self) -> dict[str, Any] | None:
        """Return what a continued run needs to go on with this one, or None if that is nothing."""
        return {"project": self.project, "id": self.id, "step": self.sent}

    tracker: Any  # accelerate's
    id: str


class TensorBoard(Backend):
    """Event files in <out>/tb. Their reader drops what a continued run logs again, which is named when it starts."""

    name = "tensorboard"
    takes_back = True

    def start(self) -> None:
        from accelerate.tracking import TensorBoardTracker

        begun = (self.run.out / "tb").exists()
        self.sent = min(self.stored.get("step", self.run.step), self.run.step - 1) if begun else -1
        self.tracker = TensorBoardTracker("tb", str(self.run.out), purge_step=self.sent + 1)
        self.tracker.start()
        # as text, because `store_init_configuration` would make each part of a continued run one of its own
        table = "".join(f"| {key} | {value} |\n" for key, value in self.run.config.items())
        self.tracker.tracker.add_text("recipe", f"| key | value |\n|---|---|\n{table}", self.sent + 1)

    def log(self, step: int, metrics: Mapping[str, float], images: Images) -> None:
        self.tracker.log_images({name: image[None] for name, image in images.items()}, step=step, dataformats="NHWC")
        self.tracker.log(dict(metrics), step=step)

    def record(self) -> None:
        return None


class WandB(Backend):
    """Weights & Biases, online or offline (WANDB_MODE).

    Offline, each start writes a folder of its own, <out>/wandb/offline-run-..., which `wandb sync` joins by the run's
    id. That of a killed process lacks its last rows, so a continued run sets it aside and logs its rows again.
    """

    name = "wandb"
    project_variable = "WANDB_PROJECT"

    def start(self) -> None:
        from accelerate.tracking import WandBTracker

        self._set_killed_aside()
        self.id = self.stored.get("id") or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
        folder = {} if os.environ.get("WANDB_DIR") else {"dir": str(self.run.out)}
        self.tracker = WandBTracker(
            self.project, id=self.id, name=self.run.name, job_type=self.run.stage, resume="allow", **folder
        )
        self.tracker.start()
        run = self.tracker.tracker
        self.offline = bool(run.offline)
        if self.offline:
            self.complete_until, self.folder = self.sent, str(run.settings.sync_dir)
        else:
            self.sent = run.step - 1
        self.tracker.store_init_configuration(dict(self.run.config))

    def log(self, step: int, metrics: Mapping[str, float], images: Images) -> None:
        if images:
            self.tracker.log_images({name: [image] for name, image in images.items()}, step=step, commit=False)
        self.tracker.log(dict(metrics), step=step, commit=True)

    def finish(self, complete: bool) -> None:
        super().finish(complete)
        if self.offline:
            self.complete_until, self.folder = self.sent, ""

    def record(self) -> dict[str, Any]:
        base = {"project": self.project, "id": self.id}
        if self.offline:
            return {**base, "step": self.complete_until, "unfinished": self.folder}
        return {**base, "step": self.sent}

    def _set_killed_aside(self) -> None:
        folder = Path(self.stored.get("unfinished") or "/")
        if folder.name and folder.is_dir():
            folder.rename(folder.with_name(f"killed-{folder.name}"))


class MLflow(Backend):
    """MLflow, on a server or in local files (MLFLOW_TRACKING_URI)."""

    name = "mlflow"
    project_variable = "MLFLOW_EXPERIMENT_NAME"

    def start(self) -> None:
        import mlflow
        from accelerate.tracking import MLflowTracker

        if self.stored.get("uri") and not os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(self.stored["uri"])  # where the run is, also from another working directory
        self.uri = mlflow.get_tracking_uri()
        self.tracker = MLflowTracker(self.project, run_id=self.stored.get("id"), run_name=self.run.name)
        self.tracker.start()
        self.id = self.tracker.tracker.info.run_id
        self.held: dict[str, int] = {}  # metric -> its last step, of what the tracker held at the start
        if self.stored:
            client = mlflow.MlflowClient()
            for key in client.get_run(self.id).data.metrics:
                self.held[key] = max(metric.step for metric in client.get_metric_history(self.id, key))
        else:
            self.tracker.store_init_configuration({"stage": self.run.stage, **self.run.config})  # cannot be changed

    def log(self, step: int, metrics: Mapping[str, float], images: Images) -> None:
        import mlflow

        for name, image in images.items():
            mlflow.log_image(image, key=name, step=step)
        named = {re.sub(r"[^\w.\- /]", "_", key): value for key, value in metrics.items()}
        self.tracker.log({key: value for key, value in named.items() if step > self.held.get(key, -1)}, step=step)

    def finish(self, complete: bool) -> None:
        import mlflow

        mlflow.end_run("FINISHED" if complete else "KILLED")

    def record(self) -> dict[str, Any]:
        return {"project": self.project, "id": self.id, "step": self.sent, "uri": self.uri}


class Trackio(Backend):
    """trackio: local files (TRACKIO_DIR), or a Space of the Hugging Face Hub (TRACKIO_SPACE_ID)."""

    name = "trackio"
    project_variable = "TRACKIO_PROJECT"

    def start(self) -> None:
        from accelerate.tracking import TrackioTracker

        self.id = self.stored.get("id") or f"{self.run.name.replace('/', '-')}-{uuid.uuid4().hex[:8]}"
        self.tracker = TrackioTracker(self.project, name=self.id, resume="allow", config=dict(self.run.config))
        self.tracker.start()
        # A killed process loses what it logged in its last half second; trackio continues after what it has.
        self.sent = getattr(self.tracker.tracker, "_next_step", self.sent + 1) - 1

    def log(self, step: int, metrics: Mapping[str, float], images: Images) -> None:
        import trackio

        self.tracker.log({**metrics, **{name: trackio.Image(image) for name, image in images.items()}}, step=step)


BACKENDS: dict[TrackerName, type[Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
