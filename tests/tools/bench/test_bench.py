"""`addp bench`: what it runs, in which order, and what it does not repeat."""

import re
from pathlib import Path

import pytest
import yaml
from bench_commands import bench_command, bench_json, commands_run, set_behavior, states, step_entry
from PIL import Image
from tiny import tiny_addp

from addp_core import save_model
from addp_core.recipes.cli import main


def test_steps_and_table_and_what_the_same_command_repeats(toys, fake, tmp_path, capsys):
    out = tmp_path / "out"
    line = bench_command(toys, out, "seeds=[0,1]", "finetune.grid={train.lr: [0.1, 0.2]}")
    assert main(line) == 0
    table = capsys.readouterr().out
    ran = commands_run(fake, out)
    assert ran[:4] == [f"sweep finetune/{arm}" for arm in ("a", "b", "random")] + ["sweep linprobe/a"]
    assert ran[6:8] == ["robustness robustness/a/seed0", "robustness robustness/a/seed1"]
    assert ran[12:14] == ["sweep det/a", "det det/a/pictures"]
    assert len(ran) == 3 * (1 + 1 + 2 + 2 + 2)
    header, *rows, chance, _, report = table.splitlines()
    assert re.split(r" {2,}", header.strip()) == [
        *("finetune top1", "linprobe top1", "robustness a", "robustness c"),
        *("det box_ap", "det mask_ap", "seg miou"),
    ]
    assert [row.split()[0] for row in rows] == ["a", "b", "random"]
    assert all("50.00 ± 0.00" in row and "25.00 ± 0.00" in row for row in rows)
    assert re.split(r" {2,}", chance.strip())[:4] == ["chance", "10.00", "10.00", "16.67"]
    assert Path(report) == out / "report.html"
    bench = bench_json(out)
    assert [(name, arm["init"], arm["images_seen"]) for name, arm in bench["arms"].items()] == [
        ("a", "pretrained", None),
        ("b", "pretrained", None),
        ("random", "random", None),
    ]
    assert bench["arms"]["a"]["parameters"] == bench["arms"]["random"]["parameters"] > 5000
    assert bench["chance"]["seg"] == {"miou": 4.0}
    assert bench["chance"]["robustness"]["c"] < 0  # 1 - mCE: worse than AlexNet's errors
    step = step_entry(out, "finetune/a")
    assert (step["setting"], step["seeds"], step["scores"]) == ({"train.lr": 0.1}, [0, 1], {"top1": [50.0, 50.0]})
    assert step["commands"] == [f"addp sweep {out}/finetune/a/sweep.yaml"]
    assert step["runs"]["1"] == "finetune/a/a/best-seed1"
    sweep = yaml.safe_load((out / "finetune" / "random" / "sweep.yaml").read_text())
    assert sweep["arms"] == {"random": {"model": str(toys / "a"), "init": "random"}}
    assert {state for name, state in states(out).items() if not name.startswith("generation/")} == {"done"}

    def again(*settings: str) -> list[str]:
        assert main([*line, *settings]) == 0
        return commands_run(fake, out)

    assert again() == []
    assert capsys.readouterr().out == table
    no_effect = ["jobs=2", "price_per_hour=3", "det.set={data.workers: 0}", "robustness.set={workers: 0}"]
    assert again(*no_effect) == []  # on the metrics
    wider = "det.grid={train.lr: [0.1, 0.2]}"
    assert again(wider) == [
        f"{verb} det/{arm}{folder}"
        for arm in ("a", "b", "random")
        for verb, folder in (("sweep", ""), ("det", "/pictures"))
    ]
    assert not (out / "before").exists()  # the wider sweep reuses the runs of the narrow one
    # other settings of one benchmark repeat it and what depends on it
    ran = again("finetune.set={train.steps: 7}", wider)
    assert {command.split()[1].split("/")[0] for command in ran} == {"finetune", "robustness"}
    assert sorted(path.name for path in (out / "before").iterdir())[:2] == ["finetune-a-1", "finetune-b-1"]
    assert (out / "before" / "finetune-a-1" / "a" / "best-seed0" / "results.json").exists()


def test_independent_evaluations_run_at_the_same_time(toys, fake, tmp_path):
    set_behavior(fake, meet="robustness/a/seed")
    line = bench_command(toys, tmp_path, "bench.only=[robustness/a]", "seeds=[0,1]")
    assert main([*line, "jobs=2"]) == 0  # each waits for the other
    log = (tmp_path / "robustness" / "a" / "log.txt").read_text()
    assert log.count("$ addp robustness") == log.count("both are here") == 2
    lines = log.splitlines()
    assert all(lines[i + 1].endswith("both are here") for i in (0, 2))
    assert [path.name for path in (tmp_path / "robustness" / "a").glob("*.txt")] == ["log.txt"]

    set_behavior(fake, fail="robustness/b/seed1")
    with pytest.raises(SystemExit):
        main(bench_command(toys, tmp_path, "bench.only=[robustness/b]", "seeds=[0,1]", "jobs=2"))
    (failed,) = [step for step in bench_json(tmp_path)["steps"] if step["state"] == "failed"]
    assert (failed["name"], failed["error"]) == ("robustness/b", "addp: nothing works today")


def test_a_benchmark_for_some_arms(toys, fake, tmp_path, capsys):
    assert main(bench_command(toys, tmp_path, "det.arms=[a,random]", "linprobe.arms=[b]")) == 0
    left_out = {step["name"]: step["error"] for step in bench_json(tmp_path)["steps"] if step["state"] == "left out"}
    assert {name for name in left_out if name[:3] in ("det", "lin")} == {"det/b", "linprobe/a", "linprobe/random"}
    assert left_out["det/b"] == "not one of det.arms"
    capsys.readouterr()
    assert main(bench_command(toys, tmp_path, "seg.arms=[randm]")) == 2
    assert "seg.arms: found 'randm', expected some of a, b, random; did you mean 'random'?" in capsys.readouterr().err


def test_few_labels_are_a_benchmark_where_a_recipe_asks_for_them(toys, fake, tmp_path, capsys):
    inputs = [f"model={toys / 'a'}", f"data.imagenet={toys / 'toy' / 'imagenet'}"]
    asked = ["finetune_1.recipe=tiny", "finetune_1.set={train.epochs: 20}", "bench.only=finetune_1", "seeds=[0,1]"]
    assert main(["bench", f"out={tmp_path}", *inputs, *asked]) == 0
    assert {name for name in states(tmp_path) if name.startswith("finetune_")} == {
        "finetune_1/addp",
        "finetune_1/random",
    }
    sweep = yaml.safe_load((tmp_path / "finetune_1" / "addp" / "sweep.yaml").read_text())
    assert sweep["set"]["label_share"] == 0.01
    assert sweep["set"]["train.epochs"] == 20
    capsys.readouterr()
    assert main(["bench", f"out={tmp_path / 'b'}", *inputs, "bench.only=finetune_10"]) == 2
    assert "finetune_10.recipe is not given" in capsys.readouterr().err


def test_a_changed_checkpoint_or_dataset_is_noticed(toys, fake, tmp_path):
    out, model = tmp_path / "out", tmp_path / "model.safetensors"
    save_model(tiny_addp((8, 8)), model)
    toy = tmp_path / "toy"
    assert main(["toy", f"out={toy}", "only=[imagenet]", "size=16", "imagenet_train=10", "imagenet_val=10"]) == 0
    line = ["bench", f"out={out}", f"model={model}", f"data.imagenet={toy}/imagenet", "bench.only=finetune"]
    assert main([*line, f"data.coco={toys}/toy/coco"]) == 0
    assert commands_run(fake, out) == ["sweep finetune/addp", "sweep finetune/random"]
    model.touch()
    assert main(line) == 0
    assert commands_run(fake, out) == []  # the same weights
    save_model(tiny_addp((8, 8), seed=3), model)
    assert main(line) == 0
    assert commands_run(fake, out) == ["sweep finetune/addp"]  # and the same architecture
    save_model(tiny_addp((8, 16)), model)
    image, other = next((toy / "imagenet" / "train").glob("*/*")), tmp_path / "other"
    other.write_bytes(image.read_bytes())
    changes = [
        lambda: None,  # the architecture has changed above
        lambda: (toy / "imagenet" / "labels.txt").write_text("more"),
        lambda: image.with_stem("one-more").write_bytes(image.read_bytes()),
        lambda: other.replace(image),
    ]
    for change in changes:
        change()
        assert main(line) == 0
        assert commands_run(fake, out) == ["sweep finetune/addp", "sweep finetune/random"]
    assert main(line) == 0
    assert commands_run(fake, out) == []


def test_random_weights_keep_the_checkpoint_that_their_architecture_came_from(toys, fake, tmp_path):
    """Their runs in the folder were begun with it, and would refuse another one."""
    out, data = tmp_path / "out", f"data.imagenet={toys}/toy/imagenet"
    for model in ("a", "b"):
        assert main(["bench", f"out={out}", f"model={toys}/{model}", data, "bench.only=finetune", "seeds=[0]"]) == 0
    assert commands_run(fake, out) == ["sweep finetune/addp", "sweep finetune/random", "sweep finetune/addp"]
    more = ["bench", f"out={out}", f"model={toys}/b", data, "bench.only=finetune/random", "seeds=[0,1]"]
    assert main(more) == 0
    assert f"model: {toys}/a\n" in (out / "finetune" / "random" / "sweep.yaml").read_text()


def test_more_seeds_keep_what_was_evaluated_of_the_others(toys, fake, tmp_path):
    out, only = tmp_path / "out", "bench.only=[finetune/a,robustness/a]"
    line = bench_command(toys, out, only)
    assert main([*line, "seeds=[0]"]) == 0
    (out / "robustness" / "a" / "seed0").rename(tmp_path / "kept")  # the fake verb makes its folder itself
    commands_run(fake, out)
    assert main([*line, "seeds=[0,1]"]) == 0
    assert not (out / "before").exists()
    assert "robustness robustness/a/seed1" in commands_run(fake, out)


def test_sample_images_are_those_of_the_current_dataset(toys, fake, tmp_path):
    for name, kind, count in (("old", "png", 4), ("new", "png", 2), ("other", "bmp", 2)):
        for part in ("train", "val"):
            folder = tmp_path / name / part / "thing"
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (16, 16), (len(name), number, 0)).save(folder / f"{number}.{kind}")
        settings = [f"data.imagenet={tmp_path / name}", "bench.only=finetune", "bench.launch=print"]
        assert main(["bench", f"out={tmp_path / 'out'}", f"model={toys / 'a'}", *settings]) == 0
        samples = sorted((tmp_path / "out" / "inputs" / "imagenet").iterdir())
        validation = sorted((tmp_path / name / "val" / "thing").iterdir())
        assert [path.read_bytes() for path in samples] == [path.read_bytes() for path in validation]


@pytest.mark.parametrize(("recipe", "scores"), [("vit_b_90ep", {"top1": [50]}), ("fast", {"top1": [40], "knn": [35]})])
def test_a_linear_probe_reports_its_last_validation_or_the_best_head(toys, fake, tmp_path, recipe, scores):
    assert main(bench_command(toys, tmp_path, f"linprobe.recipe={recipe}", "bench.only=linprobe/a")) == 0
    step = step_entry(tmp_path, "linprobe/a")
    assert step["scores"] == scores


def test_notes_of_a_sweep_are_logged(toys, fake, tmp_path, capsys):
    set_behavior(fake, notes=["left out because it failed: some.log"])
    assert main(bench_command(toys, tmp_path, "bench.only=det/a")) == 0
    assert "det/a: left out because it failed: some.log" in capsys.readouterr().err
    step = step_entry(tmp_path, "det/a")
    assert (step["state"], step["notes"]) == ("done", ["left out because it failed: some.log"])
