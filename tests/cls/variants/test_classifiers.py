"""The classifiers that `addp robustness` takes: foreign files with their heads, models of timm, and timm's folders."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from transfers import write_color_images

from addp_core.data.images import eval_transform
from addp_core.data.sources import open_source
from addp_core.networks.classifier import Classifier, normalize
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main
from addp_core.weights.saving import save_model
from cls.variants.classifiers import open_classifier
from cls.variants.recipe import Recipe

COLORS = {"0": (40, 60, 200), "1": (50, 190, 60), "2": (200, 50, 50)}
VIT, RESNET = "vit_tiny_patch16_224", "test_resnet"


def timm_model(name: str, seed: int, **options: Any) -> nn.Module:
    """Return a model of three classes with random weights."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=3, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Images of three classes, MAE's fine-tuned ViT, and timm's checkpoint of a ResNet with averaged weights."""
    root = tmp_path_factory.mktemp("files")
    write_color_images(root / "data", COLORS, (32, 32), noise=90, train=1, val=20)
    torch.save({"model": timm_model(VIT, 0, img_size=32, global_pool="avg").state_dict()}, root / "mae.pth")
    states = {"state_dict": timm_model(RESNET, 1).state_dict(), "state_dict_ema": timm_model(RESNET, 2).state_dict()}
    torch.save({"epoch": 3, "arch": RESNET, "args": Namespace(model=RESNET), **states}, root / "last.pth.tar")
    return root


def command(files: Path, out: Path, **keys: Any) -> list[str]:
    keys = {"val": files / "data", "out": out, "workers": 0, **keys}
    return ["robustness", *(f"{key}={value}" for key, value in keys.items())]


def top1(out: Path) -> float:
    return json.loads((out / "results.json").read_text())["rows"][0]["top1"]


def expected_top1(files: Path, model: nn.Module, size: int, crop: float, mean: Any, std: Any) -> float:
    """Return the top-1 accuracy on the validation images, computed step by step."""
    val = open_source(str(files / "data"), "val")
    pixels = torch.stack([eval_transform(size, crop)(val.open_image(i)[0]) for i in range(len(val))])
    with torch.no_grad():
        predictions = model(normalize(pixels, mean, std)).argmax(1)
    return 100 * (predictions == torch.tensor(val.labels)).float().mean().item()


def assert_refused(capsys, arguments: list[str], *parts: str) -> None:
    """Check that the exit code is 2 and that the message contains all `parts`."""
    capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("addp: ")
    assert all(part in line for part in parts), line


def test_timm_and_our_reader_agree_on_a_fine_tuned_vit(files, tmp_path):
    own = open_classifier(Recipe(str(files / "mae.pth"), "out", crop=0.9))
    other = open_classifier(
        Recipe(f"timm:{VIT}", "out", checkpoint=str(files / "mae.pth"), size=32, crop=0.9, normalisation="imagenet")
    )
    assert (own.hw, own.crop, own.mean, own.std) == (other.hw, other.crop, other.mean, other.std)
    assert own.hw == (32, 32)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = timm_model(VIT, 0, img_size=32, global_pool="avg")(images)
        for found in (own.model(images), other.model(images)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    keys = {"model": f"timm:{VIT}", "checkpoint": files / "mae.pth", "size": 32, "crop": 0.9}
    assert main(command(files, tmp_path, **keys)) == 0
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # of timm's weights of this name
    assert top1(tmp_path) == pytest.approx(
        expected_top1(files, timm_model(VIT, 0, img_size=32, global_pool="avg"), 32, 0.9, *half)
    )


def test_a_checkpoint_of_timms_own_training(files, tmp_path, caplog):
    """Size, crop and normalization are those of timm's weights, and logged; the averaged weights are offered."""
    keys = {"model": f"timm:{RESNET}", "checkpoint": files / "last.pth.tar"}
    cfg = timm_model(RESNET, 1).pretrained_cfg
    for seed, weights in ((1, ""), (2, "ema")):
        out = tmp_path / f"out{seed}"
        assert main(command(files, out, **keys, **({"weights": weights} if weights else {}))) == 0
        size, crop = cfg.get("test_input_size", cfg["input_size"])[1], cfg.get("test_crop_pct", cfg["crop_pct"])
        expected = expected_top1(files, timm_model(RESNET, seed), size, crop, cfg["mean"], cfg["std"])
        assert top1(out) == pytest.approx(expected)
    assert "weights=state_dict_ema" in caplog.text
    assert f"images of {size} x {size} px, central crop {crop:g}" in caplog.text


def test_positions_of_another_size_are_said(files, caplog):
    recipe = Recipe(f"timm:{VIT}", "out", checkpoint=str(files / "mae.pth"))
    assert open_classifier(recipe).hw == (224, 224)
    assert "its 5 positions were resampled to the 197" in caplog.text


@pytest.mark.parametrize("prefix", ["", "local-dir:", "timm:local-dir:"])
def test_a_folder_that_timm_reads_gives_the_results_of_its_classifier(files, tmp_path, prefix):
    torch.manual_seed(0)
    model = Classifier(Encoder(EncoderConfig(16, 2, 2), (24, 24), 8), 3, class_names=("2", "0", "1"), crop=0.75)
    nn.init.normal_(model.head.weight, std=0.5)
    save_model(model, tmp_path / "model.safetensors")
    folder = tmp_path / "exported"
    assert main(["export", f"model={tmp_path / 'model.safetensors'}", f"out={folder}", "layout=timm"]) == 0
    assert main(command(files, tmp_path / "own", model=tmp_path / "model.safetensors")) == 0
    assert main(command(files, tmp_path / "timm", model=f"{prefix}{folder}")) == 0
    own, other = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("own", "timm"))
    assert own == other
    found = open_classifier(Recipe(f"{prefix}{folder}", "out"))
    assert (found.class_names, found.crop, found.hw) == (("2", "0", "1"), 0.75, (24, 24))
    assert (found.mean, found.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_untrained_or_unfitting_weights_are_refused(files, tmp_path, capsys):
    out, mae = tmp_path / "out", files / "mae.pth"
    for name, parts in {
        f"timm:{VIT}": ("cannot be loaded", "checkpoint=<file>"),  # tests are offline
        "timm:vit_base_patch16_224.mae": ("have no head", "checkpoint=<fine-tuned file>"),
        "timm:vit_base_patch16_18x2_224": ("timm has no weights for", "checkpoint=<file>"),
        "timm:resnet18.a9_in1k": ("no weights 'a9_in1k'", "a1_in1k"),
        "timm:resnet81": ("timm has no model 'resnet81'", "did you mean"),
        "timm:addp_vit_base_patch16": ("our own encoder",),
        f"local-dir:{files / 'data'}": ("has no config.json",),
    }.items():
        assert_refused(capsys, command(files, out, model=name), "model:", *parts)
    assert_refused(capsys, command(files, out, model=f"timm:{RESNET}", checkpoint=mae), str(mae), "no head (fc.weight)")
    keys = {"model": "timm:test_vit2", "checkpoint": mae, "size": 32}
    assert_refused(capsys, command(files, out, **keys), str(mae), "does not fit test_vit2", "missing: ")
    assert_refused(capsys, command(files, out, model=mae, checkpoint=mae), "checkpoint:", "model=timm:<name>")
    assert not out.exists()


def headless(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def test_a_file_without_its_head_is_refused(files, tmp_path, capsys):
    torch.save(headless(torch.load(files / "mae.pth")["model"]), tmp_path / "encoder.pth")
    keys = {"model": f"timm:{VIT}", "checkpoint": tmp_path / "encoder.pth", "size": 32}
    assert_refused(capsys, command(files, tmp_path / "out", **keys), "encoder.pth", "no head (head.weight)")


def test_what_timms_script_trained_is_read_with_its_options(files, tmp_path, capsys):
    """timm stores no class names, and everything else in its arguments."""
    model = timm_model(VIT, 3, img_size=32, num_heads=6, patch_size=8)
    args = Namespace(model=VIT, model_kwargs={"img_size": 32, "num_heads": 6, "patch_size": 8}, gp=None, crop_pct=1.0)
    torch.save({"state_dict": model.state_dict(), "arch": VIT, "args": args}, tmp_path / "last.pth.tar")
    arguments = command(files, tmp_path / "out", model=tmp_path / "last.pth.tar")
    assert main(arguments) == 0  # its folders are named like its logits
    expected = expected_top1(files, model, 32, 1.0, (0.5,) * 3, (0.5,) * 3)
    assert top1(tmp_path / "out") == pytest.approx(expected)
    write_color_images(tmp_path / "named", dict(zip("abc", COLORS.values(), strict=True)), (32, 32), train=1, val=2)
    renamed = [*arguments, f"val={tmp_path / 'named'}"]
    assert main(renamed) == 2
    assert "expected classes=<text file" in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert main([*renamed, f"classes={tmp_path / 'classes.txt'}"]) == 0
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert main([*renamed, f"classes={tmp_path / 'classes.txt'}"]) == 2
    assert "has 2 different names, expected 3" in capsys.readouterr().err
    assert main([*arguments, "encoder_heads=3"]) == 2
    assert "encoder_heads=3: " in capsys.readouterr().err
