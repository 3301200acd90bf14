"""`addp bench`: what it refuses before the first step, and the keys of its recipes."""

import importlib.util

import pytest
from bench_commands import bench_command, bench_json, commands_run, last_line
from tiny import tiny_cnn_addp

from addp_core import save_model
from addp_core.recipes.cli import main
from addp_core.recipes.config import find_recipe, load
from tools.bench import bench
from tools.bench.arguments import as_arguments, verb_recipe
from tools.bench.inputs import listing_digest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["bench.only=dett"], "bench.only: found 'dett', expected benchmarks (generation, finetune"),
        (["bench.only=dett"], "did you mean 'det"),
        (["bench.only=det/c"], "bench.only: found 'det/c'"),
        (["bench.only=[generation,det]", "data.coco="], "bench.only: det/a cannot be done: data.coco is not given"),
        (["data.sketch={toys}/toy/sketchy"], "data.sketch: {toys}/toy/sketchy does not exist"),
        (["data.coco={toys}/toy/imagenet"], "data.coco: {toys}/toy/imagenet has none of annotations/"),
        (["data.ade20k={toys}/toy/coco"], "data.ade20k: "),
        (["data.imagenet_c={toys}/toy/imagenet"], "data.imagenet_c: {toys}/toy/imagenet lacks"),
        (["models={{a: {toys}/c}}"], "models.a: {toys}/c: no such file"),
        (["models={{random: {toys}/a}}"], "models: 'random', expected a name"),
        (["models={{}}"], "models: none given; expected model="),
        (["det.set={{train.step: 5}}"], "det: unknown key 'train.step'; did you mean 'train.steps'?"),
        (["det.grid={{train.lr: [0.1, -1]}}"], "det: train.lr: found -1"),
        (["finetune.recipe=tinny"], "finetune: no recipe named 'tinny'"),
        (["robustness.set={{worker: 0}}"], "robustness: unknown key 'worker'"),
        (["robustness.seeds=[7]"], "robustness.seeds: found 7, expected seeds of finetune: [0]"),
        (["generation.grid={{n: [1]}}"], "unknown key 'generation.grid'"),
        (
            ["bench.only=generation", "generation.set={{extractor: {toys}/none}}"],
            "generation/a: extractor: {toys}/none: no such file",
        ),
        (
            ["bench.only=generation", "generation.set={{inception: {toys}/none.pth}}"],
            "generation/a: inception: {toys}/none.pth: no such file",
        ),
        (["det.set={{model: 'best:finetune/c'}}"], "best:finetune/c: no such step"),
        (["benchmarks=[seg,dett]"], "benchmarks: found 'dett', expected some of generation, finetune"),
        (
            ["benchmarks=[finetune,det]", "data.coco=", "bench.only="],
            "data.coco: not given; expected data.coco=<path>, because det is among the benchmarks of this bench (",
        ),
        (
            ["benchmarks=[robustness]", "data.imagenet=", "bench.only="],
            "data.imagenet: not given; expected data.imagenet=<path>, because finetune is among the benchmarks of this",
        ),
        (
            ["benchmarks=[robustness]", "bench.only=linprobe"],
            "bench.only: found 'linprobe', expected benchmarks (finetune, robustness)",
        ),
    ],
)
def test_wrong_input(toys, fake, tmp_path, capsys, settings, message):
    out = tmp_path / "out"
    assert main(bench_command(toys, out, *(setting.format(toys=toys) for setting in settings))) == 2
    assert message.format(toys=toys) in last_line(capsys)
    assert not out.exists()
    assert commands_run(fake, out) == []


def test_model_replaces_the_models_of_a_recipe(toys, fake, tmp_path, capsys):
    """The sections of `demo` name its three models: addp, early and zoo."""
    out, data = tmp_path / "out", dict.fromkeys(("imagenet_a", "imagenet_r", "sketch", "imagenet_c", "ade20k"), "")
    line = ["bench", "demo", f"model={toys / 'b'}", f"out={out}", "bench.only=finetune", "seeds=[0]"]
    data |= {name: str(toys / "toy" / name) for name in ("imagenet", "coco")}
    assert main([*line, *as_arguments({f"data.{name}": path for name, path in data.items()})]) == 0
    assert commands_run(fake, out) == ["sweep finetune/addp", "sweep finetune/random"]
    assert "replaces the models of the recipe: addp, early, zoo" in capsys.readouterr().err
    assert {name: arm["model"] for name, arm in bench_json(out)["arms"].items()} == dict.fromkeys(
        ("addp", "random"), str(toys / "b")
    )


@pytest.mark.parametrize(
    "settings",
    [
        ["generation.arms=[early]"],
        ["models={a: {toys}/a, early: {toys}/nowhere}", "generation.arms=[a,early]", "linprobe.arms=[a,random]"],
        ["data.sketch={toys}/nowhere"],
        ["generation.set={nn: 3}"],
        ["generation.set={extractor: 'best:finetune/nobody'}"],
    ],
)
def test_what_is_not_asked_for_is_not_checked(toys, fake, tmp_path, capsys, settings):
    settings = [setting.replace("{toys}", str(toys)) for setting in settings]
    assert main(bench_command(toys, tmp_path / "out", *settings, "bench.only=[linprobe]")) == 0
    assert {name.split("/")[0] for name in commands_run(fake, tmp_path / "out")} == {"sweep linprobe"}
    assert "left out: " in capsys.readouterr().err
    assert main(bench_command(toys, tmp_path / "out", *settings, "bench.only=[generation,robustness]")) == 2


def test_a_recipe_can_choose_its_benchmarks(toys, fake, tmp_path, capsys):
    line = bench_command(toys, tmp_path, "benchmarks=[seg,robustness]", "data.coco=", "bench.only=", "random=false")
    assert main(line) == 0
    needed = [f"{step}/{arm}" for step in ("sweep finetune", "robustness robustness") for arm in "ab"]
    ran = [command.removesuffix("/seed0") for command in commands_run(fake, tmp_path) if "pictures" not in command]
    assert sorted(ran) == sorted([*needed, "sweep seg/a", "sweep seg/b"])
    assert "linprobe/a, linprobe/b" in capsys.readouterr().err
    assert main([*line, "bench.only=seg", "data.imagenet_a="]) == 0  # data of what is not asked for need not be given


def test_a_cnn_where_a_vit_is_expected_is_named_before_the_first_step(toys, fake, tmp_path, capsys):
    save_model(tiny_cnn_addp(), tmp_path / "cnn.safetensors")
    line = bench_command(toys, tmp_path / "out", f"models={{cnn: {tmp_path}/cnn.safetensors}}", "det.recipe=tiny")
    assert main([*line, "bench.only=finetune,det"]) == 2
    expected = (
        "det/cnn: detector.scales: found [1.0, 0.5], but the maps of test_resnet have strides 4, 8, 16, 32; leave"
    )
    assert expected in last_line(capsys)
    assert not (tmp_path / "out").exists()
    assert commands_run(fake, tmp_path / "out") == []


def test_a_missing_package_is_named_before_the_first_step(toys, fake, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "mmcv" else find(name, *rest))
    assert main(bench_command(toys, tmp_path / "out")) == 2
    assert "seg: the package 'mmcv' is not installed; add it with: " in last_line(capsys)
    assert main(bench_command(toys, tmp_path / "out", "bench.only=det/a", "random=false")) == 0


@pytest.mark.parametrize("name", ["vit_b", "vit_l"])
def test_the_published_models_generate_in_float32_with_both_samplings(name):
    settings = as_arguments(load(bench.Recipe, find_recipe(bench, name)).section("generation").set)
    evaluation = verb_recipe(["evaluate", "out=x", "model=x", "reference=x", *settings], "generation")
    assert (evaluation.precision, evaluation.reference_resize, evaluation.n) == ("fp32", "bilinear", 50000)
    assert evaluation.sweep.combinations() == [
        {"steps": 20, "schedule": "cosine"},
        {"steps": 256, "schedule": "linear"},
    ]


def test_digest_of_a_dataset_with_a_link_to_itself(tmp_path):
    (tmp_path / "a.png").touch()
    before = listing_digest(str(tmp_path))
    (tmp_path / "loop").symlink_to("loop")
    assert listing_digest(str(tmp_path)) != before
