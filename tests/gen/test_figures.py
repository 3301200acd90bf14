"""`addp figures`: every figure is drawn from any checkpoint, shows what it says, and says what it lacks."""

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
def room(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("room")
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


def draw(room: Path, out: Path, *more: str) -> list[str]:
    return ["figures", f"model={room / 'model.safetensors'}", f"out={out}", "n=2", "sampling.steps=4", *more]


def wrong(capsys, arguments: list[str], *words: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_all_figures_are_drawn(room, tmp_path):
    assert main(draw(room, tmp_path, f"data={room / 'photos'}", f"evaluation={room}")) == 0
    names = {"steps", "training-weighted", "training-argmax", "training-sample", "ratios", "tokens", "metrics"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    for path in tmp_path.iterdir():
        picture = np.array(Image.open(path).convert("L"))
        assert min(picture.shape) > 200
        assert picture.std() > 10


def test_without_images_or_a_report_the_others_are_drawn(room, tmp_path, capsys):
    assert main(draw(room, tmp_path, "sampling.order=halton")) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"steps", "ratios", "tokens"}
    said = capsys.readouterr().err
    assert "no training without data=" in said
    assert "no metrics without evaluation=" in said


def captions(figure) -> str:
    axes = figure.get_axes()
    ticks = [tick.get_text() for axis in axes for tick in (*axis.get_xticklabels(), *axis.get_yticklabels())]
    names = [name for axis in axes for name in (axis.get_xlabel(), axis.get_ylabel())]
    return " ".join([figure.get_suptitle(), figure.get_supxlabel(), *ticks, *names])


def test_figures_say_what_they_show(room):
    recipe = figures.Recipe(model="", out="", data=str(room / "photos"), evaluation=str(room), n=2)
    recipe.sampling = SampleConfig(steps=3)
    drawn = {}
    for draw in figures.DRAW.values():
        drawn |= draw(load_addp(room / "model.safetensors"), recipe)
    said = {name: captions(figure) for name, figure in drawn.items()}
    assert "step 3" in said["steps"]
    assert "4% unreliable" in said["steps"]  # one token of 24
    assert "f = argmax (Fig. 10)" in said["training-argmax"]
    assert "mask ratio" in said["ratios"]
    assert "sampling steps" in said["metrics"]
    assert "FID (lower is better)" in said["metrics"]
    lines = drawn["metrics"].get_axes()[0].get_lines()
    assert [line.get_label() for line in lines] == ["cosine, temperature 2.0", "linear, temperature 2.0"]
    assert [list(line.get_xdata()) for line in lines] == [[4, 10]] * 2
    assert list(lines[0].get_ydata()) == [2.5, 1.0]


def test_distributions_sum_to_one(room):
    for process in ({}, {"ratios": "fixed", "ratio_mean": 0.6}):
        model = tiny_addp(HW, **process)
        (figure,) = figures.draw_ratios(model, figures.Recipe(model="", out="")).values()
        for axis in figure.get_axes():
            for bars in axis.containers:
                assert sum(bar.get_height() for bar in bars) == pytest.approx(1)


def test_mistakes_are_named(room, tmp_path, capsys):
    wrong(capsys, draw(room, tmp_path, "only=[training]"), "only: training needs data=")
    wrong(capsys, draw(room, tmp_path, "only=[metric]"), "only", "metrics")
    wrong(capsys, draw(room, tmp_path, "n=0"), "n", ">= 1")
    wrong(
        capsys, draw(room, tmp_path, "only=[metrics]", f"evaluation={room / 'photos'}"), "no report of `addp evaluate`"
    )
    # before anything is drawn
    wrong(capsys, draw(room, tmp_path / "none", f"evaluation={room / 'photos'}"), "no report of `addp evaluate`")
    assert not (tmp_path / "none").exists()
    nowhere = ["only=[training]", f"data={tmp_path / 'nowhere'}"]
    wrong(capsys, draw(room, tmp_path, *nowhere), "addp: data: ", "does not exist")
    report = {"features": "", "rows": [{"name": "folder", "images": 3, "fid": 1.0}]}
    (tmp_path / "one.json").write_text(json.dumps(report))
    wrong(capsys, draw(room, tmp_path, "only=[metrics]", f"evaluation={tmp_path / 'one.json'}"), "sweep.steps=")
    sampler = [f"model={room / 'sampler.safetensors'}", "only=[training]", f"data={room / 'photos'}"]
    wrong(capsys, draw(room, tmp_path, *sampler)[:1] + sampler + [f"out={tmp_path}"], "predictor", "no token predictor")
