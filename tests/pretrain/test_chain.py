"""The three stages and generation as a user runs them: from the command line, on a folder of images, stopped and
continued, on two processes, and with the mistakes that users make."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import tiny_addp

from addp_core import load_addp, sample, save_model
from addp_core.data.sources import open_source
from addp_core.data.stream import epoch_order
from addp_core.recipes.cli import main
from addp_core.recipes.config import load_recipe
from pretrain import addp
from pretrain.frozen_stages import frozen_stage_recipe

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
def chain(tmp_path_factory) -> Path:
    """A folder with images, recipes that are small enough for tests, and the finished three stages in `run`."""
    root = tmp_path_factory.mktemp("chain")
    (root / "photos").mkdir()
    for i in range(12):
        rng = np.random.default_rng(i)
        ramp = np.linspace(rng.random(3), rng.random(3), 40)[None] * np.linspace(0.5, 1, 30)[:, None, None]
        Image.fromarray((ramp * 255).astype(np.uint8)).save(root / "photos" / f"{i}.png")
    (root / "stages").mkdir()
    (root / "stages" / "tokenizer.yaml").write_text(TOKENIZER)
    (root / "stages" / "predictor.yaml").write_text(PREDICTOR)
    (root / "pretrain.yaml").write_text(PRETRAIN)
    assert main(all_stages(root)) == 0
    return root


def data_setting(root: Path) -> list[str]:
    return [f"data={root / 'photos'}"]


def all_stages(root: Path) -> list[str]:
    """Arguments of the pretraining that trains all three stages."""
    recipe, stages, out = root / "pretrain.yaml", root / "stages", root / "run"
    return ["pretrain", str(recipe), *data_setting(root), f"stages={stages}", f"out={out}"]


def frozen_parts(root: Path) -> list[str]:
    return [f"tokenizer={root / 'run' / 'tokenizer'}", f"predictor={root / 'run' / 'predictor'}"]


def pretrain(root: Path, out: Path, *settings: str) -> list[str]:
    """Arguments of a pretraining with the frozen parts of the chain."""
    return ["pretrain", str(root / "pretrain.yaml"), *data_setting(root), *frozen_parts(root), f"out={out}", *settings]


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [value for line in lines for key, value in line.items() if key in ("loss", "train/loss")]


def same_weights(a: Path, b: Path) -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


# -------------------- the chain


def test_one_command_trains_all_three_stages(chain, capsys):
    run = chain / "run"
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
    assert main(all_stages(chain)) == 0
    assert "finished" in capsys.readouterr().err
    assert (run / "model.safetensors").stat().st_mtime_ns == before


def test_parts_that_are_given_are_not_trained_again(chain, tmp_path):
    assert main(pretrain(chain, tmp_path / "again")) == 0
    assert not (tmp_path / "again" / "tokenizer").exists()
    assert same_weights(tmp_path / "again", chain / "run")


def test_the_published_layout_feeds_pretraining(chain, tmp_path):
    published = tmp_path / "addp.pth"
    assert main(["export", f"model={chain / 'run'}", f"out={published}", "layout=published"]) == 0
    settings = [f"tokenizer={published}", f"predictor={published}", f"out={tmp_path / 'run'}"]
    assert main(["pretrain", str(chain / "pretrain.yaml"), *data_setting(chain), *settings]) == 0
    assert same_weights(tmp_path / "run", chain / "run")


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_continued_equals_never_stopped(chain, tmp_path, signal_number):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "addp_core", *pretrain(chain, out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not any((out / "checkpoints").glob("step-[4-9]")) if (out / "checkpoints").exists() else True:
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal_number)
    assert process.wait(60) == (0 if signal_number == signal.SIGTERM else -signal.SIGKILL)
    assert not (out / "model.safetensors").exists()
    assert main(pretrain(chain, out)) == 0
    assert same_weights(out, chain / "run")
    assert losses(out) == losses(chain / "run")


def test_two_processes_equal_one(chain, tmp_path):
    """With half the batch on each of two processes, the losses are the same; so is the order of the images."""
    without_dropout = [f"model.{key}=0" for key in ("encoder.dropout", "encoder.input_dropout", "decoder.dropout")]
    without_dropout.append("train.steps=12")
    assert main(pretrain(chain, tmp_path / "one", *without_dropout)) == 0
    ended = run_ranks(pretrain(chain, tmp_path / "two", *without_dropout), tmp_path / "job")
    assert ended.codes == [0, 0], ended.text
    one, two = (np.array(losses(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == 12
    assert (np.abs(one - two) / one).max() < 1e-5


def test_one_mask_ratio_per_process_gives_other_losses(chain, tmp_path):
    assert main(pretrain(chain, tmp_path / "run", "draw=process", "train.steps=2")) == 0
    assert losses(tmp_path / "run") != losses(chain / "run")[:2]


# -------------------- generation


def pixels(out: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in sorted(out.glob("0*.png"))}


@pytest.fixture(scope="module")
def generated(chain) -> dict[str, bytes]:
    assert main(generate(chain, chain / "images", "batch=3")) == 0
    assert Image.open(chain / "images" / "grid.png").size > (24, 16)
    return pixels(chain / "images")


def generate(root: Path, out: Path, *settings: str) -> list[str]:
    return ["generate", f"model={root / 'run'}", f"out={out}", "n=12", "sampling.steps=4", *settings]


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_images_do_not_depend_on_the_batch_size(chain, generated, tmp_path, batch):
    assert main(generate(chain, tmp_path / "g", f"batch={batch}")) == 0
    assert pixels(tmp_path / "g") == generated


def test_generation_continues_where_it_stopped(chain, generated, tmp_path):
    out = tmp_path / "g"
    assert main(generate(chain, out, "n=11", "batch=2")) == 0
    kept = (out / "000001.png").stat().st_mtime_ns
    (out / "000010.png").unlink()
    assert main(generate(chain, out, "batch=2")) == 0
    assert pixels(out) == generated
    assert (out / "000001.png").stat().st_mtime_ns == kept


def test_processes_share_the_work(chain, generated, tmp_path):
    ended = run_ranks(generate(chain, tmp_path / "g", "batch=2"), tmp_path / "job", launcher="torchrun")
    assert ended.codes == [0], ended.text
    assert "12 of 12 images to generate, 10 of them by this process (2 processes)" in ended.outputs[0]
    assert pixels(tmp_path / "g") == generated


def test_other_settings_need_another_folder(chain, generated, tmp_path, capsys):
    assert main(generate(chain, tmp_path / "g", "n=1")) == 0
    assert main(generate(chain, tmp_path / "g", "n=2", "seed=1")) == 2
    assert "holds images made with seed=0" in last_line(capsys)


def test_other_weights_at_the_same_path_need_another_folder(chain, tmp_path, capsys):
    save_model(tiny_addp(), tmp_path / "m.safetensors")
    arguments = ["generate", f"model={tmp_path / 'm.safetensors'}", f"out={tmp_path / 'g'}", "sampling.steps=2"]
    assert main([*arguments, "n=1"]) == 0
    save_model(tiny_addp(seed=1), tmp_path / "m.safetensors")
    assert main([*arguments, "n=2"]) == 2
    assert "made with other weights" in last_line(capsys)


# -------------------- wrong input


def refused(capsys, arguments: list[str], *fragments: str) -> None:
    """Check for exit code 2 and one line of error that contains these texts."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("addp: ")]
    assert len(lines) == 1, lines
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


def test_folders_without_images(chain, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    for folder, message in (("empty", "holds no files"), ("texts", "1 .txt")):
        arguments = ["pretrain", "tiny", f"data={tmp_path / folder}", f"out={tmp_path / 'run'}"]
        refused(capsys, arguments, "data.source", str(tmp_path / folder), message, ".jpg")


def test_truncated_images_beyond_the_limit(chain, tmp_path, capsys):
    for i in range(8):
        path = tmp_path / f"{i}.jpg"
        Image.effect_noise((40, 40), 50).convert("RGB").save(path)
        if i < 4:
            path.write_bytes(path.read_bytes()[:300])
    arguments = [*pretrain(chain, tmp_path / "run"), f"data={tmp_path}", "data.max_errors=2"]
    arguments.remove(*data_setting(chain))
    refused(capsys, arguments, "data.max_errors", "2 tolerated", ".jpg")


def test_an_image_that_cannot_be_read_costs_no_step(chain, tmp_path, capsys):
    """The run ends with a checkpoint, and continues as if nothing had been, once the image is mended."""
    shutil.copytree(chain / "photos", tmp_path / "photos")
    source = open_source(str(tmp_path / "photos"))
    broken = Path(source.name(int(epoch_order(len(source), 0, 0)[-1])))  # of the third batch
    content = broken.read_bytes()

    def arguments(out: str) -> list[str]:
        settings = (f"data={tmp_path / 'photos'}", "train.checkpoint_every=0", "data.max_errors=0")
        return pretrain(chain, tmp_path / out, *settings)

    assert main(arguments("whole")) == 0
    broken.write_bytes(content[: len(content) // 2])
    refused(capsys, arguments("run"), "data.max_errors", broken.name)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    broken.write_bytes(content)
    assert main(arguments("run")) == 0
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_misspelt_key(chain, tmp_path, capsys):
    refused(capsys, pretrain(chain, tmp_path / "run", "train.bacth=3"), "train.bacth", "did you mean 'train.batch'")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_method(chain, tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    recipe, settings = chain / "stages" / "predictor.yaml", [f"tokenizer={tmp_path / 'resnet.pth'}"]
    arguments = ["predictor", str(recipe), *data_setting(chain), *settings, f"out={tmp_path / 'r'}"]
    refused(capsys, arguments, "resnet.pth", "ResNet", "expected")
    arguments = pretrain(chain, tmp_path / "run")
    arguments[-2] = f"predictor={chain / 'run' / 'tokenizer'}"
    refused(capsys, arguments, "this is a VQGAN checkpoint: pass it as tokenizer=", "expected a MAGE checkpoint")


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle(chain, tmp_path, capsys):
    torch.save({"model": Hostile(tmp_path / "trap")}, tmp_path / "evil.pth")
    arguments = ["generate", f"model={tmp_path / 'evil.pth'}", f"out={tmp_path / 'images'}"]
    refused(capsys, arguments, "evil.pth", "refused", "mkdir")
    assert not (tmp_path / "trap").exists()


def test_an_output_folder_that_cannot_be_written(chain, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    refused(capsys, pretrain(chain, tmp_path / "file" / "run"), str(tmp_path / "file" / "run"))
    refused(capsys, generate(chain, tmp_path / "file" / "run"), "out", "cannot be written")


def test_a_loss_that_turns_nan(chain, tmp_path, capsys):
    settings = {"lr": 1e30, "clip_grad": "null", "max_nonfinite": 2, "steps": 20, "warmup_steps": 0}
    arguments = pretrain(chain, tmp_path / "run", *(f"train.{key}={value}" for key, value in settings.items()))
    refused(capsys, arguments, "step", "nan", "lr")


def test_sizes_and_parts_that_do_not_fit(chain, tmp_path, capsys):
    refused(capsys, pretrain(chain, tmp_path / "a", "data.size=[18,24]"), "data.size", "stride 4")
    save_model(tiny_addp(), tmp_path / "other.safetensors")
    arguments = pretrain(chain, tmp_path / "b")
    arguments[-2] = f"predictor={tmp_path / 'other.safetensors'}"
    refused(capsys, arguments, "predicts 24 codes", "has 32")


def test_heads_are_checked_before_anything_is_trained(chain, tmp_path, capsys):
    refused(capsys, pretrain(chain, tmp_path / "run", "model.encoder.heads=5"), "model.encoder", "found 5", "width 16")
    refused(capsys, pretrain(chain, tmp_path / "run", "model.decoder.heads=3"), "model.decoder.heads", "found 3")


def test_frozen_parts_may_not_change_under_a_run(chain, tmp_path, capsys):
    other = tmp_path / "tokenizer"
    recipe = chain / "stages" / "tokenizer.yaml"
    stage = ["tokenizer", str(recipe), *data_setting(chain), "data.size=[16,24]", f"out={other}"]
    assert main([*stage, "train.steps=2"]) == 0
    arguments = pretrain(chain, tmp_path / "run")
    arguments[3] = f"tokenizer={other}"
    refused(capsys, arguments, "was trained on another tokenizer")

    save_model(load_addp(chain / "run").predictor, tmp_path / "p.safetensors", grid=(4, 6))
    arguments[4] = f"predictor={tmp_path / 'p.safetensors'}"
    assert main([*arguments, "train.steps=2"]) == 0
    assert main([*stage, "train.steps=4"]) == 0
    refused(capsys, [*arguments, "train.steps=4"], "other weights in its frozen parts")


def test_missing_parts_say_where_they_are_published(chain, tmp_path, capsys):
    arguments = ["pretrain", str(chain / "pretrain.yaml"), *data_setting(chain), f"out={tmp_path / 'run'}"]
    refused(capsys, arguments, "tokenizer: not given", "vqgan_jax_strongaug.ckpt", "stages=tiny")
    refused(capsys, [*arguments, "stages=tinny"], "did you mean 'tiny'")


def test_export_names(chain, tmp_path, capsys):
    refused(capsys, ["export", f"model={chain / 'run'}", f"out={tmp_path / 'm.pth'}"], "ends in .safetensors")


def test_unused_ids_reach_the_model(chain, tmp_path):
    """ADDP predicts over the vocabulary that the predictor was trained with."""
    predictor = [
        "predictor",
        str(chain / "stages" / "predictor.yaml"),
        *data_setting(chain),
        f"tokenizer={chain / 'run' / 'tokenizer'}",
    ]
    settings = ["data.size=[16,24]", "data.workers=0", "train.steps=1", "unused_ids=2"]
    assert main([*predictor, *settings, f"out={tmp_path / 'predictor'}"]) == 0
    pretrain = ["pretrain", str(chain / "pretrain.yaml"), *data_setting(chain), "train.steps=1"]
    parts = [f"tokenizer={chain / 'run' / 'tokenizer'}", f"predictor={tmp_path / 'predictor'}"]
    assert main([*pretrain, *parts, f"out={tmp_path / 'run'}"]) == 0
    vocabulary = load_addp(tmp_path / "run").config.vocabulary
    assert (vocabulary.size, vocabulary.class_id, vocabulary.mask_id) == (32 + 2 + 1, 33, 34)
    assert load_addp(chain / "run").config.vocabulary.size == 32 + 1000 + 1


def test_the_stages_that_are_trained_first_have_the_trackers(chain):
    trackers = ["train.trackers=[wandb,tensorboard]", "train.tracker_project=photos"]
    recipe = load_recipe(addp, all_stages(chain)[1], [*all_stages(chain)[2:], *trackers])
    for part in ("tokenizer", "predictor"):
        stage = frozen_stage_recipe(recipe, part, out="out", **({"tokenizer": ""} if part == "predictor" else {}))
        assert stage.train.tracking == (("wandb", "tensorboard"), "photos")
        assert stage.train.steps == 6


# -------------------- the weights of a file to start from

# the weights stay as they begin
STILL = ["train.steps=1", "train.lr=1.0e-9", "train.min_lr=0", "train.weight_decay=0"]


def same_values(a: Path, b: Path, prefix: str = "") -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    names = [name for name in first if name.startswith(prefix) and "pos_embed" not in name]
    return bool(names) and all(torch.allclose(first[name], second[name], atol=1e-6) for name in names)


@pytest.mark.parametrize("size", ["[16,24]", "[24,24]"])
def test_pretraining_starts_from_the_weights_of_a_run(chain, tmp_path, size):
    assert main([*pretrain(chain, tmp_path / "on", f"init={chain / 'run'}", f"data.size={size}"), *STILL]) == 0
    assert same_values(tmp_path / "on", chain / "run", "denoiser.encoder.blocks.")
    assert main([*pretrain(chain, tmp_path / "anew"), *STILL]) == 0
    assert not same_values(tmp_path / "anew", chain / "run", "denoiser.encoder.blocks.")


def test_the_predictor_starts_from_the_weights_of_a_run(chain, tmp_path):
    predictor, tokenizer = chain / "run" / "predictor", chain / "run" / "tokenizer"
    line = ["predictor", str(chain / "stages" / "predictor.yaml"), *data_setting(chain), "data.size=[16,24]", *STILL]
    assert main([*line, f"tokenizer={tokenizer}", f"out={tmp_path / 'mage'}", f"init={predictor}"]) == 0
    assert same_values(tmp_path / "mage", predictor)


def test_another_tokenizer_than_that_of_the_initial_weights_is_named(chain, tmp_path, caplog):
    anew = ["tokenizer", str(chain / "stages" / "tokenizer.yaml"), *data_setting(chain), "data.size=[16,24]"]
    assert main([*anew, "train.seed=1", f"out={tmp_path / 'tokenizer'}"]) == 0
    line = ["predictor", str(chain / "stages" / "predictor.yaml"), *data_setting(chain), "data.size=[16,24]", *STILL]
    line += [f"tokenizer={tmp_path / 'tokenizer'}", f"out={tmp_path / 'mage'}"]
    assert main([*line, f"init={chain / 'run' / 'predictor'}"]) == 0
    assert "was trained on the ids of another tokenizer" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.encoder.heads=4", "init: {run} has encoder.heads = 2, this recipe 4; expected the same architecture"),
        ("model.decoder.depth=2", "init: {run} has decoder.depth = 1, this recipe 2; expected the same architecture"),
        ("process.ids_to=none", "init: {run}: decoder."),
    ],
)
def test_a_file_of_another_architecture_is_refused(chain, tmp_path, capsys, setting, message):
    assert main(pretrain(chain, tmp_path / "run", f"init={chain / 'run'}", setting)) == 2
    assert message.format(run=chain / "run") in capsys.readouterr().err
