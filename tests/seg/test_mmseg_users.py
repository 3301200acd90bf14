"""What users of MMSegmentation do with the backbone, in mmseg's own packages: their configs, keywords and tools."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

import mmseg
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import load_checkpoint
from mmseg.apis import init_model
from mmseg.registry import MODELS
from safetensors.torch import load_file

from addp_core.base.errors import UserError
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.weights.saving import save_model
from seg.backbone import AddpViT
from seg.launch import build_part
from seg.mmseg_config import read_mmseg_config

ARCH = {"width": 16, "depth": 4, "heads": 2}
SIZE = {"img_size": 32, "patch_size": 8}
HEADS: dict[str, dict[str, Any]] = {
    "FCN": {"type": "FCNHead", "in_channels": 16, "in_index": 3, "channels": 8, "num_convs": 1},
    "SETR": {"type": "SETRUPHead", "in_channels": 16, "in_index": 3, "channels": 8, "norm_cfg": {"type": "BN"}},
    "SegFormer": {"type": "SegformerHead", "in_channels": [16] * 4, "in_index": [0, 1, 2, 3], "channels": 8},
    "Segmenter": {
        "type": "SegmenterMaskTransformerHead",
        "in_channels": 16,
        "in_index": 3,
        "channels": 16,
        "num_layers": 1,
        "num_heads": 2,
        "embed_dims": 16,
    },
    "UperNet": {"type": "UPerHead", "in_channels": [16] * 4, "in_index": [0, 1, 2, 3], "channels": 8},
}


@pytest.fixture(scope="module")
def scaled_file(tmp_path_factory):
    """The file of an encoder with layer scale, far from its start."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("scaled") / "model.safetensors"
    encoder = Encoder(EncoderConfig(**ARCH, layer_scale=True), (32, 32), 8)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(encoder, path)
    return path


def segmentor_config(head="FCN", **backbone) -> Config:
    """A config of mmseg with our backbone."""
    model = {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor", "size": (32, 32)},
        "backbone": {"type": "AddpViT", "arch": dict(ARCH), **SIZE, **backbone},
        "decode_head": {**copy.deepcopy(HEADS[head]), "num_classes": 3},
        "test_cfg": {"mode": "whole"},
    }
    return Config({"model": model, "default_scope": "mmseg"})


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_mmseg_train_over_the_backbone(head):
    cfg = segmentor_config(head)
    if head == "UperNet":
        cfg.model.neck = {"type": "MapPyramid", "embed_dim": 16, "rescales": [4, 2, 1, 0.5], "norm_cfg": {"type": "BN"}}
    model = init_model(cfg, device="cpu").train()
    features = model.extract_feat(torch.randn(2, 3, 32, 32))
    logits = model.decode_head(features)
    logits.square().mean().backward()
    assert logits.shape[:2] == (2, 3)
    assert model.backbone.patch_embed.proj.weight.grad.any()


# -------------------- the architecture


def test_the_same_network_is_built_without_the_pretrained_file(scaled_file, tmp_path):
    arch = ARCH | {"layer_scale": True}
    cfg = segmentor_config(arch=arch, init_cfg={"type": "Pretrained", "checkpoint": str(scaled_file)})
    trained = build_part(cfg.model).eval()
    trained.init_weights()
    assert trained.backbone.layers[0].ls1.gamma.std() > 0.1
    torch.save({"meta": {"dataset_meta": {"classes": list("abc")}}, "state_dict": trained.state_dict()}, tmp_path / "f")
    cfg.model.backbone.init_cfg.checkpoint = "gone.safetensors"
    read = init_model(cfg, str(tmp_path / "f"), device="cpu")
    images, metas = torch.randn(1, 3, 32, 32), [{"img_shape": (32, 32)}]
    with torch.no_grad():
        assert torch.equal(read.encode_decode(images, metas), trained.encode_decode(images, metas))


def test_a_missing_architecture_is_demanded_with_the_line_to_write(scaled_file, tmp_path):
    init_cfg = {"type": "Pretrained", "checkpoint": str(scaled_file)}
    line = r"arch=dict\(width=16, depth=4, heads=2, layer_scale=True\), patch_size=8, which is what .*model.safetensors"
    with pytest.raises(UserError, match=f"^arch: not given, expected {line} has$"):
        AddpViT(img_size=32, init_cfg=init_cfg)
    with pytest.raises(UserError, match=r"^arch: not given, expected a size \(tiny, small, base, large\) or dict"):
        AddpViT(img_size=32)


def test_an_architecture_that_is_not_the_files_is_refused(scaled_file):
    for arch, found in {
        "base": "width=768 (the file: 16), depth=12 (the file: 4), heads=12 (the file: 2), layer_scale=False (the ",
        (("width", 16), ("depth", 4), ("heads", 4), ("layer_scale", True)): "heads=4 (the file: 2)",
        (("embed_dims", 16), ("num_layers", 4), ("num_heads", 2)): "layer_scale=False (the file: True)",
    }.items():
        stated = arch if isinstance(arch, str) else dict(arch)
        backbone = AddpViT(stated, **SIZE, init_cfg={"type": "Pretrained", "checkpoint": str(scaled_file)})
        with pytest.raises(UserError) as error:
            backbone.init_weights()
        assert str(error.value).startswith(f"arch: found {found}")
        assert "expects arch=dict(width=16, depth=4, heads=2, layer_scale=True), patch_size=8" in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ({"arch": ARCH}, "layer_scale=True (the config: False)"),
        ({"arch": ARCH | {"layer_scale": True, "heads": 4}, "relative": "none"}, "heads=2 (the config: 4)"),
        ({"arch": ARCH | {"layer_scale": True}, "patch_size": 16}, "patch_size=8 (the config: 16)"),
        ({"arch": ARCH | {"layer_scale": True}, "img_size": 64}, "img_size=32 (the config: 64)"),
    ],
)
def test_a_checkpoint_of_another_backbone_is_refused(tmp_path, backbone, expected):
    torch.manual_seed(0)
    relative = backbone.get("relative", "table")
    model = build_part(segmentor_config(arch=ARCH | {"layer_scale": True}, relative=relative).model)
    torch.save({"meta": {}, "state_dict": model.state_dict()}, tmp_path / "iter_1.pth")
    with pytest.raises(UserError) as error:
        load_checkpoint(build_part(segmentor_config(**backbone).model), str(tmp_path / "iter_1.pth"))
    assert str(error.value).startswith("backbone: the checkpoint has ")
    assert expected in str(error.value)


def test_a_pretrained_encoder_in_the_place_of_a_checkpoint_is_refused(scaled_file, tmp_path):
    """As mmengine's `load_from`, of which nothing would be loaded: the training would start from random weights."""
    model, pickled = build_part(segmentor_config(arch=ARCH | {"layer_scale": True}).model), tmp_path / "model.pth"
    torch.save(load_file(scaled_file), pickled)  # the oldest mmengine reads no safetensors
    with pytest.raises(UserError, match=r"^the checkpoint has an encoder .*; expected it in the backbone's init_cfg="):
        load_checkpoint(model, str(pickled))
    heads = {name: value for name, value in model.state_dict().items() if name.startswith("decode_head.")}
    model.load_state_dict(heads, strict=False)


# -------------------- keywords


def test_keywords_of_mmsegs_vits_mean_the_same():
    arch = {"embed_dims": 16, "num_layers": 4, "num_heads": 2}
    fixed = {
        "norm_cfg": {"type": "LN", "eps": 1e-6},
        "act_cfg": {"type": "GELU"},
        "in_channels": 3,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "drop_rate": 0.0,
        "norm_eval": False,
    }
    theirs = AddpViT(**arch, **fixed, **SIZE, with_cp=True, drop_path_rate=0.1, with_cls_token=False, out_indices=-1)
    ours = AddpViT(ARCH, **SIZE, checkpointing=True, drop_path=0.1, class_token=False, out_indices=[-1])
    assert (theirs.config, theirs.attention, theirs.out_indices) == (ours.config, ours.attention, ours.out_indices)
    assert theirs.checkpointing
    maps = theirs.train()(torch.randn(2, 3, 32, 32))
    maps[0].sum().backward()
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 16, 4, 4)]


def test_frozen_stages_are_neither_trained_nor_dropped():
    backbone = AddpViT(ARCH, **SIZE, drop_path=0.5, frozen_stages=2).train()
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    prefixes = {".".join(name.split(".")[:2]) if name.startswith("layers") else name.split(".")[0] for name in frozen}
    assert prefixes == {"cls_token", "pos_embed", "patch_embed", "layers.0", "layers.1", "norm"}
    assert [layer.training for layer in backbone.layers] == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"arch": "bas"}, "arch: found 'bas', expected a size (tiny, small, base, large) or dict"),
        ({"arch": {"width": 16, "dept": 4, "heads": 2}}, "arch: unknown key 'dept'; did you mean 'depth'?"),
        ({"arch": {"width": 16, "heads": 2}}, "arch: depth missing; expected a size"),
        ({"arch": {"width": 16, "depth": 4, "heads": 3}}, "arch: heads: "),
        ({"drop_path_rat": 0.1}, "drop_path_rat: AddpViT has no such keyword; did you mean 'drop_path_rate'?"),
        (
            {"norm_cfg": {"type": "BN"}},
            "norm_cfg: found {'type': 'BN'}, but the encoder has {'type': 'LN', 'eps': 1e-06}",
        ),
        ({"relative": "tabel"}, "relative: found 'tabel', expected one of none, decomposed, table"),
        ({"init_values": 0.1}, "init_values: AddpViT has no such keyword"),
        ({"mlp_ratio": 2}, "mlp_ratio: found 2, but the encoder has 4; leave the keyword out"),
        ({"drop_path": 0.1, "drop_path_rate": 0.2}, "drop_path_rate: found drop_path too"),
        ({"embed_dims": 16}, "embed_dims: found arch too"),
        ({"init_cfg": {"type": "Xavier"}}, "init_cfg: found {'type': 'Xavier'}, expected dict(type='Pretrained'"),
        ({"out_indices": 9}, "out_indices: found [9], expected blocks of 0 to 3"),
        ({"frozen_stages": 5}, "frozen_stages: found 5, expected -1 (none) to 4 (all blocks)"),
        ({"img_size": 36}, "img_size: "),
    ],
)
def test_mistakes_in_the_config_are_one_line(options, expected):
    with pytest.raises(UserError) as error:
        MODELS.build({"type": "AddpViT", "arch": ARCH, **SIZE} | options)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_a_wrong_pretrained_file_is_one_line(tmp_path):
    (tmp_path / "page.pth").write_text("<html>")
    for checkpoint, expected in ((tmp_path / "no.pth", "no such file"), (tmp_path / "page.pth", "not a checkpoint")):
        with pytest.raises(UserError, match=expected):
            AddpViT(ARCH, **SIZE, pretrained=str(checkpoint)).init_weights()


# -------------------- layer decay


def test_mmsegs_layer_decay_finds_the_layers():
    model = init_model(segmentor_config(), device="cpu")
    wrapper: dict[str, Any] = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1}}
    theirs = {"constructor": "LearningRateDecayOptimizerConstructor"}
    theirs["paramwise_cfg"] = {"num_layers": 4, "decay_rate": 0.5, "decay_type": "layer_wise"}
    ours = {"constructor": "LayerDecay", "paramwise_cfg": {"decay_rate": 0.5}}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = []
    for how in (theirs, ours):
        groups = build_optim_wrapper(model, wrapper | how).optimizer.param_groups
        rates.append({names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]})
    assert rates[0] == rates[1]
    assert [rates[0][f"backbone.layers.{i}.mlp.fc1.weight"] for i in range(4)] == [0.5**k for k in (4, 3, 2, 1)]
    assert rates[0]["backbone.pos_embed"] == rates[0]["backbone.patch_embed.proj.bias"] == 0.5**5
    assert rates[0]["decode_head.conv_seg.weight"] == 1
    assert all(name.startswith("backbone.encoder.") for name in model.state_dict() if name.startswith("backbone."))


def test_the_config_of_the_page_builds_over_mmsegs_own(tmp_path):
    """The first block of docs/mmseg.md, beside mmseg's configs, with a small ViT."""
    page = (Path(__file__).parents[2] / "docs" / "mmseg.md").read_text(encoding="utf-8")
    folder = tmp_path / "configs" / "addp"
    folder.mkdir(parents=True)
    (folder.parent / "_base_").symlink_to(Path(mmseg.__file__).parent / ".mim" / "configs" / "_base_")
    (folder / "upernet.py").write_text(page.split("```python\n")[1].split("```")[0])
    cfg = Config.fromfile(folder / "upernet.py")
    assert cfg.optim_wrapper.constructor == "LearningRateDecayOptimizerConstructor"
    small = {"arch": ARCH, "patch_size": 8, "img_size": 32, "out_indices": (0, 1, 2, 3)}
    cfg.model.backbone.update(small)
    cfg.model.neck.update(embed_dim=16, norm_cfg={"type": "BN"})
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.update(channels=8, norm_cfg={"type": "BN"}, in_channels=[16] * 4 if head.type == "UPerHead" else 16)
    logits = init_model(cfg, device="cpu").encode_decode(torch.randn(1, 3, 32, 32), [{"img_shape": (32, 32)}])
    assert tuple(logits.shape) == (1, 150, 32, 32)


def test_the_config_for_mmsegs_tools_needs_none_of_our_runner():
    cfg = read_mmseg_config()
    assert cfg.runner_type == "Runner"
    assert cfg.train_dataloader.dataset.pipeline[0].type == "LoadImageFromFile"
    assert "seg.runner" not in cfg.custom_imports.imports
