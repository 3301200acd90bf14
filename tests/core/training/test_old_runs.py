"""Run folders that an older version wrote continue to the result that it would have reached.

`old_runs/<name>/stopped` is a run folder that commit 4243219 wrote until a signal stopped it; `old_runs/<name>/*` are
the models of an uninterrupted run by that commit. On the machine that wrote them, the results are equal bit for bit.
Other CPUs sum in other orders and round the last bits of float32 differently, so the comparison has a tolerance: other
instruction sets change the weights by up to 2e-7, while losing the optimizer's moments or the moving average changes
them by 5e-4 or more. The runs use no dropout, whose random bits depend on how torch was built.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from toy_stage import run

from addp_core import load_tokenizer
from addp_core.recipes.cli import main

OLD_RUNS = Path(__file__).parent / "old_runs"


def stopped_copy(name: str, out: Path) -> None:
    shutil.copytree(OLD_RUNS / name / "stopped", out)


def assert_models_match(name: str, out: Path) -> None:
    models = sorted(path.name for path in (OLD_RUNS / name).glob("*.safetensors"))
    assert sorted(path.name for path in out.glob("*.safetensors")) == models
    for model in models:
        ours, theirs = load_file(out / model), load_file(OLD_RUNS / name / model)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_run_of_the_toy_stage(tmp_path, caplog):
    stopped_copy("toy", tmp_path / "run")
    with caplog.at_level("INFO", "addp"):
        run([f"out={tmp_path / 'run'}", "dropout=0", "norm=false", "train.keep=1", "train.preview_every=0"])
    assert "continues from step 7" in caplog.text
    assert_models_match("toy", tmp_path / "run")


def test_a_run_of_addp_tokenizer(tmp_path, monkeypatch, capsys):
    """The recipe with all its keys, the data, the codebook and the moving average."""
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "images")
    stopped_copy("tokenizer", tmp_path / "run")
    assert main(["tokenizer", "run/recipe.yaml", "out=run"]) == 0
    assert "continues from step 6" in capsys.readouterr().err
    assert_models_match("tokenizer", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = load_tokenizer("run"), load_tokenizer(OLD_RUNS / "tokenizer/model.safetensors")
    assert torch.equal(ours.encode(images), theirs.encode(images))


def test_a_finished_run_is_recognized(tmp_path, monkeypatch, capsys):
    """finished.json identifies the recipe by a digest of its keys, which must not change."""
    monkeypatch.chdir(tmp_path)
    stopped_copy("tokenizer", tmp_path / "run")
    shutil.copy(OLD_RUNS / "tokenizer/model.safetensors", tmp_path / "run")
    shutil.copy(OLD_RUNS / "tokenizer/finished.json", tmp_path / "run")
    assert main(["tokenizer", "run/recipe.yaml", "out=run"]) == 0
    assert "finished" in capsys.readouterr().err


def save_images(folder: Path) -> None:
    """Write the eight images that the run was trained on: 4 x 4 squares of random colors, 16 pixels a side."""
    folder.mkdir()
    random = np.random.RandomState(0)
    for i in range(8):
        colors = random.randint(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colors.repeat(4, 0).repeat(4, 1)).save(folder / f"{i}.png")
