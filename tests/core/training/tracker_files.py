"""What each tracker has written to the disk: the steps of every metric and image, by the names that it shows."""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Steps = dict[str, list[int]]  # name of a metric or image -> its steps


def read_tensorboard(folder: Path) -> Steps:
    """Read <out>/tb as TensorBoard does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run/tb"), size_guidance={"images": 0, "scalars": 0}).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    images = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert "| train.steps | 12 |" in events.Tensors("recipe/text_summary")[-1].tensor_proto.string_val[0].decode()
    return steps | images


def read_wandb(folder: Path) -> Steps:
    """Read the folders that `wandb sync` would upload, in the order of their start."""
    from wandb.proto import wandb_internal_pb2 as protocol

    steps: Steps = defaultdict(list)
    ids, config = set(), set()
    for path in sorted((folder / "run/wandb").glob("offline-run-*/*.wandb")):
        for content in _wandb_records(path.read_bytes()):
            record = protocol.Record()
            record.ParseFromString(content)
            for item in record.run.config.update if record.HasField("run") else record.config.update:
                config.add((item.nested_key[0] if item.nested_key else item.key, item.value_json))
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                names = {item.key or item.nested_key[0] for item in record.history.item}
                for name in names:
                    steps[name].append(record.history.step.num)
    assert len(ids) == 1
    assert ("train.steps", "12") in config
    return {name: values for name, values in steps.items() if not name.startswith("_")}


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file, which has LevelDB's log format after a header of seven bytes."""
    position, record = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


def read_mlflow(folder: Path, uri: str) -> Steps:
    """Read the one run of the experiment."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    [experiment] = [found for found in client.search_experiments() if found.name == "a project"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params["train.steps"] == "12"
    assert run.info.status == "FINISHED"
    steps = {
        key: [metric.step for metric in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics
    }
    files = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images") if "png" in file.path]
    images: Steps = defaultdict(list)
    for name, _, step, *_ in (file.split("+") for file in sorted(files)):
        images[name.replace("~", "/")].append(int(step))
    return steps | {name: sorted(values) for name, values in images.items()}


def read_trackio(folder: Path) -> Steps:
    """Read the one run of the project."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    [run] = trackio.Api().runs("a project")
    assert run.config is not None
    assert run.config["train.steps"] == 12
    steps: Steps = defaultdict(list)
    for line in SQLiteStorage.get_logs("a project", run.name, run_id=run.id):
        for name in line:
            steps[name].append(line["step"])
    return steps


def recorded(out: Path) -> Steps:
    """Return the same from metrics.jsonl and images/."""
    steps: Steps = defaultdict(list)
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        group = "train" if "img_s" in line else "evaluate"
        for name in line:
            steps[f"{group}/{name}"].append(line["step"])
    for path in sorted((out / "images").glob("noise-*.png")):
        steps["images/noise"].append(int(path.stem.rpartition("-")[2]))
    steps["images/noise"].sort()
    return {name: values for name, values in steps.items() if not name.endswith("/step")}
