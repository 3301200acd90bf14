"""`addp export` to timm and ONNX: others read it, without this project, and get the same numbers."""

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny_addp

from addp_core import load_encoder, save_model, save_published
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main
from addp_core.weights.files import MODEL_FILE
from addp_core.weights.loading import load_classifier

NAMES = ("ant", "bee", "cat")
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="needs the extra onnx: pip install 'addp[onnx]'",
)


def classifier(path, pooling="avg", norm="layer", image_size=(32, 32), **options):
    """A file of a classifier with weights far from their start."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(64, 2, 2, **options), image_size, 8)
    model = Classifier(encoder, len(NAMES), pooling, norm, NAMES, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if norm == "batch":
            model.fc_norm.running_mean.normal_()
            model.fc_norm.running_var.uniform_(0.5, 2)
    save_model(model, path)
    return path


def export(source, out, **settings):
    return main(["export", f"model={source}", f"out={out}", *[f"{key}={value}" for key, value in settings.items()]])


def wrong(capsys, source, out, *words, **settings):
    capsys.readouterr()
    assert export(source, out, **settings) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("addp: ")]
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "token", "layer_scale": True},
        {"tokenizer_norm": True, "image_size": (32, 48)},
        {"norm": "batch"},
    ],
    ids=["fine-tuned", "class token, layer scale", "tokenizer_norm, oblong", "linear probe"],
)
def test_timm_reads_a_classifier(tmp_path, options):
    source = classifier(tmp_path / "c.safetensors", **options)
    assert export(source, tmp_path / "timm", layout="timm") == 0
    vit = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert type(vit) is VisionTransformer
    model = load_classifier(source)
    images = torch.randn(3, 3, *model.encoder.image_size)
    torch.testing.assert_close(vit(images), model(images), **CLOSE)
    data = timm.data.resolve_model_data_config(vit)
    assert tuple(data["input_size"]) == (3, *model.encoder.image_size)
    assert (tuple(data["mean"]), tuple(data["std"])) == (model.mean, model.std)
    assert tuple(vit.pretrained_cfg["label_names"]) == NAMES
    assert data["crop_pct"] == 0.875


def test_the_crop_of_its_validation_is_told(tmp_path):
    model = load_classifier(classifier(tmp_path / "c.safetensors"))
    model.crop = 1.0
    save_model(model, tmp_path / "c.safetensors")
    assert export(tmp_path / "c.safetensors", tmp_path / "timm", layout="timm") == 0
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == 1.0


READER = """
import json, sys
import timm, torch
from safetensors.torch import load_file, save_file
images, tokens = load_file("images.safetensors")["images"], {}
for name in ("plain", "normed"):
    model = timm.create_model(f"local-dir:{name}", pretrained=True, num_classes=7).eval()
    tokens[name] = model.forward_features(images).detach()
    assert model(images).shape == (2, 7)
save_file(tokens, "tokens.safetensors")
assert not any(name.split(".")[0] in ("addp_core", "cls", "tools") for name in sys.modules)
"""


def test_timm_alone_reads_an_encoder_and_tunes_it(tmp_path):
    """A fresh interpreter that cannot import this project puts a head of its own on the encoder, with or without
    ADDP's norm in front.
    """
    model = tiny_addp(image_size=(32, 32))
    save_published(model, tmp_path / "addp.pth")
    options = {"layout": "timm", "img_size": 48, "encoder_heads": 2}
    assert export(tmp_path / "addp.pth", tmp_path / "plain", **options) == 0
    assert export(tmp_path / "addp.pth", tmp_path / "normed", **options, tokenizer_norm="true") == 0
    images = torch.randn(2, 3, 48, 48)
    save_file({"images": images}, tmp_path / "images.safetensors")
    paths = [path for path in sys.path if path.endswith("site-packages")]
    # -S leaves out .pth files: an editable install of this project is out of reach
    run = [sys.executable, "-S", "-c", READER]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens = load_file(tmp_path / "tokens.safetensors")
    for name in ("plain", "normed"):
        encoder = load_encoder(tmp_path / "addp.pth", 48, encoder_heads=2, tokenizer_norm=name == "normed")
        torch.testing.assert_close(tokens[name], encoder.forward_features(images), **CLOSE)


def test_an_encoder_is_exported_at_its_own_image_size(tmp_path, caplog):
    """A run of 64 px is no model of 224 px."""
    model = tiny_addp(image_size=(64, 48))
    save_model(model, tmp_path / "run.safetensors")
    with caplog.at_level(logging.INFO, "addp"):
        assert export(tmp_path / "run.safetensors", tmp_path / "timm", layout="timm") == 0
    assert "an encoder for images of 64 x 48 px, its own size (img_size sets another)" in caplog.text
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 48]
    positions = load_file(tmp_path / "timm" / MODEL_FILE)["pos_embed"]
    assert torch.equal(positions, model.denoiser.encoder.pos_embed)
    assert export(tmp_path / "run.safetensors", tmp_path / "half", layout="timm", normalisation="half") == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["pretrained_cfg"]["mean"] == [0.5] * 3


def test_a_foreign_classifier_keeps_its_head_and_a_checkpoint_of_several_tells_which(tmp_path):
    first, second = (VisionTransformer(32, 8, embed_dim=192, depth=1, num_heads=3, num_classes=3) for _ in range(2))
    torch.save({"model": first.state_dict(), "model_ema": second.state_dict()}, tmp_path / "v.pth")
    for weights, vit in (("model", first), ("ema", second)):
        assert export(tmp_path / "v.pth", tmp_path / weights, layout="timm", weights=weights) == 0
        again = timm.create_model(f"local-dir:{tmp_path / weights}", pretrained=True).eval()
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(again(images), vit.eval()(images), **CLOSE)
        out = tmp_path / f"{weights}.safetensors"
        assert export(tmp_path / "v.pth", out, layout="encoder", weights=weights) == 0
        tokens = vit.norm(load_encoder(out, 32).forward_features(images))
        torch.testing.assert_close(tokens, vit.forward_features(images), **CLOSE)


def test_the_differences_are_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "addp"):
        export(classifier(tmp_path / "c.safetensors"), tmp_path / "timm", layout="timm")
    assert "logits differ from PyTorch's by at most" in caplog.text
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["architecture"] == "vit_base_patch16_224"
    assert config["num_classes"] == 3


def test_the_model_is_not_overwritten(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    save_model(tiny_addp(), run / MODEL_FILE)
    before = (run / MODEL_FILE).read_bytes()
    wrong(capsys, run, run, "out: ", "is the model itself", layout="timm")
    wrong(capsys, run, run / MODEL_FILE, "is the model itself", layout="encoder")
    wrong(capsys, run / MODEL_FILE, run, "is the model itself", layout="timm")
    wrong(capsys, run / MODEL_FILE, run / "x" / ".." / MODEL_FILE, "is the model itself")
    assert (run / MODEL_FILE).read_bytes() == before
    os.link(run / MODEL_FILE, run / "model.pth")
    wrong(capsys, run / "model.pth", run, "is the model itself", layout="mmseg")


def test_an_export_that_differs_is_refused_and_removed(tmp_path, monkeypatch):
    from tools.export import timm_folder as module

    original = module.to_timm

    def broken(model):
        state, arguments = original(model)
        return state | {"head.bias": state["head.bias"] + 1}, arguments

    monkeypatch.setattr(module, "to_timm", broken)
    assert export(classifier(tmp_path / "c.safetensors"), tmp_path / "timm", layout="timm") == 1
    assert not any((tmp_path / "timm").iterdir())


def test_what_timm_cannot_hold(tmp_path, capsys):
    encoder = Encoder(EncoderConfig(64, 2, 2), (32, 32), 8, AttentionConfig(relative="table"))
    save_model(encoder, tmp_path / "beit.safetensors")
    options = {"layout": "timm", "img_size": 32}
    wrong(capsys, tmp_path / "beit.safetensors", tmp_path / "timm", "relative positions", "layout=onnx", **options)
    source = classifier(tmp_path / "c.safetensors")
    wrong(capsys, source, tmp_path / "timm.onnx", "expected a folder", layout="timm")
    wrong(capsys, source, tmp_path / "timm", "img_size", "multiples of the patch size 8", layout="timm", img_size=30)
    wrong(
        capsys, source, tmp_path / "timm", "tokenizer_norm", "leave the key out", layout="timm", tokenizer_norm="true"
    )
    wrong(capsys, source, tmp_path / "m.safetensors", "img_size", "layout=timm or onnx", img_size=32)
    wrong(capsys, source, tmp_path / "timm", "predictor", "layout=addp or published", layout="timm", predictor="p.pth")
    wrong(capsys, source, tmp_path / "timm", "encoder_heads=4", "stores 2", layout="timm", encoder_heads=4)
    wrong(capsys, source, tmp_path / "m.safetensors", "this is the checkpoint of a fine-tuned classifier")
    assert not (tmp_path / "timm").exists()


@needs_onnx
def test_onnx_of_any_batch(tmp_path):
    import onnxruntime

    source = classifier(tmp_path / "c.safetensors", tokenizer_norm=True)
    assert export(source, tmp_path / "c.onnx", layout="onnx", img_size=40) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"c.safetensors", "c.onnx"}
    session = onnxruntime.InferenceSession(str(tmp_path / "c.onnx"))
    model = load_classifier(source, 40)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 40, 40)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), **CLOSE)
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert about == {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "class_names": [*NAMES]}


def test_onnx_names_what_it_lacks(tmp_path, capsys, monkeypatch):
    from tools.export import onnx_file as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxruntime" else find_spec("json"))
    wrong(
        capsys,
        classifier(tmp_path / "c.safetensors"),
        tmp_path / "c.onnx",
        "not installed: onnxruntime",
        "pip install 'addp[onnx]'",
        layout="onnx",
    )
