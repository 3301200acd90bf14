"""What normalizes the features of linear probing: the key `norm` in both modes, and the parts of the batch norm."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_addp
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transfers import write_color_images

from addp_core import load_encoder, save_model
from addp_core.data.images import eval_transform
from addp_core.data.sources import open_source
from addp_core.networks.classifier import Classifier, normalize
from addp_core.recipes.cli import main
from addp_core.weights.layouts.vit import to_timm
from addp_core.weights.loading import load_classifier
from cls.probing.full import LinearProbe

HW = (8, 12)
FULL = ("mode=full", "train.steps=6", "train.batch=12", "train.warmup_epochs=0", "train.optimizer=sgd", "train.lr=0.2")
FAST = ("mode=fast", "fast.epochs=2", "fast.knn=0", "fast.blocks=[2]", "fast.store=float32")


pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Images of three colors, and an ADDP of two blocks whose final norm is not at its initial values."""
    root = tmp_path_factory.mktemp("files")
    write_color_images(root / "data", hw=HW, train=8, val=4)
    model = tiny_addp(HW)
    generator = torch.Generator().manual_seed(0)
    norm = model.denoiser.encoder.norm
    norm.weight.data, norm.bias.data = (torch.randn(2, *norm.weight.shape, generator=generator)).unbind()
    save_model(model, root / "model.safetensors")
    return root


def linprobe(files: Path, out: Path, *settings: str) -> int:
    """Run `addp linprobe`, and return its exit code."""
    keys = {"model": files / "model.safetensors", "data": files / "data", "data.size": "[8,12]", "data.workers": 0}
    keys |= {"out": out} | dict(setting.split("=", 1) for setting in settings)
    return main(["linprobe", *(f"{key}={value}" for key, value in keys.items())])


def assert_refused(capsys, code: int, *parts: str) -> None:
    """Check that the exit code is 2 and that the message contains all `parts`."""
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in line for part in parts), line


def features(files: Path, pooling: str, norm: str) -> Tensor:
    """Return the normalized features of the validation images, Float[n,W], computed step by step."""
    encoder, val = load_encoder(files / "model.safetensors", HW), open_source(str(files / "data"), "val")
    pixels = torch.stack([eval_transform(HW, 0.875)(val.open_image(i)[0]) for i in range(len(val))])
    with torch.no_grad():
        tokens = encoder.forward_features(normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        if norm == "pretrained":
            tokens = encoder.norm(tokens)
        pooled = tokens[:, 1:].mean(1) if pooling == "avg" else tokens[:, 0]
        return layer_norm(pooled, pooled.shape[1:], eps=1e-6) if norm == "layer" else pooled


@pytest.mark.parametrize(("pooling", "norm"), [("avg", "layer"), ("token", "pretrained"), ("avg", "pretrained")])
def test_both_modes_normalize_features_as_mae_does(files, tmp_path, pooling, norm):
    expected = features(files, pooling, norm)
    assert linprobe(files, tmp_path / "fast", *FAST, f"fast.poolings=[{pooling}]", f"norm={norm}") == 0
    (bank,) = (tmp_path / "fast" / "features").glob("val-*")
    stored = load_file(bank / "00000.safetensors")[f"block2.{pooling}"][:, 0]
    torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "fast" / "results.json").read_text())["norm"] == norm

    assert linprobe(files, tmp_path / "full", *FULL, f"pooling={pooling}", f"norm={norm}") == 0
    val = open_source(str(files / "data"), "val")
    pixels = torch.stack([eval_transform(HW, 0.875)(val.open_image(i)[0]) for i in range(len(val))])
    for mode in ("fast", "full"):
        model = load_classifier(tmp_path / mode)
        assert model.feature_norm == norm
        with torch.no_grad():
            found = model.forward_head(model.forward_features(normalize(pixels, model.mean, model.std)), True)
        torch.testing.assert_close(found, model.fc_norm(expected), rtol=1e-3, atol=1e-4)


def test_a_classifier_from_before_the_key_has_no_norm(files, tmp_path):
    encoder = load_encoder(files / "model.safetensors", HW)
    save_model(Classifier(encoder, 3, norm="batch", feature_norm="layer"), tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        description = json.loads(file.metadata()["addp"])
    assert description["architecture"].pop("feature_norm") == "layer"
    save_file(load_file(tmp_path / "new.safetensors"), tmp_path / "old.safetensors", {"addp": json.dumps(description)})
    assert load_classifier(tmp_path / "new.safetensors").feature_norm == "layer"
    assert load_classifier(tmp_path / "old.safetensors").feature_norm == "none"


@pytest.mark.parametrize(("pooling", "norm"), [("avg", "layer"), ("token", "pretrained"), ("avg", "none")])
def test_timm_gives_the_same_logits(files, pooling, norm):
    model = Classifier(load_encoder(files / "model.safetensors", HW), 3, pooling, "batch", feature_norm=norm).eval()
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.fc_norm.running_mean)
    state, arguments = to_timm(model)
    other = timm.models.VisionTransformer(**arguments).eval()
    other.load_state_dict(state)
    images = torch.randn(2, 3, *HW, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images), rtol=1e-4, atol=1e-4)


# -------------------- the parts of the batch norm


def test_parts_of_the_batch_norm_are_those_of_separate_gpus(files):
    torch.manual_seed(0)
    classifier = Classifier(load_encoder(files / "model.safetensors", HW), 3, norm="batch")
    rows = 3 * torch.randn(12, 16) + 1
    found = LinearProbe(classifier, batch_norm=4).train()(rows)
    gpus = [nn.BatchNorm1d(16, affine=False, eps=1e-6) for _ in range(3)]
    expected = classifier.head(torch.cat([gpu(part) for gpu, part in zip(gpus, rows.split(4), strict=True)]))
    torch.testing.assert_close(found, expected)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(gpu, name) for gpu in gpus]).mean(0)
        torch.testing.assert_close(getattr(classifier.fc_norm, name), mean)


def test_parts_of_the_batch_norm_do_not_depend_on_accumulation(files, tmp_path):
    heads = {}
    for name, settings in {"one": (), "three": ("train.accumulate=3",), "whole": ("batch_norm=null",)}.items():
        assert linprobe(files, tmp_path / name, *FULL, "batch_norm=4", *settings) == 0
        heads[name] = load_file(tmp_path / name / "model.safetensors")["head.weight"]
    torch.testing.assert_close(heads["three"], heads["one"], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(heads["whole"], heads["one"], atol=1e-3)


# -------------------- wrong input


def test_a_missing_final_norm_is_refused(files, tmp_path, capsys):
    encoder = load_encoder(files / "model.safetensors", HW)
    save_model(Classifier(encoder, 3), tmp_path / "finetuned.safetensors")
    encoder.norm.reset_parameters()
    save_model(encoder, tmp_path / "untrained.safetensors")
    for name, reason in (("untrained", "no trained final norm"), ("finetuned", "fine-tuned without its final norm")):
        path = tmp_path / f"{name}.safetensors"
        capsys.readouterr()
        code = linprobe(files, tmp_path / name, *FULL, "norm=pretrained", f"model={path}")
        assert_refused(capsys, code, str(path), reason, "norm=layer")


def test_parts_must_divide_the_batch(files, tmp_path, capsys, caplog):
    assert_refused(capsys, linprobe(files, tmp_path / "a", *FULL, "batch_norm=5"), "batch_norm: found 5", "batch=12")
    assert linprobe(files, tmp_path / "b", *FULL, "train.steps=1", "batch_norm=512") == 0
    assert "batch_norm=512: a batch has 12 images" in caplog.text
