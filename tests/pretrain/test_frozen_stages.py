"""The tokenizer and the predictor that `addp pretrain` trains first: what fixes them, and what is found before they are
trained.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from slurm_commands import stand_in_for_slurm

from addp_core import load_predictor
from addp_core.recipes.cli import main

TOKENIZER = """
model: {width: 32, multipliers: [1, 1, 1], blocks: 1, codebook: 32, dim: 8}
train: {steps: 2, batch: 4, lr: 1.0e-3}
"""
PREDICTOR = """
model: {width: 16, depth: 1, heads: 2, decoder_depth: 1, decoder_heads: 2}
train: {steps: 2, batch: 4, lr: 1.0e-3}
"""
PRETRAIN = """
data: {size: 16, workers: 0}
model:
  encoder: {width: 16, depth: 1, heads: 2, tokenizer_norm: true}
  decoder: {depth: 1, heads: 2}
train: {steps: 2, batch: 4, lr: 1.0e-3, trackers: []}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with images, small recipes, and all three stages in `run`."""
    root = tmp_path_factory.mktemp("stages")
    for i in range(8):
        (root / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8)).save(root / f"photos/{i}.png")
    (root / "stages").mkdir()
    (root / "stages" / "tokenizer.yaml").write_text(TOKENIZER)
    (root / "stages" / "predictor.yaml").write_text(PREDICTOR)
    (root / "pretrain.yaml").write_text(PRETRAIN)
    assert main(pretrain(root)) == 0
    return root


@pytest.fixture
def work(root, tmp_path) -> Path:
    """A copy of `root`, which a test may change."""
    return shutil.copytree(root, tmp_path / "work")


def pretrain(root: Path, *settings: str, out: str = "run") -> list[str]:
    """Arguments of the pretraining that trains all three stages; those of `settings` count."""
    given = {"data": root / "photos", "stages": root / "stages", "out": root / out}
    given |= dict(setting.split("=", 1) for setting in settings)
    return ["pretrain", str(root / "pretrain.yaml"), *(f"{key}={value}" for key, value in given.items())]


def refusal(capsys, arguments: list[str]) -> str:
    """Return the one line that refuses a command."""
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("addp: ")]
    return line.removeprefix("addp: ")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -------------------- the recipes of stages that a later one builds on


@pytest.mark.parametrize(
    ("part", "old", "new", "change"),
    [
        ("tokenizer", "steps: 2", "steps: 3", "train.steps=3 (was 2)"),
        ("tokenizer", "lr: 1.0e-3", "lr: 2.0e-3", "train.lr=0.002 (was 0.001)"),
        ("predictor", "steps: 2", "epochs: 1", "train.epochs=1.0 (was 100.0), train.steps=None (was 2)"),
    ],
)
@pytest.mark.parametrize("settings", [[], ["train.steps=3"]], ids=["finished", "continued"])
def test_another_recipe_for_a_stage_that_is_built_on_is_refused(work, capsys, part, old, new, change, settings):
    file, folder = work / "stages" / f"{part}.yaml", work / "run" / part
    file.write_text(file.read_text().replace(old, new))
    before = content(work / "run")
    kept = f"tokenizer={work / 'run' / 'tokenizer'}" + (f" predictor={folder}" if part == "predictor" else "")
    assert refusal(capsys, pretrain(work, *settings)) == (
        f"stages: {file} is another recipe than that of {folder}, on which the next stage has been trained: {change}; "
        f"put the keys back, give {kept} to keep it, or choose another out"
    )
    assert content(work / "run") == before


def test_a_stage_is_kept_under_another_recipe_by_giving_it(work, caplog):
    file, model = work / "stages" / "tokenizer.yaml", work / "run" / "tokenizer" / "model.safetensors"
    file.write_text(file.read_text().replace("steps: 2", "steps: 3"))
    before = model.read_bytes()
    with caplog.at_level("INFO", "addp"):
        assert main(pretrain(work, f"tokenizer={model.parent}", "train.steps=3")) == 0
        assert "pretrain: continues from step 2" in caplog.text
        caplog.clear()
        file.write_text(TOKENIZER)
        assert main(pretrain(work, "train.steps=3")) == 0
    assert "this run has already finished" in caplog.text
    assert model.read_bytes() == before


def test_a_stage_that_nothing_builds_on_yet_may_be_trained_longer(work):
    for name in ("predictor", "checkpoints", "finished.json", "last_checkpoint.json"):
        path = work / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    file = work / "stages" / "tokenizer.yaml"
    file.write_text(file.read_text().replace("steps: 2", "steps: 3"))
    assert main(pretrain(work)) == 0
    assert (work / "run" / "tokenizer" / "checkpoints" / "step-3").exists()


def test_a_run_continues_without_the_recipes_of_its_finished_stages(work, caplog):
    shutil.rmtree(work / "stages")
    (work / "stages").mkdir()
    with caplog.at_level("INFO", "addp"):
        assert main(pretrain(work)) == 0
        assert "this run has already finished" in caplog.text
    assert main(pretrain(work, "train.steps=3")) == 0


# -------------------- a predictor without its tokenizer


def test_a_predictor_without_its_tokenizer_is_refused(root, tmp_path, capsys):
    predictor = root / "run" / "predictor"
    line = refusal(capsys, pretrain(root, f"predictor={predictor}", f"out={tmp_path / 'run'}"))
    assert line.startswith(f"tokenizer: found none beside predictor={predictor}; expected tokenizer=<the one that this")
    assert line.endswith(f"; its recipe says tokenizer={root / 'run' / 'tokenizer' / 'model.safetensors'}")
    line = refusal(capsys, pretrain(root, "predictor=mage.pth", f"out={tmp_path / 'run'}"))
    assert line.endswith("was trained on>, which may be in the same file")
    assert not (tmp_path / "run").exists()


# -------------------- what is found before the first stage is trained


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["init=/nowhere"], "init: /nowhere: no such file"),
        (["init={run}", "model.encoder.depth=2"], "init: {run} has encoder.depth = 1, this recipe 2"),
        (["train.layer_decay=0.7"], "train.layer_decay: found 0.7, expected null: Denoiser does not name its layers"),
        (["train.precision=fp16"], "train.precision=fp16: needs a GPU, but there is none"),
        (["train.optimizer=bnbadam"], "train.optimizer=bnbadam: CUDA required"),
    ],
)
def test_mistakes_in_the_last_stage(root, tmp_path, capsys, monkeypatch, settings, message):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = [setting.format(run=root / "run") for setting in settings]
    line = refusal(capsys, pretrain(root, *given, f"out={tmp_path / 'run'}"))
    assert line.startswith(message.format(run=root / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train: {precision: fp16}", "train.precision=fp16: needs a GPU"),
        (
            "train: {layer_decay: 0.7}",
            "train.layer_decay: found 0.7, expected null: MaskedTokenModel does not name its",
        ),
        ("train: {optimizer: bnbadam}", "train.optimizer=bnbadam: CUDA required"),
        ("train: {keep_best: knn}", "train.keep_best=knn: this run evaluates nothing"),
        ("init: /nowhere", "init: /nowhere: no such file"),
        ("init: {run}/predictor\nmodel.depth: 2", "init: {run}/predictor has depth = 1, this recipe 2"),
    ],
)
def test_mistakes_in_the_recipe_of_the_second_stage(work, tmp_path, capsys, monkeypatch, key, message):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = work / "stages" / "predictor.yaml"
    file.rename(work / "stages" / "small.yaml")
    file.write_text(f"base: small\n{key.replace('{run}', str(work / 'run'))}\n")
    line = refusal(capsys, pretrain(work, f"out={tmp_path / 'run'}"))
    assert line.startswith(f"stages: {file}, as recipe of the predictor: {message.replace('{run}', str(work / 'run'))}")
    assert not (tmp_path / "run").exists()


def test_a_batch_of_a_stage_that_the_processes_of_a_job_cannot_share(root, tmp_path, capsys, monkeypatch):
    stand_in_for_slurm(tmp_path, monkeypatch)
    job = ["launch=slurm", "slurm.nodes=3", "train.batch=6", f"out={tmp_path / 'run'}"]
    line = refusal(capsys, pretrain(root, *job))
    assert line.startswith(f"stages: {root / 'stages' / 'tokenizer.yaml'}, as recipe of the tokenizer: train.batch=4: ")
    assert "1 micro-steps x 3 processes" in line


# -------------------- initial weights whose number of heads no one states


def test_a_file_that_does_not_state_its_heads_has_those_of_the_recipe(root, tmp_path):
    torch.save({"model": load_predictor(root / "run" / "predictor").state_dict()}, tmp_path / "mage.pth")
    line = ["predictor", str(root / "stages" / "predictor.yaml"), f"data={root / 'photos'}", "data.size=16"]
    line += ["data.workers=0", f"tokenizer={root / 'run' / 'tokenizer'}", f"init={tmp_path / 'mage.pth'}"]
    assert main([*line, f"out={tmp_path / 'mage'}"]) == 0

    published = tmp_path / "addp.pth"
    assert main(["export", f"model={root / 'run'}", f"out={published}", "layout=published"]) == 0
    parts = [f"{part}={root / 'run' / part}" for part in ("tokenizer", "predictor")]
    dropout = "model.encoder.dropout=0.1"
    assert main(pretrain(root, *parts, dropout, f"init={published}", f"out={tmp_path / 'on'}")) == 0
