"""The three stages and generation as a user runs them: by the command line, on a folder of pictures, stopped and
continued, on two processes, and with every mistake a user makes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_addp

from addp_core import load_addp, sample, save_model
from addp_core.recipes.cli import main

TOKENIZER = """
model: {width: 32, multipliers: [1, 1, 1], blocks: 1, codebook: 32, dim: 8}
train: {steps: 6, batch: 4, lr: 1.0e-3, log_every: 2, checkpoint_every: 3}
"""
PREDICTOR = """
model: {width: 16, depth: 1, heads: 2, decoder_depth: 1, decoder_heads: 2}
train: {steps: 6, batch: 4, lr: 1.0e-3, log_every: 2, checkpoint_every: 3}
"""
PRETRAIN = """
data: {size: [16, 24], workers: 0}
model:
  encoder: {width: 16, depth: 2, heads: 2, dropout: 0.1, input_dropout: 0.1, tokenizer_norm: true}
  decoder: {depth: 1, heads: 2, dropout: 0.1}
train: {steps: 10, batch: 4, lr: 1.0e-3, log_every: 1, checkpoint_every: 2}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder of pictures, recipes small enough for tests, and a finished chain in `run`."""
    root = tmp_path_factory.mktemp("workshop")
    (root / "pictures").mkdir()
    for i in range(12):
        rng = np.random.default_rng(i)
        ramp = np.linspace(rng.random(3), rng.random(3), 40)[None] * np.linspace(0.5, 1, 30)[:, None, None]
        Image.fromarray((ramp * 255).astype(np.uint8)).save(root / "pictures" / f"{i}.png")
    (root / "stages").mkdir()
    (root / "stages" / "tokenizer.yaml").write_text(TOKENIZER)
    (root / "stages" / "predictor.yaml").write_text(PREDICTOR)
    (root / "pretrain.yaml").write_text(PRETRAIN)
    assert (
        main(["pretrain", str(root / "pretrain.yaml"), *data(root), f"stages={root / 'stages'}", f"out={root / 'run'}"])
        == 0
    )
    return root


def data(root: Path) -> list[str]:
    return [f"data={root / 'pictures'}"]


def parts(root: Path) -> list[str]:
    return [f"tokenizer={root / 'run' / 'tokenizer'}", f"predictor={root / 'run' / 'predictor'}"]


def pretrain(root: Path, out: Path, *settings: str) -> list[str]:
    """Arguments of a pretraining over the workshop's frozen parts."""
    return ["pretrain", str(root / "pretrain.yaml"), *data(root), *parts(root), f"out={out}", *settings]


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [value for line in lines for key, value in line.items() if key in ("loss", "train/loss")]


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


# -------------------- the chain


def test_one_command_trains_all_three_stages(workshop, capsys):
    run = workshop / "run"
    for folder in (run, run / "tokenizer", run / "predictor"):
        assert {"recipe.yaml", "metrics.jsonl", "images", "checkpoints", "model.safetensors"} <= {
            p.name for p in folder.iterdir()
        }
        assert any((folder / "images").glob("*.png"))
    model = load_addp(run)
    assert model.config.image_size == (16, 24)
    assert model.config.grid == (4, 6)
    assert sample(model, 2, steps=2).shape == (2, 3, 16, 24)
    assert len(losses(run)) == 10
    before = (run / "model.safetensors").stat().st_mtime_ns
    arguments = [
        "pretrain",
        str(workshop / "pretrain.yaml"),
        *data(workshop),
        f"stages={workshop / 'stages'}",
        f"out={run}",
    ]
    assert main(arguments) == 0
    assert "finished" in capsys.readouterr().err
    assert (run / "model.safetensors").stat().st_mtime_ns == before


def test_given_parts_are_not_trained_again(workshop, tmp_path):
    assert main(pretrain(workshop, tmp_path / "again")) == 0
    assert not (tmp_path / "again" / "tokenizer").exists()
    assert same_weights(tmp_path / "again", workshop / "run")


def test_the_published_layout_feeds_pretraining(workshop, tmp_path):
    published = tmp_path / "addp.pth"
    assert main(["export", f"model={workshop / 'run'}", f"out={published}", "layout=published"]) == 0
    given = [f"tokenizer={published}", f"predictor={published}"]
    assert main(["pretrain", str(workshop / "pretrain.yaml"), *data(workshop), *given, f"out={tmp_path / 'run'}"]) == 0
    assert same_weights(tmp_path / "run", workshop / "run")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_continued_equals_never_stopped(workshop, tmp_path, how):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "addp_core", *pretrain(workshop, out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not any((out / "checkpoints").glob("step-[4-9]")) if (out / "checkpoints").exists() else True:
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.002)
    process.send_signal(how)
    assert process.wait(60) == (0 if how == signal.SIGTERM else -signal.SIGKILL)
    assert not (out / "model.safetensors").exists()
    assert main(pretrain(workshop, out)) == 0
    assert same_weights(out, workshop / "run")
    assert losses(out) == losses(workshop / "run")


def torchrun(*arguments: str) -> str:
    """Run on two processes; what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run([*command, "-m", "addp_core", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_two_processes_equal_one(workshop, tmp_path):
    """Half the batch on each of two processes: the same loss curve (the data order is always the same)."""
    calm = [f"model.{key}=0" for key in ("encoder.dropout", "encoder.input_dropout", "decoder.dropout")]
    calm.append("train.steps=12")
    assert main(pretrain(workshop, tmp_path / "one", *calm)) == 0
    torchrun(*pretrain(workshop, tmp_path / "two", *calm))
    one, two = (np.array(losses(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == 12
    assert (np.abs(one - two) / one).max() < 1e-5


def test_one_mask_ratio_a_process_is_the_published_way(workshop, tmp_path):
    assert main(pretrain(workshop, tmp_path / "run", "draw=process", "train.steps=2")) == 0
    assert losses(tmp_path / "run") != losses(workshop / "run")[:2]


# -------------------- generation


def pixels(out: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in sorted(out.glob("0*.png"))}


@pytest.fixture(scope="module")
def generated(workshop) -> dict[str, bytes]:
    assert (
        main(
            [
                "generate",
                f"model={workshop / 'run'}",
                f"out={workshop / 'images'}",
                "n=7",
                "batch=3",
                "sampling.steps=4",
            ]
        )
        == 0
    )
    assert Image.open(workshop / "images" / "grid.png").size > (24, 16)
    return pixels(workshop / "images")


def generate(root: Path, out: Path, *settings: str) -> list[str]:
    return ["generate", f"model={root / 'run'}", f"out={out}", "n=7", "sampling.steps=4", *settings]


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_images_do_not_depend_on_the_batch_size(workshop, generated, tmp_path, batch):
    assert main(generate(workshop, tmp_path / "g", f"batch={batch}")) == 0
    assert pixels(tmp_path / "g") == generated


def test_generation_continues_where_it_stopped(workshop, generated, tmp_path):
    out = tmp_path / "g"
    assert main(generate(workshop, out, "n=3", "batch=2")) == 0
    kept = (out / "000001.png").stat().st_mtime_ns
    (out / "000002.png").unlink()
    assert main(generate(workshop, out, "batch=2")) == 0
    assert pixels(out) == generated
    assert (out / "000001.png").stat().st_mtime_ns == kept


def test_processes_share_the_work(workshop, generated, tmp_path):
    said = torchrun(*generate(workshop, tmp_path / "g", "batch=2"))
    assert "7 images to make of 7, 4 of them on this of 2 processes" in said
    assert pixels(tmp_path / "g") == generated


def test_other_settings_need_another_folder(workshop, generated, tmp_path, capsys):
    assert main(generate(workshop, tmp_path / "g", "n=1")) == 0
    assert main(generate(workshop, tmp_path / "g", "n=2", "seed=1")) == 2
    assert "holds images made with seed=0" in last_line(capsys)


def test_other_weights_at_the_same_path_need_another_folder(workshop, tmp_path, capsys):
    save_model(tiny_addp(), tmp_path / "m.safetensors")
    arguments = ["generate", f"model={tmp_path / 'm.safetensors'}", f"out={tmp_path / 'g'}", "sampling.steps=2"]
    assert main([*arguments, "n=1"]) == 0
    save_model(tiny_addp(seed=1), tmp_path / "m.safetensors")
    assert main([*arguments, "n=2"]) == 2
    assert "made with other weights" in last_line(capsys)


# -------------------- wrong input


def wrong(capsys, arguments: list[str], *words: str) -> None:
    """Exit code 2 and one line that says these words."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("addp: ")]
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]


def test_folders_without_images(workshop, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    for folder, words in (("empty", "holds no file at all"), ("texts", "1 .txt")):
        arguments = ["pretrain", "tiny", f"data={tmp_path / folder}", f"out={tmp_path / 'run'}"]
        wrong(capsys, arguments, "data.source", str(tmp_path / folder), words, ".jpg")


def test_truncated_images_beyond_the_limit(workshop, tmp_path, capsys):
    for i in range(8):
        path = tmp_path / f"{i}.jpg"
        Image.effect_noise((40, 40), 50).convert("RGB").save(path)
        if i < 4:
            path.write_bytes(path.read_bytes()[:300])
    arguments = [*pretrain(workshop, tmp_path / "run"), f"data={tmp_path}", "data.max_errors=2"]
    arguments.remove(*data(workshop))
    wrong(capsys, arguments, "data.max_errors", "2 tolerated", ".jpg")


def test_a_misspelt_key(workshop, tmp_path, capsys):
    wrong(capsys, pretrain(workshop, tmp_path / "run", "train.bacth=3"), "train.bacth", "did you mean 'train.batch'")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_method(workshop, tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    settings = [f"tokenizer={tmp_path / 'resnet.pth'}"]
    arguments = [
        "predictor",
        str(workshop / "stages" / "predictor.yaml"),
        *data(workshop),
        *settings,
        f"out={tmp_path / 'r'}",
    ]
    wrong(capsys, arguments, "resnet.pth", "ResNet", "expected")
    arguments = pretrain(workshop, tmp_path / "run")
    arguments[-2] = f"predictor={workshop / 'run' / 'tokenizer'}"
    wrong(capsys, arguments, "this is a VQGAN checkpoint: pass it as tokenizer=", "expected a MAGE checkpoint")


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle(workshop, tmp_path, capsys):
    torch.save({"model": Hostile(tmp_path / "trap")}, tmp_path / "evil.pth")
    arguments = ["generate", f"model={tmp_path / 'evil.pth'}", f"out={tmp_path / 'images'}"]
    wrong(capsys, arguments, "evil.pth", "refused", "mkdir")
    assert not (tmp_path / "trap").exists()


def test_an_output_folder_that_cannot_be_written(workshop, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    wrong(capsys, pretrain(workshop, tmp_path / "file" / "run"), str(tmp_path / "file" / "run"))
    wrong(capsys, generate(workshop, tmp_path / "file" / "run"), "out", "cannot be written")


def test_a_loss_that_turns_nan(workshop, tmp_path, capsys):
    settings = [
        "train.lr=1e30",
        "train.clip_grad=null",
        "train.max_nonfinite=2",
        "train.steps=20",
        "train.warmup_steps=0",
    ]
    wrong(capsys, pretrain(workshop, tmp_path / "run", *settings), "step", "nan", "lr")


def test_sizes_and_parts_that_do_not_fit(workshop, tmp_path, capsys):
    wrong(capsys, pretrain(workshop, tmp_path / "a", "data.size=[18,24]"), "data.size", "stride 4")
    save_model(tiny_addp(), tmp_path / "other.safetensors")
    arguments = pretrain(workshop, tmp_path / "b")
    arguments[-2] = f"predictor={tmp_path / 'other.safetensors'}"
    wrong(capsys, arguments, "predicts 24 codes", "has 32")


def test_heads_are_checked_before_anything_is_trained(workshop, tmp_path, capsys):
    wrong(capsys, pretrain(workshop, tmp_path / "run", "model.encoder.heads=5"), "model.encoder", "found 5", "width 16")
    wrong(capsys, pretrain(workshop, tmp_path / "run", "model.decoder.heads=3"), "model.decoder.heads", "found 3")


def test_frozen_parts_may_not_change_under_a_run(workshop, tmp_path, capsys):
    other = tmp_path / "tokenizer"
    stage = [
        "tokenizer",
        str(workshop / "stages" / "tokenizer.yaml"),
        *data(workshop),
        "data.size=[16,24]",
        f"out={other}",
    ]
    assert main([*stage, "train.steps=2"]) == 0
    arguments = pretrain(workshop, tmp_path / "run")
    arguments[3] = f"tokenizer={other}"
    wrong(capsys, arguments, "was trained on another tokenizer")

    save_model(load_addp(workshop / "run").predictor, tmp_path / "p.safetensors", grid=(4, 6))
    arguments[4] = f"predictor={tmp_path / 'p.safetensors'}"
    assert main([*arguments, "train.steps=2"]) == 0
    assert main([*stage, "train.steps=4"]) == 0
    wrong(capsys, [*arguments, "train.steps=4"], "other weights in its frozen parts")


def test_missing_parts_say_where_they_are_published(workshop, tmp_path, capsys):
    arguments = ["pretrain", str(workshop / "pretrain.yaml"), *data(workshop), f"out={tmp_path / 'run'}"]
    wrong(capsys, arguments, "tokenizer: not given", "vqgan_jax_strongaug.ckpt", "stages=tiny")
    wrong(capsys, [*arguments, "stages=tinny"], "did you mean 'tiny'")


def test_export_names(workshop, tmp_path, capsys):
    wrong(capsys, ["export", f"model={workshop / 'run'}", f"out={tmp_path / 'm.pth'}"], "ends in .safetensors")


def test_unused_ids_reach_the_model(workshop, tmp_path):
    """The vocabulary that the predictor is trained with is the one that ADDP predicts over."""
    predictor = [
        "predictor",
        str(workshop / "stages" / "predictor.yaml"),
        *data(workshop),
        f"tokenizer={workshop / 'run' / 'tokenizer'}",
    ]
    given = ["data.size=[16,24]", "data.workers=0", "train.steps=1", "unused_ids=2"]
    assert main([*predictor, *given, f"out={tmp_path / 'predictor'}"]) == 0
    pretrain = ["pretrain", str(workshop / "pretrain.yaml"), *data(workshop), "train.steps=1"]
    parts = [f"tokenizer={workshop / 'run' / 'tokenizer'}", f"predictor={tmp_path / 'predictor'}"]
    assert main([*pretrain, *parts, f"out={tmp_path / 'run'}"]) == 0
    vocabulary = load_addp(tmp_path / "run").config.vocabulary
    assert (vocabulary.size, vocabulary.class_id, vocabulary.mask_id) == (32 + 2 + 1, 33, 34)
    assert load_addp(workshop / "run").config.vocabulary.size == 32 + 1000 + 1
