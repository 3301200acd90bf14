"""A benchmark of one's own: one class, registered, has keys, checks, steps, scores and its place in the report."""

from typing import ClassVar

import pytest
from bench_commands import bench_command, bench_json, commands_run, last_line, step_entry

from addp_core.recipes.cli import main
from tools.bench import bench
from tools.bench.benchmark import Dataset, Transfer
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.benchmarks.imagenet import check_class_folders
from tools.bench.metric import Metric
from tools.bench.plan import recipe_class
from tools.bench.report import write_report

# -------------------- the benchmark, as a file in tools/bench/benchmarks/ would have it


class Flowers(Transfer):
    """Fine-tuning on Flowers-102."""

    name = "flowers"
    title = "Flowers"
    about = "Top-1 in per cent on the validation images of Flowers-102 after fine-tuning the whole encoder."
    task = "cls"
    datasets = (Dataset("flowers", "Flowers-102: train/<class>/ and val/<class>/", check_class_folders),)
    needs_labels = True
    verb = "finetune"
    source = "data.source"
    metrics = (Metric("top1", "top-1 ↑", result="last.top1", curve="top1"),)
    published: ClassVar = {"ADDP ViT-B": {"top1": 98.7}}  # made up


@pytest.fixture
def registered(monkeypatch) -> None:
    """Add it to `BENCHMARKS`, as a name in tools/bench/benchmarks/__init__.py would do."""
    monkeypatch.setitem(BENCHMARKS, Flowers.name, Flowers())
    monkeypatch.setattr(bench, "Recipe", recipe_class(BENCHMARKS.values()))


# -------------------- what follows from it


def test_its_keys_are_listed(registered, capsys):
    assert main(["bench", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Flowers-102: train/<class>/ and val/<class>/" in next(line for line in lines if "data.flowers" in line)
    section = [f"flowers.{key}" for key in ("set", "seeds", "arms", "recipe", "grid")]
    assert [line.split()[0] for line in lines if line.startswith("  flowers")] == ["flowers:", *section]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.flowers={toys}/toy/roses", "data.flowers: {toys}/toy/roses does not exist"),
        ("data.flowers={toys}/toy/ade20k/images", "data.flowers: {toys}/toy/ade20k/images has no class folders"),
        ("flowers.set={{train.step: 5}}", "flowers: unknown key 'train.step'; did you mean 'train.steps'?"),
        ("flowers.gird={{}}", "unknown key 'flowers.gird'; did you mean 'flowers.grid'?"),
    ],
)
def test_its_dataset_and_settings_are_checked(registered, toys, fake, tmp_path, capsys, setting, message):
    line = bench_command(toys, tmp_path / "out", "bench.only=flowers", datasets=())
    valid = [f"data.flowers={toys}/toy/imagenet"] if not setting.startswith("data.") else []
    assert main([*line, *valid, setting.format(toys=toys)]) == 2
    assert message.format(toys=toys) in last_line(capsys)
    assert commands_run(fake, tmp_path / "out") == []


def test_it_is_planned_run_scored_and_reported(registered, toys, fake, tmp_path, capsys):
    settings = [f"data.flowers={toys}/toy/imagenet", "flowers.grid={train.lr: [0.1, 0.2]}", "seeds=[0,1]"]
    line = bench_command(toys, tmp_path, "bench.only=flowers", *settings, datasets=())
    assert main(line) == 0
    assert commands_run(fake, tmp_path) == ["sweep flowers/a", "sweep flowers/b", "sweep flowers/random"]
    assert "flowers top1" in capsys.readouterr().out
    step = step_entry(tmp_path, "flowers/a")
    assert (step["setting"], step["scores"]) == ({"train.lr": 0.1}, {"top1": [50.0, 50.0]})
    assert bench_json(tmp_path)["chance"]["flowers"] == {"top1": 10.0}
    assert main(line) == 0
    assert commands_run(fake, tmp_path) == []  # nothing to repeat

    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert f"## Flowers\n\n{Flowers.about}" in markdown
    overview = [line for line in markdown.splitlines() if line.startswith("|")]
    assert overview[0] == "| arm | Flowers top-1 ↑ | encoder | images seen |"
    assert "| a | 50.0 ± 0.0 (+0.0) |" in "\n".join(overview)
    assert "| chance | 10.0 |" in "\n".join(overview)
    assert "| *paper: ADDP ViT-B* | *98.7* |" in "\n".join(overview)
