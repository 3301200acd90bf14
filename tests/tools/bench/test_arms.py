"""The arms of a bench: what a checkpoint says about its pretraining."""

import json
from pathlib import Path

from tools.bench.arms import open_arms


def test_the_budget_of_intermediate_checkpoints(toys, tmp_path):
    def write_metrics(run: Path, img_s: float) -> None:
        run.mkdir(exist_ok=True)
        lines = [{"step": step, "images": 4 * step, "img_s": img_s} for step in (10, 20, 30)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write_metrics(tmp_path, 2.0)
    intermediate = tmp_path / "models" / "step-20"
    intermediate.mkdir(parents=True)
    for folder in (tmp_path, intermediate):
        (folder / "model.safetensors").write_bytes((toys / "a" / "model.safetensors").read_bytes())
    names = {"final": tmp_path, "half": intermediate, "file": tmp_path / "model.safetensors"}
    final, half, file, _ = [arm.about() for arm in open_arms({k: str(v) for k, v in names.items()}, random=True)]
    assert (final["images_seen"], final["seconds"]) == (120, 60)
    assert (half["images_seen"], half["seconds"], half["run"]) == (80, 40, str(tmp_path))
    assert file == final | {"model": str(tmp_path / "model.safetensors")}
    write_metrics(tmp_path / "tokenizer", 12.0)  # 120 images
    write_metrics(tmp_path / "predictor", 24.0)
    final, half = [arm.about() for arm in open_arms({"final": str(tmp_path), "half": str(intermediate)}, random=False)]
    assert [(arm["images_seen"], arm["seconds"]) for arm in (final, half)] == [(120, 75), (80, 55)]
