"""Command lines of `addp bench` in tests, and what they leave."""

import json
from pathlib import Path

DATASETS = ("imagenet", "imagenet_a", "coco", "ade20k")


def bench_command(toys: Path, out: Path, *settings: str, datasets: tuple[str, ...] = DATASETS) -> list[str]:
    """Return the arguments for every benchmark but generation, of the checkpoints a and b."""
    paths = [f"data.{name}={toys / 'toy' / name.replace('_', '-')}" for name in datasets]
    only = "bench.only=finetune,linprobe,robustness,det,seg"
    return ["bench", f"out={out}", f"models={{a: {toys / 'a'}, b: {toys / 'b'}}}", *paths, only, *settings]


def bench_json(out: Path) -> dict:
    return json.loads((out / "bench.json").read_text())


def step_entry(out: Path, name: str) -> dict:
    """Return a step's entry in bench.json."""
    return next(step for step in bench_json(out)["steps"] if step["name"] == name)


def states(out: Path) -> dict[str, str]:
    return {step["name"]: step["state"] for step in bench_json(out)["steps"]}


def set_behavior(fake: Path, **behavior: object) -> None:
    """Tell fake_addp.py what to do."""
    (fake / "behavior.json").write_text(json.dumps(behavior))


def commands_run(fake: Path, out: Path) -> list[str]:
    """Return the commands since the last call, with paths below `out`."""
    path = fake / "commands.txt"
    lines = path.read_text().replace(f"{out}/", "").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]
