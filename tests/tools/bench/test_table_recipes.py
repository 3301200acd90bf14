"""The recipes of the paper's tables: keys of the verbs, the paper's numbers, small versions, and what they share."""

import functools

import pytest
from bench_commands import bench_json, commands_run, last_line

from addp_core.recipes.cli import main
from addp_core.recipes.config import find_recipe, load, recipes_of
from tools.bench import bench
from tools.bench.arguments import as_arguments, verb_recipe
from tools.bench.benchmark import Transfer
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.paper import check_paper

TABLES = [*(f"table{number}" for number in range(1, 13)), "figure6", "ablations"]
RECIPES = list(recipes_of(bench))
ABLATIONS = ["table3", "table4", "table5", "table6"]


@functools.cache
def load_named(name: str) -> bench.Recipe:
    return load(bench.Recipe, find_recipe(bench, name), named=recipes_of(bench))


def test_every_table_has_a_recipe_and_a_small_one():
    assert {name for table in TABLES for name in (table, f"{table}_small")} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_have_keys_of_their_verbs(name):
    recipe = load_named(name)
    check_paper(recipe.paper)
    assert set(recipe.benchmarks) <= BENCHMARKS.keys()
    for benchmark in BENCHMARKS.values():
        if isinstance(benchmark, Transfer):
            section = recipe.section(benchmark.name)
            first = {key: values[0] for key, values in section.grid.items()}
            settings = as_arguments({benchmark.source: "x", "out": "x", "model": "x", **section.set, **first})
            named = [section.recipe] if section.recipe else []
            verb_recipe([*benchmark.verb.split(), *named, *settings], benchmark.name)
    given = ["out=x", "model=x"]
    verb_recipe(["evaluate", *given, "reference=x", *as_arguments(recipe.section("generation").set)], "generation")
    verb_recipe(["robustness", *given, *as_arguments(recipe.section("robustness").set)], "robustness")
    for arm in recipe.pretrain.arms.values():
        settings = as_arguments({"out": "x", "data.source": "x", **recipe.pretrain.set, **arm})
        verb_recipe(["pretrain", recipe.pretrain.recipe, *settings], "pretrain")


@pytest.mark.parametrize("suffix", ["", "_small"])
def test_the_ablation_tables_are_parts_of_one_bench(suffix):
    whole = load_named(f"ablations{suffix}")
    parts = [load_named(f"{table}{suffix}") for table in ABLATIONS]
    assert sum(len(part.pretrain.arms) for part in parts) == 12
    for arms in (lambda recipe: recipe.pretrain.arms, lambda recipe: recipe.paper.arms):
        assert {name: value for part in parts for name, value in arms(part).items()} == arms(whole)
        assert all(value == arms(whole)[name] for part in parts for name, value in arms(part).items())
    assert len(whole.pretrain.arms) == 9
    for part in parts:
        assert part.paper.baseline == next(iter(part.pretrain.arms)) == "default"
        assert (part.out, part.pretrain.set, part.seeds) == (whole.out, whole.pretrain.set, whole.seeds)
    assert whole.paper.arms == load_named("ablations").paper.arms
    assert whole.pretrain.arms == load_named("ablations").pretrain.arms


def test_the_tables_have_the_numbers_of_the_papers_models():
    """Which the benchmarks have too, for benches of other recipes."""
    arms = {
        **{f"{arm} ViT-L": load_named("table2").paper.arms[arm.lower()] for arm in ("ADDP", "MAE", "MAGE")},
        **{f"{arm} ViT-B": load_named("table7").paper.arms[arm.lower()] for arm in ("ADDP", "MAE", "MAGE")},
        "ADDP ResNet-50": load_named("table8").paper.arms["addp"],
    }
    probes = load_named("table12").paper.arms
    for model, numbers in arms.items():
        for benchmark, values in numbers.items():
            known = BENCHMARKS[benchmark].published[model]
            assert values == {metric: value for metric, value in known.items() if metric in values}
        if "ViT" in model:
            arm = model.lower().replace(" vit", "")
            assert probes[arm]["linprobe"] == BENCHMARKS["linprobe"].published[model]
    assert load_named("table9").paper.arms["addp"] == {"robustness": BENCHMARKS["robustness"].published["ADDP ViT-B"]}


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("table3_small", ["finetune/default", "finetune/condition-z_t", "finetune/random"]),
        ("table8_small", ["finetune/addp", "finetune/random"]),
        ("table9_small", ["finetune/addp", "finetune/random"]),
        ("figure6_small", ["finetune/random"]),  # whose classifier extracts the features
    ],
)
def test_small_tables_plan_what_they_show(name, steps, toys, fake, tmp_path):
    data = {"imagenet": "imagenet", "imagenet_a": "imagenet-a", "imagenet_c": "imagenet-c", "coco": "", "ade20k": ""}
    paths = [f"data.{key}={toys / 'toy' / folder if folder else ''}" for key, folder in data.items()]
    settings = ["data.imagenet_r=", "data.sketch=", "bench.only=[pretrain,finetune]"]
    assert main(["bench", name, f"out={tmp_path}", *paths, *settings]) == 0
    ran = [command for command in commands_run(fake, tmp_path) if command.startswith("sweep")]
    assert ran == [f"sweep {step}" for step in steps]
    planned = {step["name"] for step in bench_json(tmp_path)["steps"] if step["state"] != "left out"}
    assert set(steps) == {name for name in planned if name.startswith("finetune")}
    assert not any(name.startswith(("linprobe", "det", "seg")) for name in planned)


def test_a_tables_data_are_asked_for_before_the_first_step(toys, fake, tmp_path, capsys):
    line = ["bench", "table7", f"model={toys}/a", f"out={tmp_path / 'out'}", f"data.imagenet={toys}/toy/imagenet"]
    assert main(line) == 2
    assert "data.coco: not given; expected data.coco=<path>, because det is among the benchmarks" in last_line(capsys)
    assert not (tmp_path / "out").exists()
