"""Segmentation over the four stages of a CNN: `addp seg`, and the backbone in mmseg."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import assert_user_error, same_weights
from safetensors.torch import load_file
from tiny import random_tensor, tiny_cnn_addp
from toy_segmentation import train_command, user_error

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from mmseg.apis import init_model

from addp_core import load_encoder, save_model
from addp_core.networks.cnn import CnnEncoder
from addp_core.recipes.cli import main
from seg.backbone import LayerDecay
from seg.cnn_backbone import AddpCNN
from seg.launch import build_part
from seg.mmseg_config import import_mmseg
from seg.runner import RunFolder
from seg.segmentor import load_segmentor


@pytest.fixture(scope="module")
def cnn_file(tmp_path_factory) -> Path:
    """The file of an ADDP whose encoder is a small ResNet."""
    path = tmp_path_factory.mktemp("cnn") / "addp.safetensors"
    save_model(tiny_cnn_addp(image_size=(32, 32)), path)
    return path


@pytest.fixture(scope="module")
def cnn_run(scenes, cnn_file, tmp_path_factory) -> Path:
    """The folder of a finished run over it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(train_command(scenes, cnn_file, out)) == 0
    return out


def test_a_segmentor_is_stopped_continued_evaluated_and_predicts(cnn_run, scenes, cnn_file, tmp_path, monkeypatch):
    original = RunFolder.after_train_iter

    def stop(self, runner, batch_idx, *args, **options):
        if runner.iter == 1:
            self.signals.stop = True
        original(self, runner, batch_idx, *args, **options)

    monkeypatch.setattr(RunFolder, "after_train_iter", stop)
    with pytest.raises(SystemExit) as caught:
        main(train_command(scenes, cnn_file, tmp_path / "run"))
    assert caught.value.code == 0
    monkeypatch.setattr(RunFolder, "after_train_iter", original)
    assert main(train_command(scenes, cnn_file, tmp_path / "run")) == 0
    whole, continued = (load_file(run / "model.safetensors") for run in (cnn_run, tmp_path / "run"))
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    assert main(["seg", "train", str(cnn_run / "recipe.yaml")]) == 0  # what it has recorded is a recipe

    last = json.loads((cnn_run / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("model.safetensors", "model.pth"):
        file = tmp_path / name
        shutil.copy(cnn_run / name, file)
        arguments = [f"model={file}", f"data={scenes}", f"out={tmp_path / 'scores'}", "data.workers=0"]
        assert main(["seg", "test", *arguments]) == 0
        metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
        assert metrics["aAcc"] == pytest.approx(last["aAcc"], abs=0.011)
    images = scenes / "images" / "validation"
    assert main(["seg", "predict", f"model={file}", f"images={images}", f"out={tmp_path / 'maps'}", "n=1"]) == 0

    before, after = load_encoder(cnn_file, 32), load_encoder(cnn_run, 32)
    assert isinstance(after, CnnEncoder)
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}
    assert any(name.endswith("conv1.weight") for name in changed)
    assert any(name.endswith("running_mean") for name in changed)  # statistics are those of the segmentor's crops


def test_a_vits_config_reads_the_stages_without_layer_decay(cnn_run):
    segmentor, state = load_segmentor(cnn_run)
    assert (segmentor.cnn.arch, segmentor.out_indices, segmentor.patch_size) == ("test_resnet", (0, 1, 2, 3), 32)
    assert state["decode_head.lateral_convs.0.conv.weight"].shape[1] == segmentor.cnn.channels[0] == 32
    recipe = (cnn_run / "recipe.yaml").read_text()
    assert "layer_decay: 1.0" in recipe
    assert "relative: null" in recipe


def test_random_weights_of_a_model_of_timm_and_the_config_for_cnns(scenes, tmp_path):
    settings = ["init=random", "model=test_convnext", "config=upernet_addp-r50_80k_ade20k-512x512", "train.steps=1"]
    arguments = [a for a in train_command(scenes, Path("x"), tmp_path / "run") if a.split("=")[0] not in ("model",)]
    assert main([*arguments, *settings]) == 0
    assert load_segmentor(tmp_path / "run")[0].cnn.arch == "test_convnext"


MISTAKES = {
    "relative=table": "relative: found table, but {model} is a CNN, which is read at its four stages",
    "class_token=true": "class_token: found True, but {model} is a CNN",
    "out_indices=[0,1,2,3]": "out_indices: found [0, 1, 2, 3], but {model} is a CNN",
    "patch_size=8": "patch_size: found 8, but {model} has 32; leave the key out",
    "encoder_heads=4": "encoder_heads: found 4, but {model} is a test_resnet, which has none; leave the key out",
    "tokenizer_norm=true": "tokenizer_norm: ",
    "input=token": "input=token: {model} reads pixels; expected a MAGE checkpoint",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_keys_of_vits_are_refused_before_the_first_step(cnn_file, scenes, tmp_path, capsys, setting):
    error = user_error(capsys, *train_command(scenes, cnn_file, tmp_path / "run", setting))
    assert MISTAKES[setting].format(model=cnn_file) in error
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_vit_in_a_config_for_cnns_is_refused(encoder_file, scenes, tmp_path, capsys):
    settings = "config=upernet_addp-r50_80k_ade20k-512x512"
    error = user_error(capsys, *train_command(scenes, encoder_file, tmp_path / "run", settings))
    assert "config: upernet_addp-r50_80k_ade20k-512x512 is for CNNs, and" in error


def test_cost_over_a_cnn(capsys):
    config = "config=upernet_addp-tiny_500_ade20k-512x512"
    assert main(["seg", "cost", config, "model=test_resnet", "crop=32", "steps=1", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["seconds_per_crop"] > 0


# -------------------- in mmseg


def node(**options: Any) -> dict[str, Any]:
    """Return the config of a backbone."""
    return {"type": "AddpCNN", "arch": "test_resnet", "img_size": 32, **options}


def test_the_backbones_maps_are_those_of_the_file(cnn_file, tmp_path):
    import_mmseg()
    backbone: AddpCNN = build_part(node(pretrained=str(cnn_file), norm_eval=True, frozen_stages=1, with_cp=True))
    state = torch.get_rng_state()
    backbone.init_weights()
    assert torch.equal(torch.get_rng_state(), state)
    images = random_tensor(2, 3, 48, 40)
    maps = backbone.train()(images)  # with the statistics of the file
    for found, expected in zip(maps, load_encoder(cnn_file, 32).forward_maps(images, range(4)), strict=True):
        torch.testing.assert_close(found, expected)
    maps[-1].sum().backward()
    trained = {name.split(".")[2] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}

    torch.save({"state_dict": backbone.state_dict()}, tmp_path / "backbone.pth")
    again = build_part(node(norm_cfg={"type": "SyncBN", "requires_grad": True}))
    load_checkpoint(again, str(tmp_path / "backbone.pth"))
    assert same_weights(again, backbone)
    one: AddpCNN = build_part(node(out_indices=1))
    one(images)[0].sum().backward()
    assert all(p.grad is not None for p in one.parameters() if p.requires_grad)  # for which DDP waits


def test_layers_of_the_learning_rate_decay():
    model = torch.nn.Module()
    model.backbone = AddpCNN("test_resnet", 32)
    model.decode_head = torch.nn.Conv2d(16, 3, 1)
    optimizer = {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05}
    wrapper = LayerDecay({"type": "OptimWrapper", "optimizer": optimizer}, {"decay_rate": 0.5})(model)
    rates = {id(p): group["lr"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert by_name["decode_head.weight"] == 1
    stages = [by_name[f"backbone.encoder.body.layer{i}.0.conv1.weight"] for i in range(1, 5)]
    assert stages == [0.5**k for k in (4, 3, 2, 1)]
    assert by_name["backbone.encoder.body.conv1.0.weight"] == 0.5**5


def test_mistakes_in_a_backbones_config_tell_the_line(cnn_file, encoder_file, tmp_path):
    import_mmseg()
    pretrained = {"type": "Pretrained", "checkpoint": str(cnn_file)}
    assert_user_error(
        lambda: build_part(node(arch=None, init_cfg=pretrained)), "arch: not given, expected arch='test_resnet'"
    )
    assert_user_error(lambda: build_part(node(arch="resnet5")), "arch: found 'resnet5'", "did you mean")
    assert_user_error(lambda: build_part(node(arch="vit_tiny_patch16_224")), "no CNN of timm")
    other = build_part(node(arch="test_convnext", init_cfg=pretrained))
    assert_user_error(other.init_weights, "arch: found 'test_convnext'", "expects arch='test_resnet'")
    vit = build_part(node(init_cfg={"type": "Pretrained", "checkpoint": str(encoder_file)}))
    assert_user_error(vit.init_weights, "is no CNN; expected one, or the backbone AddpViT")
    assert_user_error(lambda: build_part(node(frozen_stages=5)), "frozen_stages: found 5, expected -1 (none) to 4")
    assert_user_error(lambda: build_part(node(with_cls_token=True)), "with_cls_token: AddpCNN has no such keyword")
    assert_user_error(lambda: build_part(node(norm_cfg={"type": "GN"})), "norm_cfg: found {'type': 'GN'}")
    assert_user_error(lambda: build_part(node(out_indices=4)), "out_indices: found [4], expected stages of 0 to 3")
    cnn, pickled = build_part({"type": "EncoderDecoder", **_model(node())}), tmp_path / "encoder.pth"
    torch.save({"state_dict": load_file(cnn_file)}, pickled)
    assert_user_error(lambda: load_checkpoint(cnn, str(pickled)), "the checkpoint has an encoder under other names")
    torch.save({"state_dict": cnn.state_dict()}, pickled)
    another = build_part({"type": "EncoderDecoder", **_model(node(arch="test_convnext"))})
    assert_user_error(lambda: load_checkpoint(another, str(pickled)), "backbone: the checkpoint has other tensors: ")


def _model(backbone: dict[str, Any]) -> dict[str, Any]:
    head = {"type": "FCNHead", "in_channels": 96, "in_index": 3, "channels": 8, "num_convs": 1, "num_classes": 3}
    return {"backbone": backbone, "decode_head": head}


def test_a_segmentor_and_a_pretrained_cnn_are_exported_for_mmseg(cnn_run, cnn_file, tmp_path, capsys):
    assert main(["export", "layout=mmseg", f"model={cnn_run}", f"out={tmp_path / 'run'}"]) == 0
    assert "logits differ from PyTorch's by at most" in capsys.readouterr().err
    model = init_model(str(tmp_path / "run" / "config.py"), str(tmp_path / "run" / "model.pth"), device="cpu")
    assert isinstance(model.backbone, AddpCNN)
    assert main(["export", "layout=mmseg", f"model={cnn_file}", f"out={tmp_path / 'cnn'}", "img_size=64"]) == 0
    model = build_part(Config.fromfile(tmp_path / "cnn" / "config.py").model)
    model.init_weights()
    assert same_weights(model.backbone.encoder, load_encoder(cnn_file, 64))
