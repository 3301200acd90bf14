"""`timm.create_model` with files of ours, published and foreign: the architecture comes from the file."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import load_checkpoint, save_for_hf
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from tiny import WINDOWED, tiny_addp, tiny_encoder

import cls  # noqa: F401 (registers the models)
from addp_core import load_encoder, save_model, save_published
from addp_core.base.errors import UserError
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.weights.loading import load_classifier

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def images(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def classifier(norm="layer", **options):
    """Return a classifier of three classes with four heads, which its tensors do not tell, far from initialization."""
    torch.manual_seed(0)
    model = Classifier(Encoder(EncoderConfig(32, 2, 4), (32, 32), 8), 3, norm=norm, **options)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.fc_norm.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor).abs())
    return model.eval()


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run of `addp finetune`, with its model."""
    model = classifier(class_names=("cat", "dog", "owl"), crop=0.9)
    (tmp_path / "ft").mkdir()
    save_model(model, tmp_path / "ft" / "model.safetensors")
    return tmp_path / "ft", model


@pytest.fixture
def addp_file(tmp_path):
    """Return the file of a pretrained ADDP of 8 x 8 px."""
    save_model(tiny_addp(image_size=(8, 8)), tmp_path / "addp.safetensors")
    return tmp_path / "addp.safetensors"


# -------------------- the architecture of the file


@pytest.mark.parametrize("way", ["checkpoint_path", "file", "folder"])
def test_a_runs_classifier_comes_with_its_architecture_and_head(run, way):
    folder, expected = run
    options = {
        "checkpoint_path": {"checkpoint_path": str(folder / "model.safetensors")},
        "file": {"pretrained": True, "pretrained_cfg_overlay": {"file": str(folder / "model.safetensors")}},
        "folder": {"pretrained": True, "pretrained_cfg_overlay": {"file": str(folder)}},
    }[way]
    model = timm.create_model("addp_vit", **options).eval()
    torch.testing.assert_close(model(images()), expected(images()), **CLOSE)
    found = {key: model.pretrained_cfg[key] for key in ("input_size", "crop_pct", "label_names", "num_classes")}
    assert found == {
        "input_size": (3, 32, 32),
        "crop_pct": 0.9,
        "label_names": ("cat", "dog", "owl"),
        "num_classes": 3,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "token"},
        {"norm": "batch"},
        {"norm": "batch", "feature_norm": "layer"},
        {"norm": "batch", "feature_norm": "pretrained", "pooling": "token"},
    ],
)
def test_poolings_and_linear_probes(tmp_path, options):
    expected = classifier(**options)
    save_model(expected, tmp_path / "c.safetensors")
    model = timm.create_model("addp_vit", checkpoint_path=tmp_path / "c.safetensors").eval()
    torch.testing.assert_close(model(images()), expected(images()), **CLOSE)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout", ["ours", "published"])
def test_encoders_of_whole_models(tmp_path, addp_file, layout, norm, caplog):
    path = addp_file
    if layout == "published":
        path = tmp_path / "published.pth"
        save_published(tiny_addp(image_size=(8, 8)), path)
    model = timm.create_model("addp_vit", checkpoint_path=path, pre_norm=norm, num_classes=7).eval()
    expected = load_encoder(addp_file, 8, tokenizer_norm=norm)
    torch.testing.assert_close(model.forward_features(images(8)), expected.forward_features(images(8)), **CLOSE)
    assert [record.getMessage() for record in caplog.records] == (
        []
        if norm
        else [f"{path}: left out its norm on the patches, as the published transfers do; pre_norm=True keeps it"]
    )
    assert model.head.out_features == 7


def test_a_pretrained_file_without_pretrained_gives_the_architecture_and_says_so(run, caplog):
    """As timm's train.py with --pretrained-path and no --pretrained."""
    folder, own = run
    model = timm.create_model("addp_vit", pretrained_cfg_overlay={"file": str(folder)})
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads, model.num_classes) == (32, 2, 4, 3)
    assert not torch.equal(model.patch_embed.proj.weight, own.encoder.patch_embed.proj.weight)
    assert caplog.messages == [f"{folder}: took its architecture but not its weights, which pretrained=True loads"]


def test_positions_are_resampled_as_by_load_encoder(addp_file):
    model = timm.create_model("addp_vit", checkpoint_path=addp_file, img_size=12)
    assert torch.equal(model.pos_embed, load_encoder(addp_file, 12).pos_embed)


def test_a_name_with_a_size_keeps_its_image_size_and_says_so(tmp_path, caplog):
    size = {"width": 192, "depth": 12, "heads": 3}
    save_model(Classifier(Encoder(EncoderConfig(**size), (32, 32)), 3), tmp_path / "t.safetensors")
    model = timm.create_model("addp_vit_tiny_patch16", checkpoint_path=tmp_path / "t.safetensors")
    assert model.patch_embed.img_size == (224, 224)
    assert caplog.messages == [
        f"{tmp_path / 't.safetensors'}: a classifier of 32 x 32 px images: resampled its positions to 224 x 224 px"
    ]


def test_features_only(run, addp_file):
    folder, expected = run
    options = {"features_only": True, "out_indices": (0,)}
    path = folder / "model.safetensors"
    found = timm.create_model("addp_vit", checkpoint_path=path, **options).eval()
    torch.testing.assert_close(found(images()), expected.encoder.forward_maps(images(), [0]), **CLOSE)
    again = timm.create_model("addp_vit", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **options)
    torch.testing.assert_close(again.eval()(images()), found(images()))
    again.load_state_dict(found.state_dict())  # its own layout
    model = timm.create_model("addp_vit", checkpoint_path=addp_file, **options).eval()
    torch.testing.assert_close(model(images(8)), load_encoder(addp_file, 8).forward_maps(images(8), [0]), **CLOSE)


def test_channels_other_than_three(run, caplog):
    model = timm.create_model("addp_vit", checkpoint_path=run[0] / "model.safetensors", in_chans=1)
    torch.testing.assert_close(
        model.patch_embed.proj.weight, run[1].encoder.patch_embed.proj.weight.sum(1, keepdim=True)
    )
    assert "fitted the patch embedding of 3 channels to 1" in caplog.text


def test_a_model_that_timm_saves_keeps_the_architecture(run, tmp_path):
    model = timm.create_model("addp_vit", checkpoint_path=run[0] / "model.safetensors")
    save_for_hf(model, tmp_path / "saved")
    if "model_args" not in json.loads((tmp_path / "saved/config.json").read_text()):
        pytest.skip(f"timm {timm.__version__} saves no arguments of a model (1.0.31 does)")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    torch.testing.assert_close(again(images()), run[1](images()), **CLOSE)


# -------------------- heads


def test_the_head_of_a_file_is_loaded_only_if_it_fits(run, caplog):
    path = run[0] / "model.safetensors"
    for options in ({"num_classes": 7}, {"num_classes": 7, "global_pool": "token"}):
        model = timm.create_model("addp_vit", checkpoint_path=path, **options)
        assert torch.equal(model.fc_norm.weight, run[1].fc_norm.weight)
        assert model.head.weight.abs().max() < 1e-3
        assert caplog.messages == [f"{path}: left out its head for 3 classes"]
        caplog.clear()
    timm.create_model("addp_vit", checkpoint_path=path, num_classes=0)
    assert not caplog.messages


# -------------------- files of others


def test_timms_files_take_the_heads_of_the_name(tmp_path):
    torch.manual_seed(0)
    vit = VisionTransformer(**SHAPE, num_classes=5, global_pool="avg").eval()
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "last.pth.tar")
    model = timm.create_model("addp_vit", checkpoint_path=tmp_path / "last.pth.tar", num_heads=2, img_size=32).eval()
    torch.testing.assert_close(model(images()), vit(images()), **CLOSE)
    with pytest.raises(UserError, match=r"no published ViT has width 64.*expected num_heads=<number>"):
        timm.create_model("addp_vit", checkpoint_path=tmp_path / "last.pth.tar")


def test_models_and_checkpoints_of_timm_go_on_loading(run, tmp_path):
    """Its scripts load state dicts after they have built the model, without the metadata of a file."""
    path, expected = run[0] / "model.safetensors", run[1](images())
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    model = timm.create_model("addp_vit", **shape).eval()
    load_checkpoint(model, str(path))
    torch.testing.assert_close(model(images()), expected, **CLOSE)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    again = timm.create_model(
        "addp_vit", checkpoint_path=tmp_path / "own.safetensors", **shape | {"global_pool": "token"}
    )
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({"head.bias": torch.zeros(3)})
    with pytest.raises(UserError, match=r"found patch_size=16, embed_dim=768, depth=12 \(addp_vit\)"):
        load_checkpoint(timm.create_model("addp_vit"), str(path))


def test_pretrained_loads_the_published_file(tmp_path, monkeypatch):
    save_published(tiny_addp(image_size=(8, 8)), tmp_path / "published.pth")
    requested = []

    def fetch(repository, filename, **_):
        requested.append((repository, filename))
        return str(tmp_path / "published.pth")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetch)
    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
    for size in ("base", "large"):
        for options in ({"in_chans": 1, "num_classes": 5}, {"features_only": True, "out_indices": (1,)}):
            found = timm.create_model(f"addp_vit_{size}_patch16", pretrained=True, **shape, **options)
            expected = tiny_addp(image_size=(8, 8)).denoiser.encoder.cls_token
            assert torch.equal(getattr(found, "model", found).cls_token, expected)
    assert set(requested) == {("Changyao/ADDP", f"addp-vit-{size}-16.pth") for size in ("base", "large")}
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("addp_vit_tiny_patch16", pretrained=True, **shape)


# -------------------- contradictions


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("addp_vit", {"num_heads": 8}, r"found num_heads=8 \(addp_vit\), expected num_heads=4 as in the file"),
        ("addp_vit", {"global_pool": "token"}, "found global_pool=token .*expected global_pool=avg"),
        ("addp_vit", {"pre_norm": False, "init_values": 1e-5}, "found init_values=1e-05 .*expected init_values=None"),
        ("addp_vit", {"class_token": False}, "found class_token=False .*expected class_token=True"),
        ("addp_vit_tiny_patch16", {}, "embed_dim=192, depth=12, num_heads=3 .*embed_dim=32, depth=2, num_heads=4"),
        ("addp_vit_tiny_patch16", {}, "the name addp_vit without these arguments takes them from it"),
    ],
)
def test_what_contradicts_a_file_is_refused(run, name, options, message):
    path = run[0] / "model.safetensors"
    for way in (
        {"checkpoint_path": path},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": run[0]}},
    ):
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*{message}"):
            timm.create_model(name, **way, **options)


def test_files_that_timm_cannot_hold_or_read(run, tmp_path):
    save_model(tiny_encoder(WINDOWED), tmp_path / "windows.safetensors")
    beit = Beit(32, 8, embed_dim=64, depth=1, num_heads=2, num_classes=0, use_rel_pos_bias=True)
    torch.save(beit.state_dict(), tmp_path / "beit.pth")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for path, message in {
        run[0]: rf"checkpoint_path: found {run[0]}, but timm reads files only; expected {run[0]}/model.safetensors",
        "zoo:cifar10": "files only; expected pretrained=True, pretrained_cfg_overlay={'file': 'zoo:cifar10'}",
        tmp_path / "windows.safetensors": "windows or relative positions",
        tmp_path / "beit.pth": "windows or relative positions",
        tmp_path / "other.pth": "unknown content",
        tmp_path / "model.safetensors": "no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            timm.create_model("addp_vit", checkpoint_path=path)


# -------------------- and back


def test_what_timm_trains_tells_its_architecture(run, tmp_path):
    """Also under the name `addp_vit`, which says nothing about it."""
    folder, expected = run
    model = timm.create_model("addp_vit", pretrained=True, num_classes=3, pretrained_cfg_overlay={"file": str(folder)})
    torch.save({"state_dict": model.state_dict(), "arch": "addp_vit"}, tmp_path / "last.pth.tar")
    again = load_classifier(tmp_path / "last.pth.tar")
    assert (again.encoder.config.heads, again.pooling, again.crop) == (4, "avg", 0.9)
    assert torch.equal(again(images()), expected(images()))
    with pytest.raises(UserError, match="was trained with 4 attention heads"):
        load_encoder(tmp_path / "last.pth.tar", encoder_heads=8)
    overlay = {"file": str(tmp_path / "last.pth.tar")}
    with pytest.raises(UserError, match="num_heads=8"):
        timm.create_model("addp_vit", pretrained=True, num_heads=8, pretrained_cfg_overlay=overlay)
