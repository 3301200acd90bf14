"""The arms of a bench: what a checkpoint says about its pretraining, and settings of its encoder."""

import json
from dataclasses import replace
from pathlib import Path

from checks import assert_user_error
from tiny import TOKENIZER, tiny_addp, tiny_cnn_addp

from addp_core import save_model
from addp_core.networks.tokenizer import Tokenizer
from addp_core.recipes.config import load_recipe
from tools.bench import bench
from tools.bench.arms import open_arm, random_arm


def test_the_budget_of_intermediate_checkpoints(toys, tmp_path):
    def write_metrics(run: Path, img_s: float) -> None:
        run.mkdir(exist_ok=True)
        lines = [{"step": step, "images": 4 * step, "img_s": img_s} for step in (10, 20, 30)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write_metrics(tmp_path, 2.0)
    intermediate = tmp_path / "models" / "step-20"
    intermediate.mkdir(parents=True)
    for folder in (tmp_path, intermediate):
        (folder / "model.safetensors").write_bytes((toys / "a" / "model.safetensors").read_bytes())
    names = {"final": tmp_path, "half": intermediate, "file": tmp_path / "model.safetensors"}
    final, half, file = (open_arm(name, str(path)).about() for name, path in names.items())
    assert random_arm(open_arm("final", str(tmp_path))).about()["images_seen"] is None
    assert (final["images_seen"], final["seconds"]) == (120, 60)
    assert (half["images_seen"], half["seconds"], half["run"]) == (80, 40, str(tmp_path))
    assert file == final | {"model": str(tmp_path / "model.safetensors")}
    write_metrics(tmp_path / "tokenizer", 12.0)  # 120 images
    write_metrics(tmp_path / "predictor", 24.0)
    final, half = (open_arm(path.name, str(path)).about() for path in (tmp_path, intermediate))
    assert [(arm["images_seen"], arm["seconds"]) for arm in (final, half)] == [(120, 75), (80, 55)]


def test_a_cnn_is_an_arm_and_reads_pixels_alone(toys, tmp_path):
    file = tmp_path / "cnn.safetensors"
    save_model(tiny_cnn_addp(), file)
    arm = open_arm("x", str(file))
    assert arm.generates
    assert arm.digest != random_arm(arm).digest
    settings = {"input": "token", "tokenizer": str(toys / "a")}
    assert_user_error(lambda: open_arm("x", str(file), settings), "models.x: tokenizer=", "is no MAGE checkpoint")


def test_ids_of_another_codebook_are_refused(tmp_path):
    predictor, tokenizer = tmp_path / "mage.safetensors", tmp_path / "tokenizer.safetensors"
    save_model(tiny_addp((8, 8)).predictor, predictor, grid=(4, 4))
    save_model(Tokenizer(replace(TOKENIZER, codebook=32)), tokenizer)
    settings = {"tokenizer": str(tokenizer)}
    assert_user_error(
        lambda: open_arm("x", str(predictor), settings),
        "models.x: tokenizer=",
        "it has 32 codes, but the model predicts 24",
    )


def test_one_setting_of_one_model_on_the_command_line(tmp_path):
    (tmp_path / "b.yaml").write_text("models: {addp: runs/addp, mage: {model: runs/mage, tokenizer: a.ckpt}}")
    settings = ["models.mage.model=runs/b", "models.addp.init=random", "models.v1.5=runs/c"]
    recipe = load_recipe(bench, str(tmp_path / "b.yaml"), settings)
    assert recipe.models == {
        "addp": {"model": "runs/addp", "init": "random"},
        "mage": {"model": "runs/b", "tokenizer": "a.ckpt"},
        "v1.5": "runs/c",
    }


def test_settings_of_the_encoder(toys):
    model = str(toys / "a" / "model.safetensors")
    pixels, tokens = (open_arm("x", model, {"init": "random", "input": each}) for each in ("pixels", "token"))
    assert pixels.about()["settings"] == {"init": "random", "input": "pixels"}
    assert (pixels.init, pixels.generates, pixels.digest) == ("random", False, open_arm("x", model).random_digest)
    assert tokens.digest != pixels.digest
    assert tokens.parameters < pixels.parameters + 10_000  # its frozen tokenizer does not count
    with_norm = open_arm("x", model, {"tokenizer_norm": True})
    assert (with_norm.init, with_norm.generates) == ("pretrained", True)
    assert with_norm.digest != open_arm("x", model).digest
    assert open_arm("x", "tiny", {"init": "random"}).parameters > 5e6
    assert_user_error(lambda: open_arm("x", model, {"inptu": "token"}), "models.x.inptu: no such key", "mean 'input'?")
    assert_user_error(lambda: open_arm("x", model, {"init": "none"}), "models.x: init: found 'none'")
    assert_user_error(lambda: open_arm("x", model, {"input": "token"}), "models.x: input=token: ", "reads pixels")
    assert_user_error(lambda: open_arm("x", "tiny", {"input": "pixels"}), "models.x: tiny: no such file")
