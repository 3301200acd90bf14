"""Stands in for `addp` in tests of the bench: leaves the files that the verbs leave, in no time.

The folder in the environment variable FAKE_ADDP says what it is to do (behavior.json) and collects the commands that it
was called with (commands.txt).
"""

import json
import os
import sys
import time
from pathlib import Path

import yaml

SCORES = {
    "last": {"top1": 50.0},
    "best": {"top1": 40.0, "knn": 35.0},
    "classes": 10,
    "box_AP": 0.25,
    "mask_AP": 0.2,
    "mIoU": 30.0,
    "constant_mIoU": 4.0,
}


def main() -> None:
    verb, *arguments = sys.argv[1:]
    keys = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    recipe = yaml.safe_load(Path(arguments[0]).read_text()) if verb == "sweep" else {}
    out = Path(recipe.get("out") or keys["out"])
    folder = Path(os.environ["FAKE_ADDP"])
    with (folder / "commands.txt").open("a") as file:
        file.write(f"{verb} {out}\n")
    behavior = json.loads((folder / "behavior.json").read_text()) if (folder / "behavior.json").exists() else {}
    behave(behavior, folder, out)
    if verb == "sweep":
        sweep(recipe, out, behavior.get("notes", []))
    elif verb in ("tokenizer", "predictor", "pretrain"):
        assert all(Path(keys[part]).is_dir() for part in ("tokenizer", "predictor") if part in keys)
        out.mkdir(parents=True, exist_ok=True)
    elif verb == "robustness":
        assert Path(keys["model"], "results.json").exists()
        out.mkdir()
        rows = [{"key": "imagenet_a", "classes": 6, "score": 20.0}, {"key": "imagenet_c", "classes": 10, "score": 10.0}]
        (out / "results.json").write_text(json.dumps({"rows": rows, "average": None}))


def behave(behavior: dict[str, str], folder: Path, out: Path) -> None:
    """Fail, wait to be killed, or wait for another such process, if `out` contains the text of that key."""
    if "fail" in behavior and behavior["fail"] in str(out):
        sys.exit("addp: nothing works today")
    if "hang" in behavior and behavior["hang"] in str(out):
        (folder / "hangs").touch()
        time.sleep(60)
    if "meet" in behavior and behavior["meet"] in str(out):
        (folder / f"here-{out.name}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
        while len(list(folder.glob("here-*"))) < 2:
            time.sleep(0.05)
        print("both are here")  # noqa: T201


def sweep(recipe: dict, out: Path, notes: list[str]) -> None:
    (arm,) = recipe["arms"]
    for seed in recipe["seeds"]:
        run = out / arm / f"run-{seed}"
        run.mkdir(parents=True, exist_ok=True)
        (run / "results.json").write_text(json.dumps(SCORES))
        if not (out / arm / f"best-seed{seed}").exists():
            (out / arm / f"best-seed{seed}").symlink_to(run.name)
    setting = {key: values[0] for key, values in recipe["grid"].items()}
    row = {"setting": setting, "grid": {}, "notes": notes}
    (out / "sweep.json").write_text(json.dumps({"arms": {arm: row}}))


if __name__ == "__main__":
    main()
