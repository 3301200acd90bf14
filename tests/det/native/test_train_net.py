"""The training program on detectron2's own trainer."""

# ruff: noqa: E402 (modules that need detectron2 are imported after the check that it is installed)

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.weights.saving import save_model
from det.model import load_detector

pytest.importorskip("detectron2", reason="detectron2 is not installed; `addp doctor` shows the command to install it")
pytestmark = pytest.mark.filterwarnings("ignore")  # detectron2 uses deprecated names of torch

from det.native import train_net


@pytest.fixture
def arguments(toy_coco: Path, encoder_file: Path, tmp_path: Path) -> Iterator[list[str]]:
    """Yield a command line of train_net that takes seconds and writes into tmp_path / "out"."""
    overrides = {
        "model.backbone.net.encoder.source": encoder_file,
        "model.backbone.net.encoder.img_size": 48,
        "model.backbone.square_pad": 48,
        "model.roi_heads.batch_size_per_image": 8,
        "dataloader.coco.root": toy_coco,
        "dataloader.train.total_batch_size": 2,
        "dataloader.train.num_workers": 0,
        "dataloader.train.mapper.augmentations.0.target_height": 48,
        "dataloader.train.mapper.augmentations.0.target_width": 48,
        "dataloader.train.mapper.augmentations.1.crop_size": "[48,48]",
        "dataloader.test.num_workers": 0,
        "dataloader.test.mapper.augmentations.0.max_size": 48,
        "train.output_dir": tmp_path / "out",
        "train.max_iter": 4,
        "train.warmup": 1,
        "train.checkpointer.period": 2,
        "train.log_period": 2,
    }
    config = ["--config-file", "mask_rcnn_vitdet_tiny_100ep"]
    yield [*config, *(f"{key}={value}" for key, value in overrides.items())]
    for name in ("detectron2", "fvcore"):  # remove the log handlers that detectron2 added
        logging.getLogger(name).handlers.clear()


def test_train_net_stops_continues_evaluates_and_exports(arguments, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train_loader = train_net.train_loader

    def interrupted_loader(*args):
        signal.raise_signal(signal.SIGTERM)
        return train_loader(*args)

    monkeypatch.setattr(train_net, "train_loader", interrupted_loader)
    with pytest.raises(SystemExit) as caught:
        train_net.run(arguments)
    assert caught.value.code == 0
    assert (out / "last_checkpoint").read_text() == "model_0000000.pth"
    monkeypatch.setattr(train_net, "train_loader", train_loader)

    train_net.run(["--resume", *arguments])
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1, 3]
    assert lines[-1]["bbox/AP"] < 1  # percent, after eight images
    assert lines[-1]["segm/AP"] < 1
    final = torch.load(out / "model_final.pth", weights_only=True)["model"]

    model = load_detector(out)  # as `addp det eval` and `predict` do
    assert [category.id for category in model.architecture.categories] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert all(torch.equal(value, final[name.removeprefix("rcnn.")]) for name, value in model.state_dict().items())
    (detections,) = model.detect([torch.zeros(3, 40, 30, dtype=torch.uint8)])
    assert len(detections.boxes) == len(detections.masks)

    checkpoint = load_detector(out / "model_final.pth")  # of a run that has not written its model file yet
    assert all(torch.equal(value, final[name]) for name, value in checkpoint.model.state_dict().items())

    results = out / "evaluation" / "coco_instances_results.json"
    before = results.read_text()
    results.unlink()
    train_net.run(["--eval-only", *arguments, f"train.init_checkpoint={out}"])
    assert results.read_text() == before


def test_the_mean_and_std_of_images_are_those_of_the_detector(arguments, tmp_path, capfd):
    out = tmp_path / "out"
    half = ["model.pixel_mean=[127.5,127.5,127.5]", "model.pixel_std=[127.5,127.5,127.5]"]
    train_net.run([*arguments, *half, "train.max_iter=2"])
    assert load_detector(out).architecture.normalisation == "half"
    with pytest.raises(SystemExit) as caught:
        train_net.run(["--eval-only", *arguments, f"train.init_checkpoint={out}"])
    assert caught.value.code == 2
    assert "expected model.pixel_mean=[127.5, 127.5, 127.5] model.pixel_std=[127.5, " in capfd.readouterr().err
    train_net.run(["--eval-only", *arguments, *half, f"train.init_checkpoint={out}"])


def test_a_signal_to_the_group_of_processes_leaves_a_checkpoint(arguments, encoder_file, tmp_path):
    """As `timeout`, a terminal and Slurm stop a job; the encoder comes from train.init_checkpoint."""
    settings = [a for a in arguments if not a.startswith("model.backbone.net.encoder.source")]
    settings += ["dataloader.train.num_workers=2", "train.max_iter=5000", f"train.init_checkpoint={encoder_file}"]
    command = [sys.executable, "-W", "ignore", "-m", "det.native.train_net", *settings]
    root, out = Path(train_net.__file__).parents[2], tmp_path / "out"
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()[-2000:]
    finally:
        process.kill()
    text = (tmp_path / "log").read_text()
    assert "no detector; read as model.backbone.net.encoder.source" in text
    assert "stopped by a signal after iteration" in text
    assert "DataLoader worker" not in text
    assert (out / (out / "last_checkpoint").read_text()).exists()


class CodeOnUnpickling:
    """An object that would print "boom" if it were unpickled."""

    def __reduce__(self):
        return print, ("boom",)


def test_train_net_refuses_wrong_input_in_one_line(arguments, tmp_path, capfd):
    torch.save({"model": {"a": torch.zeros(1)}, "code": CodeOnUnpickling()}, tmp_path / "code.pth")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with_tables = Encoder(EncoderConfig(32, 4, 2), (32, 32), 8, AttentionConfig(relative="table"))
    torch.nn.init.zeros_(with_tables.pos_embed)
    torch.nn.init.normal_(with_tables.blocks[0].relative.relative_position_bias_table)
    save_model(with_tables, tmp_path / "beit.safetensors")
    evaluate = ["--eval-only", *arguments]
    cases = {
        "refused because unpickling it could run code": [*evaluate, f"train.init_checkpoint={tmp_path / 'code.pth'}"],
        "tensors do not match this config's": [*evaluate, f"train.init_checkpoint={tmp_path / 'other.pth'}"],
        "train.init_checkpoint: missing": evaluate,
        "no such file or config; the configs are mask_rcnn_vitdet_b_100ep": ["--config-file", "nope"],
        "data.root: nowhere is not a folder": [*arguments, "dataloader.coco.root=nowhere"],
        "encoder.attention.relative=decomposed: model.backbone.net.encoder.source has no positions": [
            *arguments,
            f"model.backbone.net.encoder.source={tmp_path / 'beit.safetensors'}",
        ],
    }
    for message, command in cases.items():
        with pytest.raises(SystemExit) as caught:
            train_net.run(command)
        assert caught.value.code == 2
        captured = capfd.readouterr()
        assert message in captured.err.splitlines()[-1]
        assert "boom" not in captured.out
