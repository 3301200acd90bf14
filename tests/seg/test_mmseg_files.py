"""Files for mmseg's tools and files that they wrote: both ways, with the same outputs."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import same_weights
from PIL import Image
from toy_segmentation import CLASSES, train_command, user_error

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

import mmseg
from mmengine.config import Config
from mmseg.apis import MMSegInferencer, inference_model, init_model

from addp_core.base.errors import UserError
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main
from addp_core.weights.encoders import load_encoder
from addp_core.weights.files import FileContent
from addp_core.weights.saving import save_model
from seg.mmseg_checkpoint import read_config_text, read_runner_checkpoint
from seg.scenes import find_pairs
from seg.segmentor import load_segmentor

TOOLS = Path(mmseg.__file__).parent / ".mim" / "tools"


def run_tool(monkeypatch, name: str, *arguments: str, scenes: Path, options: tuple[str, ...] = ()) -> None:
    """Run a script of mmseg's tools/ on the scenes, in this process."""
    settings = [*options]
    for part in ("train", "val", "test"):
        loader = f"{part}_dataloader"
        settings += [f"{loader}.dataset.data_root={scenes}", f"{loader}.num_workers=0"]
        settings += [f"{loader}.persistent_workers=False"]
    unique = f"{Path(arguments[-1]).parent.name}-{name}"  # mmengine keeps one object for each name in a process
    settings += [f"experiment_name={unique}", f"visualizer.name={unique}"]
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--cfg-options", *settings])
    try:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    finally:
        os.environ.pop("LOCAL_RANK", None)  # which the script sets


def metrics_of(work_dir: Path) -> dict[str, float]:
    """Return the metrics that mmengine has written last."""
    lines = [line for path in work_dir.rglob("*.json") for line in path.read_text().splitlines() if "mIoU" in line]
    return json.loads(lines[-1])


def metrics_of_addp(model: Path, scenes: Path, out: Path, *settings: str) -> dict[str, float]:
    """Return the metrics of `addp seg test`."""
    assert main(["seg", "test", f"model={model}", f"data={scenes}", f"out={out}", "data.workers=0", *settings]) == 0
    return json.loads((out / "metrics.json").read_text())


# -------------------- from here to mmseg


def test_mmseg_reads_a_run_folder(trained_run, scenes, tmp_path):
    """Its config.py and model.pth, with `init_model` and with the inferencer."""
    image = find_pairs(scenes, "val")[0].image
    assert main(["seg", "predict", f"model={trained_run}", f"images={image}", f"out={tmp_path}"]) == 0
    expected = np.array(Image.open(tmp_path / "maps" / f"{image.stem}.png")) - 1
    files = [str(trained_run / name) for name in ("config.py", "model.pth")]
    model = init_model(*files, device="cpu")
    assert len(model.dataset_meta["classes"]) == len(model.dataset_meta["palette"]) == CLASSES
    assert np.array_equal(inference_model(model, str(image)).pred_sem_seg.data[0].numpy(), expected)
    whole = init_model(files[0], str(trained_run / "model.safetensors"), device="cpu")
    assert whole.dataset_meta == model.dataset_meta
    assert same_weights(whole, model)
    inferencer = MMSegInferencer(*files, device="cpu", show_progress=False)
    assert np.array_equal(inferencer(str(image))["predictions"], expected)
    assert torch.load(files[1], weights_only=True)["meta"]["dataset_meta"]["classes"]


def test_mmsegs_test_script_gives_the_same_metrics(trained_run, scenes, tmp_path, monkeypatch):
    exported = tmp_path / "exported"
    assert main(["export", "layout=mmseg", f"model={trained_run}", f"out={exported}"]) == 0
    files = [str(exported / name) for name in ("config.py", "model.pth")]
    whole, work_dir = ("model.test_cfg.mode=whole",), str(tmp_path / "tta")
    run_tool(monkeypatch, "test.py", *files, "--tta", "--work-dir", work_dir, scenes=scenes, options=whole)
    settings = ["test.mode=whole", "test.flip=true", "test.scales=[0.5,0.75,1,1.25,1.5,1.75]"]
    ours = metrics_of_addp(exported / "model.pth", scenes, tmp_path / "ours", *settings)
    theirs = metrics_of(tmp_path / "tta")
    assert all(theirs[key] == pytest.approx(ours[key], abs=1e-4) for key in ("mIoU", "aAcc", "mAcc"))


def test_the_config_of_a_run_trains_as_the_run_did(encoder_file, scenes, tmp_path, monkeypatch):
    run, work_dir = tmp_path / "run", tmp_path / "work"
    settings = ["train.steps=2", "train.accumulate=2", "train.lr=3e-4", "train.weight_decay=0.2", "train.clip_grad=2"]
    settings += ["train.layer_decay=0.7", "train.drop_path=0.3", "data.jitter=[0.9,1.1]", "data.flip=false"]
    monkeypatch.chdir(encoder_file.parent)
    assert main(train_command(scenes, encoder_file.name, run, *settings)) == 0
    cfg = Config.fromfile(run / "config.py")
    assert (cfg.train_cfg.max_iters, cfg.train_dataloader.batch_size, cfg.param_scheduler[-1].end) == (4, 2, 4)
    optimizer = cfg.optim_wrapper
    assert (optimizer.optimizer.lr, optimizer.optimizer.weight_decay) == (3e-4, 0.2)
    assert (optimizer.paramwise_cfg.decay_rate, optimizer.accumulative_counts) == (0.7, 2)
    assert (optimizer.clip_grad.max_norm, cfg.model.backbone.drop_path) == (2, 0.3)
    assert cfg.model.backbone.init_cfg.checkpoint == str(encoder_file)
    transforms = {transform.type: transform for transform in cfg.train_dataloader.dataset.pipeline}
    assert (transforms["RandomResize"].ratio_range, transforms["RandomFlip"].prob) == ((0.9, 1.1), 0.0)
    run_tool(monkeypatch, "train.py", str(run / "config.py"), "--work-dir", str(work_dir), scenes=scenes)
    assert (work_dir / "iter_4.pth").exists()
    exported = tmp_path / "exported"
    assert main(["export", "layout=mmseg", f"model={run}", f"out={exported}"]) == 0
    assert "not what the model beside it was trained with" in (exported / "config.py").read_text().splitlines()[0]


def test_errors_of_the_export(trained_run, encoder_file, tmp_path, capsys):
    export = ["export", "layout=mmseg", f"out={tmp_path}/out"]
    assert "is a segmentor with a fixed" in user_error(capsys, *export, f"model={trained_run}", "img_size=32")
    assert "img_size: found 36, expected a multiple" in user_error(
        capsys, *export, f"model={encoder_file}", "img_size=36"
    )
    assert "out: found file.pth, expected a folder" in user_error(
        capsys, "export", "layout=mmseg", f"model={trained_run}", f"out={tmp_path}/file.pth"
    )


def test_an_encoder_without_a_class_token_is_exported_without(tmp_path):
    encoder = Encoder(EncoderConfig(16, 4, 2), (32, 32), 8, AttentionConfig(window=2, class_token=False))
    save_model(encoder, tmp_path / "detectors.safetensors")
    model, folder = tmp_path / "detectors.safetensors", tmp_path / "exported"
    assert main(["export", "layout=mmseg", f"model={model}", f"out={folder}", "img_size=32"]) == 0
    assert Config.fromfile(folder / "config.py").model.backbone.class_token is False


# -------------------- from mmseg to here


@pytest.fixture(scope="module")
def runner_file(encoder_file, scenes, tmp_path_factory):
    """A checkpoint of mmseg's tools/train.py over an exported encoder, with a head that `addp seg train` has not."""
    folder, work_dir = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("work")
    assert main(["export", "layout=mmseg", f"model={encoder_file}", f"out={folder}", "img_size=32"]) == 0
    head = "dict(type='FCNHead', in_channels=16, in_index=3, channels=8, num_convs=1, num_classes=13)"
    (folder / "fcn.py").write_text(
        "_base_ = 'config.py'\n"
        f"head = {head}\n"
        "model = dict(neck=None, decode_head=dict(_delete_=True, **head), auxiliary_head=None)\n"
        "del head\n"
        "train_cfg = dict(max_iters=2, val_interval=2)\n"
        "train_dataloader = dict(batch_size=2)\n"
        "default_hooks = dict(checkpoint=dict(interval=2))\n"
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, "train.py", str(folder / "fcn.py"), "--work-dir", str(work_dir), scenes=scenes)
    return work_dir / "iter_2.pth"


def test_the_training_script_starts_from_the_exported_encoder(encoder_file, tmp_path):
    folder = tmp_path / "exported"
    assert main(["export", "layout=mmseg", f"model={encoder_file}", f"out={folder}", "img_size=32"]) == 0
    backbone = Config.fromfile(folder / "config.py").model.backbone
    assert backbone.arch == {"width": 16, "depth": 4, "heads": 2, "layer_scale": False}
    assert backbone.init_cfg.checkpoint == f"{folder}/model.pth"
    again, original = (load_encoder(str(path), None).state_dict() for path in (folder / "model.pth", encoder_file))
    assert all(torch.equal(again[name], value) for name, value in original.items())


def test_what_the_training_script_wrote_is_tested_and_predicted_with(runner_file, scenes, tmp_path):
    theirs = metrics_of(runner_file.parent)
    ours = metrics_of_addp(runner_file, scenes, tmp_path / "test")
    assert all(theirs[key] == pytest.approx(ours[key], abs=1e-4) for key in ("mIoU", "aAcc", "mAcc"))
    segmentor, _ = load_segmentor(runner_file)
    assert (segmentor.model["decode_head"]["type"], segmentor.crop, segmentor.scale) == ("FCNHead", 32, (32, 128))
    images = scenes / "images" / "validation"
    assert main(["seg", "predict", f"model={runner_file}", f"images={images}", f"out={tmp_path}/out", "n=1"]) == 0


def test_other_names_of_as_many_classes_are_logged(runner_file, scenes, tmp_path, capsys):
    """mmseg's list of ADE20K's classes has other names than the dataset's table, such as "bed "."""
    names = [line.split("\t")[1] for line in (scenes / "objectInfo.txt").read_text().splitlines()[1:]]
    names[7] = "bed"
    table = tmp_path / "classes.txt"
    table.write_text("Idx\tName\n" + "".join(f"{i}\t{name}\n" for i, name in enumerate(names, 1)))
    expected = metrics_of_addp(runner_file, scenes, tmp_path / "same")
    capsys.readouterr()
    found = metrics_of_addp(runner_file, scenes, tmp_path / "other", f"data.classes={table}")
    assert found["mIoU"] == expected["mIoU"]
    assert "1 of 13 names differ from the model's: class 8 is 'bed' in" in capsys.readouterr().err


def test_errors_of_a_foreign_checkpoint():
    state = {"decode_head.conv_seg.weight": torch.zeros(2, 2, 1, 1)}

    def error(meta: object) -> str:
        with pytest.raises(UserError) as raised:
            read_runner_checkpoint(FileContent("iter_1.pth", state, None, metadata={"meta": meta}))
        return str(raised.value)

    classes = {"dataset_meta": {"classes": ("a", "b")}}
    assert "iter_1.pth: a segmentor without its config" in error(classes)
    assert "without the names of its classes" in error({"cfg": "model = dict()"})
    resnet = "model = dict(backbone=dict(type='ResNet'), decode_head=dict(type='FCNHead'))"
    assert "its backbone is 'ResNet'; expected 'AddpViT'" in error(classes | {"cfg": resnet})
    without = "model = dict(backbone=dict(type='AddpViT'), decode_head=dict(type='FCNHead'))"
    assert "its config has no data_preprocessor" in error(classes | {"cfg": without})
    assert "cannot be read as data" in error(classes | {"cfg": "model = open('x')"})


def test_a_config_is_read_without_executing_it(tmp_path):
    text = Config({"a": {"b": (1, None), "c-d": [True, -0.5]}}).pretty_text
    assert read_config_text("f", text) == {"a": {"b": (1, None), "c-d": [True, -0.5]}}
    with pytest.raises(UserError, match=r"^f: its config cannot be read as data"):
        read_config_text("f", f"model = dict(x=__import__('pathlib').Path({str(tmp_path / 'mark')!r}).touch())")
    assert not (tmp_path / "mark").exists()
