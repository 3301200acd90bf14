"""`addp figures`: every figure is drawn from any checkpoint with the right labels, and errors name a missing key."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_addp

from addp_core import load_addp, save_model
from addp_core.method.sampler import SampleConfig
from addp_core.recipes.cli import main
from gen import figures

HW = (8, 12)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    save_model(tiny_addp(HW), root / "model.safetensors")
    model = tiny_addp(HW)
    model.predictor = None
    save_model(model, root / "sampler.safetensors")
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(root / "photos" / f"{i}.png")
    rows = []
    for schedule in ("cosine", "linear"):
        for steps in (10, 4):
            sampling = vars(SampleConfig(steps=steps, schedule=schedule, temperature=2.0))
            rows.append({"name": "", "images": 9, "fid": 10 / steps, "is_mean": steps, "sampling": sampling})
    (root / "evaluation.json").write_text(json.dumps({"features": "Inception-v3", "rows": rows}))
    return root


def figures_command(inputs: Path, out: Path, *settings: str) -> list[str]:
    return ["figures", f"model={inputs / 'model.safetensors'}", f"out={out}", "n=2", "sampling.steps=4", *settings]


def test_all_figures_are_drawn(inputs, tmp_path):
    assert main(figures_command(inputs, tmp_path, f"data={inputs / 'photos'}", f"evaluation={inputs}")) == 0
    names = {"steps", "training-weighted", "training-argmax", "training-sample", "ratios", "tokens", "metrics"}
    names |= {"denoising", "features", "attention", "neighbors", "contact"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    for path in tmp_path.iterdir():
        image = np.array(Image.open(path).convert("L"))
        assert min(image.shape) > 200
        assert image.std() > 10


def test_without_images_and_report_the_other_figures_are_drawn(inputs, tmp_path, capsys):
    assert main(figures_command(inputs, tmp_path, "sampling.order=halton")) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"steps", "ratios", "tokens", "contact"}
    log = capsys.readouterr().err
    assert "no training without data=" in log
    assert "no metrics without evaluation=" in log


def test_an_evaluation_without_a_sweep_of_steps_leaves_out_the_figure_of_metrics(inputs, tmp_path, capsys):
    sampling = vars(SampleConfig())
    for name, row in (("swept", {"sampling": sampling}), ("folder", {})):
        report = {"features": "", "rows": [{"name": name, "images": 3, "fid": 1.0, **row}]}
        (tmp_path / "evaluation.json").write_text(json.dumps(report))
        out = tmp_path / name
        assert main(figures_command(inputs, out, f"evaluation={tmp_path}")) == 0
        assert {path.stem for path in out.iterdir()} == {"steps", "ratios", "tokens", "contact"}
        log = capsys.readouterr().err
        assert "no metrics: evaluation: " in log
        assert "sweep.steps=[4,8,20]" in log


def all_text(figure) -> str:
    axes = figure.get_axes()
    ticks = [tick.get_text() for axis in axes for tick in (*axis.get_xticklabels(), *axis.get_yticklabels())]
    names = [name for axis in axes for name in (axis.get_xlabel(), axis.get_ylabel())]
    return " ".join([figure.get_suptitle(), figure.get_supxlabel(), *ticks, *names])


def test_text_and_curves_of_the_figures(inputs):
    recipe = figures.Recipe(model="", out="", data=str(inputs / "photos"), evaluation=str(inputs), n=2)
    recipe.sampling = SampleConfig(steps=3)
    drawn = {}
    for draw in figures.DRAW.values():
        drawn |= draw(load_addp(inputs / "model.safetensors"), recipe)
    text = {name: all_text(figure) for name, figure in drawn.items()}
    assert "step 3" in text["steps"]
    assert "4% unreliable" in text["steps"]  # one token of 24
    assert "f = argmax (Fig. 10)" in text["training-argmax"]
    assert "mask ratio" in text["ratios"]
    assert "sampling steps" in text["metrics"]
    assert "FID (lower is better)" in text["metrics"]
    lines = drawn["metrics"].get_axes()[0].get_lines()
    assert [line.get_label() for line in lines] == ["cosine, temperature 2.0", "linear, temperature 2.0"]
    assert [list(line.get_xdata()) for line in lines] == [[4, 10]] * 2
    assert list(lines[0].get_ydata()) == [2.5, 1.0]


def test_distributions_sum_to_one(inputs):
    for process in ({}, {"ratios": "fixed", "ratio_mean": 0.6}):
        model = tiny_addp(HW, **process)
        (figure,) = figures.draw_ratios(model, figures.Recipe(model="", out="")).values()
        for axis in figure.get_axes():
            for bars in axis.containers:
                assert sum(bar.get_height() for bar in bars) == pytest.approx(1)


def test_errors_name_the_key(inputs, tmp_path, expect_user_error):
    expect_user_error(figures_command(inputs, tmp_path, "only=[training]"), "only: training needs data=")
    expect_user_error(figures_command(inputs, tmp_path, "only=[metric]"), "only", "metrics")
    expect_user_error(figures_command(inputs, tmp_path, "n=0"), "n", ">= 1")
    expect_user_error(
        figures_command(inputs, tmp_path, "only=[metrics]", f"evaluation={inputs / 'photos'}"),
        "not a report of `addp evaluate`",
    )
    # an unreadable report fails before any figure is drawn
    expect_user_error(
        figures_command(inputs, tmp_path / "none", f"evaluation={inputs / 'photos'}"), "not a report of `addp evaluate`"
    )
    assert not (tmp_path / "none").exists()
    nowhere = ["only=[training]", f"data={tmp_path / 'nowhere'}"]
    expect_user_error(figures_command(inputs, tmp_path, *nowhere), "addp: data: ", "does not exist")
    report = {"features": "", "rows": [{"name": "folder", "images": 3, "fid": 1.0}]}
    (tmp_path / "one.json").write_text(json.dumps(report))
    expect_user_error(
        figures_command(inputs, tmp_path, "only=[metrics]", f"evaluation={tmp_path / 'one.json'}"), "sweep.steps="
    )
    sampler = [f"model={inputs / 'sampler.safetensors'}", "only=[training]", f"data={inputs / 'photos'}"]
    expect_user_error(
        figures_command(inputs, tmp_path, *sampler)[:1] + sampler + [f"out={tmp_path}"],
        "predictor",
        "no token predictor",
    )


def test_without_a_predictor_the_figures_of_training_are_left_out(inputs, tmp_path, capsys):
    line = [*figures_command(inputs, tmp_path), f"model={inputs / 'sampler.safetensors'}", f"data={inputs / 'photos'}"]
    assert main(line) == 0
    names = {"steps", "ratios", "tokens", "features", "attention", "neighbors", "contact"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    assert "no training: the file has no token predictor" in capsys.readouterr().err
