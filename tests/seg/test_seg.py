"""Segmentation through the command line and mmengine's Runner, on toy scenes in ADE20K's layout."""

import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.beit import Beit
from tiny import TOKENIZER

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from addp_core.base.errors import UserError
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.networks.tokenizer import Vocabulary
from addp_core.recipes.cli import main
from addp_core.recipes.config import load
from addp_core.weights.checkpoint import load_encoder, save_model
from seg import train as seg_train
from seg.backbone import AddpViT, LayerDecay, MapPyramid, default_indices
from seg.scenes import class_names, find_pairs, read_class_map
from seg.settings import base_config, config_names, fill_model, load_segmentor, read_config

CLASSES = 13
STEPS = 4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Sixteen scenes of 48 x 48 to 48 x 72 pixels, and one of the validation pictures of odd size."""
    out = tmp_path_factory.mktemp("toy")
    assert main(["toy", f"out={out}", "only=[ade20k]", "scene=48", "ade_train=12", "ade_val=4"]) == 0
    root = out / "ade20k"
    pair = find_pairs(root, "val")[0]
    for path in (pair.picture, pair.classes):
        image = Image.open(path)
        image.crop((0, 0, image.width - 5, image.height - 3)).save(path)
    return root


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "model.safetensors"
    save_model(Encoder(EncoderConfig(16, 4, 2), (32, 32), patch_size=8), path)
    return path


def command(scenes: Path, model: Path, out: Path, *more: str) -> list[str]:
    shown = ["config=upernet_addp-tiny_500_ade20k-512x512", "channels=8", "data.crop=32", "data.scale=[48,192]"]
    length = [f"train.steps={STEPS}", "train.warmup_steps=1", "train.batch=4", "train.log_every=1"]
    base = ["seg", "train", f"data={scenes}", f"model={model}", f"out={out}", "data.workers=0"]
    return [*base, *shown, *length, *more]


@pytest.fixture(scope="module")
def trained(scenes, encoder_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(command(scenes, encoder_file, out)) == 0
    return out


def failing(capsys, *args: str) -> str:
    """The one line on stderr of a command that ends with 2."""
    assert main([*args]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("addp: ")]
    assert len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------------------------------------ training


def test_a_run_leaves_its_folder(trained, scenes, encoder_file, capsys):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert {"mIoU", "aAcc", "mAcc", "constant_mIoU"} <= lines[-1].keys()
    assert (trained / "checkpoints" / f"step-{STEPS}" / "training.pt").exists()
    assert main(command(scenes, encoder_file, trained)) == 0
    assert "has finished" in capsys.readouterr().err


def stopped(args: list[str], number: int, when: str) -> int:
    """The exit code of a run that gets this signal when its log says `when`."""

    def stop(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith(when):
            os.kill(os.getpid(), number)
        return True

    log = logging.getLogger("addp")
    log.addFilter(stop)
    try:
        with pytest.raises(SystemExit) as left:
            main(args)
    finally:
        log.removeFilter(stop)
    return left.value.code


def test_a_stopped_run_continues_to_the_same_weights(trained, scenes, encoder_file, tmp_path):
    args = command(scenes, encoder_file, tmp_path / "run")
    assert stopped(args, signal.SIGINT, f"step 1/{STEPS}") == 1
    assert stopped(args, signal.SIGTERM, f"step 3/{STEPS}") == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert main(args) == 0
    ours, whole = (load_file(run / "model.safetensors") for run in (tmp_path / "run", trained))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"loss"') == STEPS


def test_accumulated_steps_from_fresh_weights(scenes, encoder_file, tmp_path):
    out = tmp_path / "run"
    more = ["init=random", "relative=none", "out_indices=[3]", "train.accumulate=2", "train.steps=2"]
    assert main(command(scenes, encoder_file, out, *more, "train.warmup_steps=0", "train.clip_grad=1")) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    state = load_file(out / "model.safetensors")
    assert "backbone.encoder.cls_token" in state
    assert not any("relative" in name for name in state)


def test_a_start_that_keeps_its_norm_is_read_back(scenes, tmp_path, capsys):
    """CLIP's norm on the patches, and BEiT's normalisation of the images, go into the file."""
    torch.manual_seed(0)
    start, out = tmp_path / "clip.safetensors", tmp_path / "run"
    save_model(Encoder(EncoderConfig(16, 4, 2, tokenizer_norm=True, pre_norm=True), (32, 32), patch_size=8), start)
    more = ["train.steps=2", "normalisation=half"]
    assert main(command(scenes, start, out, *more)) == 0
    assert "backbone.encoder.tokenizer_norm.weight" in load_file(out / "model.safetensors")
    segmentor, _ = load_segmentor(out)
    assert (segmentor.tokenizer_norm, segmentor.normalisation) == (True, "half")
    cfg = base_config()
    fill_model(cfg, segmentor)
    assert cfg.model.data_preprocessor.mean == cfg.model.data_preprocessor.std == [127.5] * 3
    args = ["seg", "test", f"model={out}", f"data={scenes}", f"out={tmp_path}", "data.workers=0"]
    assert main(args) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["aAcc"] == pytest.approx(last["aAcc"], abs=0.011)

    fresh = load(seg_train.Recipe, None, command(scenes, start, out, "init=random")[2:])
    cfg = read_config(fresh.config)
    assert seg_train.describe(seg_train.resolve(fresh, cfg), cfg, ("thing",)).tokenizer_norm


def test_a_beit_start_is_read_with_its_tables_alone(tmp_path):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
    beit = Beit(**shape, use_abs_pos_emb=False, use_rel_pos_bias=True)
    for block in beit.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    torch.save({"model": beit.state_dict()}, tmp_path / "beit.pth")
    start = {"type": "Pretrained", "checkpoint": str(tmp_path / "beit.pth")}
    assert AddpViT(img_size=32, init_cfg=start).encoder.blocks[0].relative.relative_position_bias_table.any()
    with pytest.raises(UserError, match=r"^relative=none: .*beit.pth has .*; expected relative=table$"):
        AddpViT(img_size=32, relative="none", init_cfg=start)


@pytest.mark.slow
def test_two_processes(scenes, encoder_file, tmp_path):
    args = command(scenes, encoder_file, tmp_path / "run", "train.steps=2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in "01":
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command_line = [sys.executable, "-m", "addp_core", *args]
        running.append(subprocess.Popen(command_line, env=os.environ | group, stderr=subprocess.PIPE, text=True))
    try:
        for process in running:
            errors = process.communicate(timeout=600)[1]
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["aAcc"] >= 0


# ------------------------------------------------------------------------------------------------ evaluation


def test_figures_of_a_model(trained, scenes, tmp_path, capsys):
    args = ["seg", "test", f"model={trained}", f"data={scenes}", "data.workers=0"]
    assert main([*args, f"out={tmp_path}/slide", "maps=true"]) == 0
    assert "grass" in capsys.readouterr().out
    found = json.loads((tmp_path / "slide" / "metrics.json").read_text())
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(found[key] == pytest.approx(last[key], abs=0.011) for key in ("mIoU", "aAcc", "mAcc", "constant_mIoU"))

    several = ["test.mode=whole", "test.flip=true", "test.scales=[0.75,1]"]  # one of the pictures is of odd size
    assert main([*args, f"out={tmp_path}/several", *several]) == 0
    assert json.loads((tmp_path / "several" / "metrics.json").read_text())["classes"] == list(class_names(scenes))

    # what `maps` wrote, read back, has the same figures
    back = ["seg", "test", f"predictions={tmp_path}/slide/maps", f"data={scenes}", "data.workers=0"]
    assert main([*back, f"out={tmp_path}/back"]) == 0
    again = json.loads((tmp_path / "back" / "metrics.json").read_text())
    assert all(again[key] == found[key] for key in ("mIoU", "aAcc", "mAcc"))

    pictures = f"images={scenes}/images/validation"
    # in a process of its own, where nothing else has named mmengine's scope
    words = ["seg", "predict", f"model={trained}", pictures, f"out={tmp_path}/painted"]
    subprocess.run([sys.executable, "-m", "addp_core", *words], check=True, capture_output=True)
    for pair in find_pairs(scenes, "val"):
        ours = np.array(Image.open(tmp_path / "painted" / "maps" / pair.classes.name))
        assert np.array_equal(ours, np.array(Image.open(tmp_path / "slide" / "maps" / pair.classes.name)))
        with Image.open(tmp_path / "painted" / pair.classes.name) as sheet, Image.open(pair.picture) as picture:
            assert sheet.width > 2 * picture.width


def hand_figures(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[dict[str, float], np.ndarray]:
    """mIoU, mAcc, aAcc in percent from the confusion matrix, and IoU by class; label 0 is not counted."""
    confusion = np.zeros((CLASSES + 1, CLASSES + 1), dtype=np.int64)  # [label, prediction]
    for label, found in pairs:
        np.add.at(confusion, (label[label > 0], found[label > 0]), 1)
    right = np.diag(confusion)[1:].astype(float)
    labelled, predicted = confusion.sum(1)[1:], confusion.sum(0)[1:]
    with np.errstate(invalid="ignore"):
        iou, accuracy = right / (labelled + predicted - right), right / labelled
    means = {"mIoU": np.nanmean(iou), "mAcc": np.nanmean(accuracy), "aAcc": right.sum() / labelled.sum()}
    return {key: 100 * value for key, value in means.items()}, 100 * iou


@pytest.mark.parametrize("shift", [0, 3])
def test_ground_truth_scores_100_and_a_shifted_map_what_the_confusion_matrix_says(scenes, tmp_path, shift):
    maps, pairs = tmp_path / "maps", []
    maps.mkdir()
    for pair in find_pairs(scenes, "val"):
        label = np.array(Image.open(pair.classes))
        pairs.append((label, np.roll(label, shift, axis=1)))
        Image.fromarray(pairs[-1][1]).save(maps / pair.classes.name)
    args = ["seg", "test", f"predictions={maps}", f"data={scenes}", f"out={tmp_path}", "data.workers=0"]
    assert main(args) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    means, iou = hand_figures(pairs)
    if not shift:
        assert means["mIoU"] == found["mIoU"] == found["aAcc"] == 100
    assert all(found[key] == pytest.approx(value, abs=0.006) for key, value in means.items())
    ours = [np.nan if value is None else value for value in found["per_class"]["IoU"]]
    assert np.allclose(ours, iou, atol=1e-3, equal_nan=True)


def test_the_constant_map(scenes, tmp_path):
    labels = [np.array(Image.open(pair.classes)) for pair in find_pairs(scenes, "val")]
    counts = np.bincount(np.concatenate([label.flatten() for label in labels]), minlength=CLASSES + 1)
    often = int(counts[1:].argmax()) + 1
    (tmp_path / "maps").mkdir()
    for pair, label in zip(find_pairs(scenes, "val"), labels, strict=True):
        Image.fromarray(np.full_like(label, often)).save(tmp_path / "maps" / pair.classes.name)
    args = ["seg", "test", f"predictions={tmp_path}/maps", f"data={scenes}", f"out={tmp_path}", "data.workers=0"]
    assert main(args) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["mIoU"] == pytest.approx(found["constant_mIoU"], abs=0.011)


def test_maps_of_a_nested_set_keep_their_folders(trained, own_scenes, tmp_path):
    """Two pictures of one name, of different sizes."""
    for number, pair in enumerate(find_pairs(own_scenes, "val")):
        for path in (pair.picture, pair.classes):
            folder = path.parent / f"part{number}"
            folder.mkdir()
            path.rename(folder / f"same{path.suffix}")
    args = ["seg", "test", f"data={own_scenes}", "data.workers=0"]
    assert main([*args, f"model={trained}", f"out={tmp_path}/first", "maps=true"]) == 0
    assert main([*args, f"predictions={tmp_path}/first/maps", f"out={tmp_path}/again"]) == 0
    first, again = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("first", "again"))
    assert first == again
    (tmp_path / "first" / "maps" / "part2" / "same.png").unlink()
    assert main([*args, f"predictions={tmp_path}/first/maps", f"out={tmp_path}/again"]) == 2


def test_predict_paints_every_picture_it_can_read(trained, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "nested").mkdir(parents=True)
    for name, size in {"a.jpg": (70, 40), "a.png": (33, 80), "nested/a.webp": (48, 48)}.items():
        Image.new("RGB", size, (200, 30, 30)).save(folder / name)
    (folder / "._a.jpg").write_bytes(b"a Mac's notes")
    (folder / "c.png").write_bytes(b"no image")
    args = ["seg", "predict", f"model={trained}", f"out={out}", "test.flip=true"]
    assert main([*args, f"images={folder}"]) == 0
    assert "c.png: not an image of a known format; passed over" in capsys.readouterr().err
    maps = {str(path.relative_to(out / "maps")): Image.open(path).size for path in (out / "maps").rglob("*.png")}
    assert maps == {"a.jpg.png": (70, 40), "a.png.png": (33, 80), "nested/a.png": (48, 48)}
    assert main([*args, f"images={folder / 'a.png'}"]) == 0
    assert (out / "a.png").exists()
    assert "none of the 1 pictures" in failing(capsys, *args, f"images={folder / 'c.png'}")
    assert "addp: images: nowhere does not exist" in failing(capsys, *args, "images=nowhere")


# ------------------------------------------------------------------------------------------------ the parts


def test_maps_without_relative_positions_are_the_recognition_encoders_tokens(encoder_file):
    indices, images = (0, 2, 3), torch.randn(2, 3, 48, 32)
    start = {"type": "Pretrained", "checkpoint": str(encoder_file)}
    backbone = AddpViT(img_size=(48, 32), out_indices=indices, relative="none", init_cfg=start).eval()
    encoder = load_encoder(str(encoder_file), (48, 32))
    tokens = encoder.forward_tokens(images, indices)
    assert torch.allclose(tokens[-1], encoder.forward_features(images), atol=1e-6)
    with torch.no_grad():
        for tokens_of, found in zip(tokens, backbone(images), strict=True):
            expected = tokens_of[:, 1:].transpose(1, 2).unflatten(2, (6, 4))
            assert (found - expected).abs().max() < 1e-5


def test_relative_tables_start_at_zero_and_matter_once_they_are_not(encoder_file):
    images, start = torch.randn(1, 3, 40, 48), {"type": "Pretrained", "checkpoint": str(encoder_file)}
    backbone = AddpViT(img_size=32, init_cfg=start).eval()  # of another size than the images
    tables = [value for name, value in backbone.named_parameters() if name.endswith("bias_table")]
    assert len(tables) == 4
    with torch.no_grad():
        before = backbone(images)
        for table in tables:
            table.normal_()
        after = backbone(images)
    assert [tuple(found.shape) for found in before] == [(1, 16, 5, 6)] * 4
    assert not torch.allclose(before[-1], after[-1], atol=1e-3)


def test_pyramid_of_one_map_or_four():
    pyramid = MapPyramid(8, norm_cfg={"type": "BN"}).eval()
    one = torch.randn(2, 8, 4, 6)
    sizes = [tuple(level.shape[2:]) for level in pyramid([one])]
    assert sizes == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(pyramid([one]), pyramid([one] * 4), strict=True))
    assert default_indices(12) == (3, 5, 7, 11)
    assert default_indices(24) == (7, 11, 15, 23)


def test_rates_fall_from_block_to_block():
    model = torch.nn.Module()
    model.backbone = AddpViT({"width": 16, "depth": 4, "heads": 2}, 32, 8)
    model.decode_head = torch.nn.Conv2d(16, 3, 1)
    optimizer = {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05}
    wrapper = LayerDecay({"type": "OptimWrapper", "optimizer": optimizer}, {"decay_rate": 0.5})(model)
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert groups.keys() == {id(p) for p in trained.values()}
    rates = {name: groups[id(p)]["lr"] for name, p in trained.items()}
    assert rates["decode_head.weight"] == 1
    assert [rates[f"backbone.encoder.blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [0.5**k for k in (4, 3, 2, 1)]
    assert rates["backbone.encoder.patch_embed.proj.weight"] == rates["backbone.encoder.pos_embed"] == 0.5**5
    decays = {name: groups[id(p)]["weight_decay"] for name, p in trained.items()}
    spared = {name for name, value in decays.items() if value == 0}
    expected = {name for name, p in trained.items() if p.ndim == 1 or "pos_embed" in name}
    assert spared == expected


def test_configs_hold_the_papers_recipe():
    known = {
        "upernet_addp-b_80k_ade20k-512x512": (80_000, 2e-4, (3, 5, 7, 11)),
        "upernet_addp-l_40k_ade20k-512x512": (40_000, 1e-4, (7, 11, 15, 23)),
    }
    assert known.keys() < set(config_names())
    for name, (steps, rate, indices) in known.items():
        cfg = read_config(name)
        recipe = seg_train.resolve(load(seg_train.Recipe, None, ["out=o", "data=d", f"config={name}"]), cfg)
        train = recipe.train
        assert (train.steps, train.batch, train.warmup_steps, train.lr) == (steps, 32, 1500, rate)
        assert (train.layer_decay, train.weight_decay, train.drop_path) == (0.85, 0.05, 0.1)
        assert (recipe.data.crop, recipe.relative, cfg.model.backbone.out_indices) == (512, "table", indices)
        assert cfg.param_scheduler[1].end == steps
        assert [step.type for step in cfg.train_dataloader.dataset.pipeline[2:6]] == [
            "RandomResize",
            "RandomCrop",
            "RandomFlip",
            "PhotoMetricDistortion",
        ]


def test_cost_of_a_crop(capsys):
    assert main(["seg", "cost", "config=upernet_addp-tiny_500_ade20k-512x512", "crop=32", "steps=1", "json=true"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["crop"] == 32
    assert all(figures[part]["seconds_per_crop"] > 0 for part in ("test", "train"))


# ------------------------------------------------------------------------------------------------ bad input


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_hostile_is_unpickled(scenes, encoder_file, tmp_path, capsys):
    mark, bad = tmp_path / "executed", tmp_path / "bad.pth"
    torch.save({"model": {"weight": torch.zeros(1)}, "extra": Hostile(mark)}, bad)
    assert "refused" in failing(capsys, *command(scenes, bad, tmp_path / "start"))
    assert "refused" in failing(capsys, "seg", "predict", f"model={bad}", f"images={scenes}", f"out={tmp_path}/painted")

    out = tmp_path / "run"
    step = out / "checkpoints" / "step-2"
    step.mkdir(parents=True)
    content = pickle.dumps(Hostile(mark))
    for write in (lambda path: path.write_bytes(content), lambda path: shutil.copy(bad, path)):
        write(step / "training.pt")
        data = (step / "training.pt").read_bytes()
        state = {"step": 2, "size": len(data), "crc32": zlib.crc32(data), "iteration": 2, "iterations": STEPS}
        (step / "state.json").write_text(json.dumps(state))
        assert "training.pt" in failing(capsys, *command(scenes, encoder_file, out))
    assert not mark.exists()


@pytest.fixture
def own_scenes(scenes, tmp_path) -> Path:
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


def test_scenes_that_cannot_be_trained_on_are_named_before_training(own_scenes, encoder_file, tmp_path, capsys):
    args = command(own_scenes, encoder_file, tmp_path / "run")
    pair = find_pairs(own_scenes, "train")[3]
    good = pair.classes.read_bytes()
    label = np.array(Image.open(pair.classes))

    Image.fromarray(np.where(label == 3, 77, label)[:, :-2]).save(pair.classes)
    height, width = label.shape
    assert f"{pair.classes}: found {width - 2} x {height} pixels" in failing(capsys, *args)
    beyond = label.copy()
    beyond[5, 5] = CLASSES + 1
    Image.fromarray(beyond).save(pair.classes)
    assert f"{pair.classes}: found label {CLASSES + 1}, expected 0 (other) to {CLASSES}" in failing(capsys, *args)
    Image.fromarray(np.stack([label] * 3, -1)).save(pair.classes)
    assert f"{pair.classes}: found 3 channels" in failing(capsys, *args)
    pair.classes.write_bytes(good[:40])
    assert str(pair.classes) in failing(capsys, *args)
    pair.classes.unlink()
    assert f"{pair.classes} is missing" in failing(capsys, *args)
    pair.classes.write_bytes(good)

    table = own_scenes / "objectInfo.txt"
    rows = table.read_text().splitlines()
    table.write_text("\n".join(rows[:-1]))
    assert "found label 13, expected 0 (other) to 12" in failing(capsys, *args)
    table.write_text("\n".join(rows))
    shutil.rmtree(own_scenes / "annotations")
    assert "annotations/training is missing" in failing(capsys, *args)
    table.unlink()
    assert "data.classes" in failing(capsys, *args)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_bad_map_met_in_training_is_told_in_one_line(own_scenes, encoder_file, tmp_path, capsys):
    for pair in find_pairs(own_scenes, "train"):
        label = np.array(Image.open(pair.classes))
        Image.fromarray(np.full_like(label, CLASSES + 5)).save(pair.classes)
    line = failing(capsys, *command(own_scenes, encoder_file, tmp_path / "run", "data.check=0", "data.workers=1"))
    assert line.startswith(f"addp: {own_scenes}")
    assert f"found label {CLASSES + 5}" in line
    assert "Traceback" not in line


def test_settings_that_cannot_work(scenes, encoder_file, trained, tmp_path, capsys):
    for more, expected in {
        "train.batch=3": None,
        "train.accumulate=4": "train.batch=4",
        "data.crop=36": "data.crop=36: ",
        "out_indices=[9]": "out_indices",
        "out_indices=[1,2]": "out_indices: found [1, 2], expected four blocks or one",
        "patch_size=4": "patch_size: found 4",
        "test.flip=true": "unknown key 'test.flip'",
        "config=upernet_addp-q": "upernet_addp-b_80k",
        "train.warmup_steps=9": "train.warmup_steps=9",
        "train.precision=bf16": None if torch.cuda.is_available() else "needs a GPU",
    }.items():
        if expected:
            args = [arg for arg in command(scenes, encoder_file, tmp_path) if arg.split("=")[0] != more.split("=")[0]]
            assert expected in failing(capsys, *args, more)
    save_model(
        TokenEncoder(PredictorConfig(16, 4, 2, 1, 2), Vocabulary(TOKENIZER.codebook), TOKENIZER, (32, 32)),
        tmp_path / "tokens.safetensors",
    )
    for init in ("random", "pretrained"):
        args = command(scenes, tmp_path / "tokens.safetensors", tmp_path, f"init={init}")
        assert "tokens.safetensors sees token ids" in failing(capsys, *args)
    assert "model: not given" in failing(capsys, "seg", "train", f"data={scenes}", f"out={tmp_path}")
    assert "expected either" in failing(capsys, "seg", "test", f"data={scenes}", f"out={tmp_path}")
    assert "no segmentor" in failing(
        capsys, "seg", "test", f"model={encoder_file}", f"data={scenes}", f"out={tmp_path}"
    )
    assert "is missing" in failing(
        capsys, "seg", "test", f"predictions={tmp_path}", f"data={scenes}", f"out={tmp_path}"
    )
    table = tmp_path / "table.txt"
    table.write_text("Idx\tName\n" + "".join(f"{i}\tthing {i}\n" for i in range(1, 20)))
    args = ["seg", "test", f"model={trained}", f"data={scenes}", f"out={tmp_path}"]
    assert "19 classes" in failing(capsys, *args, f"data.classes={table}")
    assert "data.crop: found 100, expected a multiple of the model's patch size 8" in failing(
        capsys, *args, "data.crop=100"
    )
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "map.png")
    with pytest.raises(UserError, match="found 4 x 4 pixels"):
        read_class_map(tmp_path / "map.png", (4, 5), CLASSES)
