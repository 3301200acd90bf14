"""`addp seg train`: what a run writes, its settings, and the errors in them."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import assert_ends, run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_segmentation import CLASSES, STEPS, train_command, user_error

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from addp_core.base.rng import generator
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main
from addp_core.recipes.config import load
from addp_core.weights.saving import save_model
from seg import train as seg_train
from seg.mmseg_config import fill_model, read_base_config, read_config
from seg.scenes import find_pairs
from seg.segmentor import load_segmentor


def test_a_run_writes_its_folder(trained_run, scenes, encoder_file, capsys):
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert max(line["lr"] for line in lines if "loss" in line) == 1e-3  # after a warm-up of one step
    assert {"mIoU", "aAcc", "mAcc", "constant_mIoU"} <= lines[-1].keys()
    assert (trained_run / "checkpoints" / f"step-{STEPS}" / "training.pt").exists()
    events = EventAccumulator(str(trained_run / "tb")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Scalars("evaluate/mIoU")[-1].value == pytest.approx(lines[-1]["mIoU"])
    assert main(train_command(scenes, encoder_file, trained_run)) == 0
    assert "has already finished" in capsys.readouterr().err


def test_gradient_accumulation_from_random_initialization(scenes, encoder_file, tmp_path, capsys):
    out = tmp_path / "run"
    settings = ["init=random", "relative=none", "out_indices=[3]", "train.accumulate=2", "train.steps=2"]
    settings += ["train.warmup_steps=9", "train.clip_grad=1"]
    assert main(train_command(scenes, encoder_file, out, *settings)) == 0
    assert "the warm-up (9 steps) is not shorter than the run (2 steps)" in capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    state = load_file(out / "model.safetensors")
    assert "backbone.encoder.cls_token" in state
    assert not any("relative" in name for name in state)


def test_how_training_varies_the_images(scenes, encoder_file, tmp_path, capsys):
    def transforms(*settings: str) -> dict:
        command = train_command(scenes, encoder_file, tmp_path / "run", *settings)
        cfg = read_config("upernet_addp-tiny_500_ade20k-512x512")
        recipe = seg_train.resolve(load(seg_train.Recipe, None, command[2:]), cfg)
        seg_train.fill_config(cfg, recipe, seg_train.describe_segmentor(recipe, cfg, ("thing", "other")))
        return {transform.type: transform for transform in cfg.train_dataloader.dataset.pipeline}

    default, changed = transforms(), transforms("data.jitter=[0.8,1.25]", "data.flip=false")
    paper = {each.type: each for each in read_base_config().train_dataloader.dataset.pipeline}
    for key, name in (("ratio_range", "RandomResize"), ("prob", "RandomFlip")):
        assert default[name][key] == paper[name][key]
    assert (changed["RandomResize"].ratio_range, changed["RandomFlip"].prob) == ((0.8, 1.25), 0.0)
    command = train_command(scenes, encoder_file, tmp_path / "wrong", "data.jitter=[2,1]")
    assert "data.jitter: found [2.0, 1.0], expected the smaller factor first" in user_error(capsys, *command)


def test_the_model_file_keeps_the_norms_of_its_initialization(scenes, tmp_path, capsys):
    """CLIP's norm after the patches, and BEiT's normalization of images, are part of the segmentor's file."""
    torch.manual_seed(0)
    clip, out = tmp_path / "clip.safetensors", tmp_path / "run"
    save_model(Encoder(EncoderConfig(16, 4, 2, tokenizer_norm=True, pre_norm=True), (32, 32), patch_size=8), clip)
    assert main(train_command(scenes, clip, out, "train.steps=2", "normalisation=half")) == 0
    assert "backbone.encoder.tokenizer_norm.weight" in load_file(out / "model.safetensors")
    segmentor, _ = load_segmentor(out)
    assert (segmentor.tokenizer_norm, segmentor.normalisation) == (True, "half")
    cfg = read_base_config()
    fill_model(cfg, segmentor)
    assert cfg.model.data_preprocessor.mean == cfg.model.data_preprocessor.std == [127.5] * 3
    arguments = ["seg", "test", f"model={out}", f"data={scenes}", f"out={tmp_path}", "data.workers=0"]
    assert main(arguments) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["aAcc"] == pytest.approx(last["aAcc"], abs=0.011)

    random_recipe = load(seg_train.Recipe, None, train_command(scenes, clip, out, "init=random")[2:])
    cfg = read_config(random_recipe.config)
    resolved = seg_train.resolve(random_recipe, cfg)
    assert seg_train.describe_segmentor(resolved, cfg, ("thing", "other")).tokenizer_norm


def test_the_model_file_keeps_the_scales_of_its_pyramid(scenes, encoder_file, tmp_path, capsys):
    out = tmp_path / "run"
    settings = ["config=upernet_addp-tiny-wide_1k_ade20k-512x512", "train.steps=2"]
    assert main(train_command(scenes, encoder_file, out, *settings)) == 0
    segmentor, state = load_segmentor(out)
    assert segmentor.rescales == (2, 1, 0.5, 0.25)
    assert not any(name.startswith("neck.upsample_4x") for name in state)
    assert main(["seg", "test", f"model={out}", f"data={scenes}", f"out={tmp_path}", "data.workers=0"]) == 0
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads((tmp_path / "metrics.json").read_text())["aAcc"] == pytest.approx(last["aAcc"], abs=0.011)


def without_key(text: str, key: str) -> str:
    """Remove a key at the top level of a recipe's YAML."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f"{key}:"))


def test_another_length_of_a_run_is_refused_before_its_recipe_is_written(
    scenes, trained_run, encoder_file, tmp_path, capsys
):
    out = shutil.copytree(trained_run, tmp_path / "run")
    before = (out / "recipe.yaml").read_bytes()
    error = user_error(capsys, *train_command(scenes, encoder_file, out, "train.steps=9"))
    assert f"train.steps: found 9, but out={out} holds a run of {STEPS}; the schedule of a run cannot be" in error
    assert (out / "recipe.yaml").read_bytes() == before


def test_a_run_from_before_the_class_token_continues_without_it(scenes, encoder_file, tmp_path, capsys):
    out, arguments = tmp_path / "run", train_command(scenes, encoder_file, tmp_path / "run", "train.steps=1")
    assert main([*arguments, "class_token=false"]) == 0
    recipe, model = out / "recipe.yaml", out / "model.safetensors"
    recipe.write_text(without_key(recipe.read_text(), "class_token"))
    with safe_open(model, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = metadata["addp"]
    assert '"class_token": false' in description
    save_file(state, model, {"addp": description.replace(', "class_token": false', "")})
    assert "backbone.encoder.cls_token" not in state

    segmentor, _ = load_segmentor(out)
    assert (segmentor.class_token, segmentor.has_class_token) == (None, False)
    test = ["seg", "test", f"model={out}", f"data={scenes}", f"out={tmp_path}", "data.workers=0"]
    assert main(test) == 0
    (out / "finished.json").unlink()
    model.unlink()
    assert main(arguments) == 0
    assert load_file(model).keys() == state.keys()
    assert main(arguments) == 0  # the recipe that the continuation wrote means the same
    assert main([*arguments, "class_token=true"]) == 2
    assert "class_token=True (was None)" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_evaluate_the_model_that_they_save(scenes, encoder_file, tmp_path):
    arguments = train_command(scenes, encoder_file, tmp_path / "run", "train.steps=2")
    ended = run_ranks(arguments, tmp_path / "job", limit=600)
    assert ended.codes == [0, 0], ended.text
    in_training = json.loads((tmp_path / "run" / "finished.json").read_text())
    saved = tmp_path / "test"
    assert main(["seg", "test", f"model={tmp_path / 'run'}", f"data={scenes}", f"out={saved}", "data.workers=0"]) == 0
    of_the_file = json.loads((saved / "metrics.json").read_text())
    for metric in ("aAcc", "mIoU"):
        assert of_the_file[metric] == in_training[metric], metric


# -------------------- errors


@pytest.mark.slow
def test_scenes_that_rank_0_alone_checks_end_both_ranks(scenes_copy, encoder_file, tmp_path):
    find_pairs(scenes_copy, "train")[3].class_map.write_bytes(b"")
    ended = run_ranks(train_command(scenes_copy, encoder_file, tmp_path / "run"), tmp_path / "job")
    assert_ends(ended, [2, 2], "addp: ", "annotations")


@pytest.mark.slow
def test_a_scene_that_one_rank_cannot_read_costs_no_step(scenes_copy, encoder_file, tmp_path):
    """Of the second step, in rank 1; rank 0 writes the checkpoint."""
    pairs = find_pairs(scenes_copy, "train")
    index = max(torch.randperm(len(pairs), generator=generator(0, "order", 0))[6:8].tolist())
    image = pairs[index].image
    image.write_bytes(image.read_bytes()[:200])
    settings = ["data.check=0", "train.checkpoint_every=0", "train.evaluate_every=4"]
    ended = run_ranks(train_command(scenes_copy, encoder_file, tmp_path / "run", *settings), tmp_path / "job")
    assert_ends(ended, [2, 2], "addp: ", str(image))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


def test_errors_name_scenes_that_cannot_be_trained_on(scenes_copy, encoder_file, tmp_path, capsys):
    arguments = train_command(scenes_copy, encoder_file, tmp_path / "run")
    pair = find_pairs(scenes_copy, "train")[3]
    intact = pair.class_map.read_bytes()
    labels = np.array(Image.open(pair.class_map))

    Image.fromarray(np.where(labels == 3, 77, labels)[:, :-2]).save(pair.class_map)
    height, width = labels.shape
    assert f"{pair.class_map}: found {width - 2} x {height} pixels" in user_error(capsys, *arguments)
    beyond = labels.copy()
    beyond[5, 5] = CLASSES + 1
    Image.fromarray(beyond).save(pair.class_map)
    expected = f"{pair.class_map}: found label {CLASSES + 1}, expected 0 (other) to {CLASSES}"
    assert expected in user_error(capsys, *arguments)
    Image.fromarray(np.stack([labels] * 3, -1)).save(pair.class_map)
    assert f"{pair.class_map}: found 3 channels" in user_error(capsys, *arguments)
    pair.class_map.write_bytes(intact[:40])
    assert str(pair.class_map) in user_error(capsys, *arguments)
    pair.class_map.unlink()
    assert f"{pair.class_map} is missing" in user_error(capsys, *arguments)
    pair.class_map.write_bytes(intact)
    for split, setting in (("train", "data.check=1000"), ("val", "data.check=0")):  # the header of each is intact
        image = find_pairs(scenes_copy, split)[2].image
        content = image.read_bytes()
        image.write_bytes(content[: len(content) // 2])
        assert f"{image}: image file is truncated" in user_error(capsys, *arguments, setting)
        image.write_bytes(content)

    class_table = scenes_copy / "objectInfo.txt"
    rows = class_table.read_text().splitlines()
    class_table.write_text("\n".join(rows[:-1]))
    assert "found label 13, expected 0 (other) to 12" in user_error(capsys, *arguments)
    class_table.unlink()
    assert "data.classes" in user_error(capsys, *arguments)
    class_table.write_text("\n".join(rows))
    shutil.rmtree(scenes_copy / "annotations")
    assert "annotations/training is missing" in user_error(capsys, *arguments)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("relabel", "classes", "expected"),
    [
        (lambda labels: labels > 0, 1, "data.classes: found one class, 'thing 1'"),
        (lambda labels: labels > 0, 2, "hold no label but 0, 1, and"),
        (lambda labels: labels * 0, CLASSES, "hold no label but 0, and"),
        (lambda labels: np.where(labels > 0, 255, 0), 2, "hold no label but 0, 255, and"),
        (lambda labels: np.where(labels > 0, labels - 1, 255), CLASSES, "hold 0 and 255 but never 13 (thing 13)"),
    ],
    ids=["one class", "one label", "only other", "mask of 0 and 255", "numbered from 0"],
)
def test_class_maps_that_nothing_can_be_learned_from(
    scenes_copy, encoder_file, tmp_path, capsys, relabel, classes, expected
):
    for pair in find_pairs(scenes_copy, "train") + find_pairs(scenes_copy, "val"):
        labels = np.array(Image.open(pair.class_map))
        Image.fromarray(relabel(labels).astype(np.uint8)).save(pair.class_map)
    rows = [f"{i}\tthing {i}" for i in range(1, classes + 1)]
    (scenes_copy / "objectInfo.txt").write_text("\n".join(["Idx\tName", *rows]))
    assert expected in user_error(capsys, *train_command(scenes_copy, encoder_file, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_bad_class_map_met_in_training_ends_with_one_line(scenes_copy, encoder_file, tmp_path, capsys):
    for pair in find_pairs(scenes_copy, "train")[1:]:  # without data.check, the first one is read before training
        labels = np.array(Image.open(pair.class_map))
        Image.fromarray(np.full_like(labels, CLASSES + 5)).save(pair.class_map)
    settings = ["data.check=0", "data.workers=1"]
    line = user_error(capsys, *train_command(scenes_copy, encoder_file, tmp_path / "run", *settings))
    assert line.startswith(f"addp: {scenes_copy}")
    assert f"found label {CLASSES + 5}" in line
    assert "Traceback" not in line


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.accumulate=4", "train.batch=4"),
        ("data.crop=36", "data.crop=36: "),
        ("out_indices=[9]", "out_indices"),
        ("out_indices=[1,2]", "out_indices: found [1, 2], expected four blocks or one"),
        ("patch_size=4", "patch_size: found 4"),
        ("test.flip=true", "unknown key 'test.flip'"),
        ("config=upernet_addp-q", "upernet_addp-b_80k"),
        pytest.param(
            "train.precision=fp16",
            "needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 needs no error where there is a GPU"),
        ),
    ],
)
def test_errors_name_the_setting(scenes, encoder_file, tmp_path, capsys, setting, expected):
    key = setting.split("=")[0]
    arguments = [a for a in train_command(scenes, encoder_file, tmp_path) if a.split("=")[0] != key]
    assert expected in user_error(capsys, *arguments, setting)


def test_a_checkpoint_or_random_initialization_is_required(scenes, tmp_path, capsys):
    assert "model: not given" in user_error(capsys, "seg", "train", f"data={scenes}", f"out={tmp_path}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains with mmengine's own mixed precision")
def test_bf16_on_a_cpu_trains_and_evaluates(scenes, encoder_file, tmp_path, capsys):
    """The first loss is that of fp32 up to rounding, and not to the last bit."""
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        settings = ["train.steps=2", f"train.precision={precision}"]
        assert main(train_command(scenes, encoder_file, out, *settings)) == 0
        losses[precision] = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]
    test = ["seg", "test", f"data={scenes}", f"model={out}", f"out={tmp_path / 'test'}", "data.workers=0"]
    assert main([*test, "precision=bf16"]) == 0
