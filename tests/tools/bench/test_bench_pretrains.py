"""A bench that begins with pretraining: its steps, what it does not repeat, what it refuses, and one that is killed."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from bench_commands import bench_json, commands_run, last_line, set_behavior, states, step_entry
from test_bench_real import run_here

from addp_core.recipes.cli import main
from tools import children

TOKENIZER = """
model: {width: 32, multipliers: [1, 1, 1], blocks: 1, codebook: 32, dim: 8}
train: {steps: 3, batch: 4, lr: 1.0e-3, log_every: 1}
"""
PREDICTOR = """
model: {width: 16, depth: 1, heads: 2, decoder_depth: 1, decoder_heads: 2}
train: {steps: 3, batch: 4, lr: 1.0e-3, log_every: 1}
"""
PRETRAIN = """
data: {size: 16, flip: false, workers: 0}
model: {encoder: {width: 16, depth: 1, heads: 2, tokenizer_norm: true}, decoder: {depth: 1, heads: 2}}
train: {steps: 40, batch: 4, lr: 1.0e-3, log_every: 10, checkpoint_every: 10, export_every: 20}
"""
ARMS = "pretrain.arms={ours: {}, z_t: {process.condition: z_t}}"
FINETUNE = {"data.size": 16, "data.workers": 0, "train.batch": 4, "train.steps": 1, "augment.auto": ""}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    """A folder with recipes of the three stages."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "tokenizer.yaml").write_text(TOKENIZER)
    (folder / "predictor.yaml").write_text(PREDICTOR)
    (folder / "pretrain.yaml").write_text(PRETRAIN)
    return folder


def bench_line(toys: Path, recipes: Path, out: Path, *settings: str) -> list[str]:
    """Return the arguments of a bench that pretrains two arms and fine-tunes them."""
    line = ["bench", f"out={out}", f"data.imagenet={toys}/toy/imagenet", f"pretrain.recipe={recipes}/pretrain.yaml"]
    finetune = f"finetune.set={json.dumps(FINETUNE | {'train.warmup_steps': 0})}"
    keys = {setting.partition("=")[0] for setting in settings}
    defaults = [f"pretrain.set={{stages: {recipes}}}", ARMS, "bench.only=[pretrain,finetune]", finetune]
    return [*line, *(each for each in defaults if each.partition("=")[0] not in keys), *settings]


STAGES = ["tokenizer pretrain/stages/tokenizer", "predictor pretrain/stages/predictor"]
RUNS = ["pretrain pretrain/ours/seed0", "pretrain pretrain/z_t/seed0"]
SWEEPS = ["sweep finetune/ours", "sweep finetune/z_t", "sweep finetune/random"]


def test_arms_share_their_stages_and_nothing_is_repeated(toys, recipes, fake, tmp_path, capsys):
    out = tmp_path / "out"

    def ran(*settings: str) -> list[str]:
        assert main(bench_line(toys, recipes, out, *settings)) == 0
        return commands_run(fake, out)

    assert ran() == [*STAGES, *RUNS, *SWEEPS]
    assert step_entry(out, "pretrain/z_t")["commands"] == [
        f"addp pretrain {recipes}/pretrain.yaml stages={recipes} process.condition=z_t "
        f"data.source={toys}/toy/imagenet tokenizer={out}/pretrain/stages/tokenizer "
        f"predictor={out}/pretrain/stages/predictor train.seed=0 out={out}/pretrain/z_t/seed0"
    ]
    assert step_entry(out, "pretrain/stages")["commands"][0] == (
        f"addp tokenizer {recipes}/tokenizer.yaml data.source={toys}/toy/imagenet data.size=16 data.flip=false "
        f"data.workers=0 out={out}/pretrain/stages/tokenizer"
    )
    assert bench_json(out)["arms"]["z_t"]["model"] == f"{out}/pretrain/z_t/seed0"
    assert bench_json(out)["arms"]["random"]["model"] == f"{out}/pretrain/ours/seed0"
    assert ran() == []
    both = "ours: {}, z_t: {process.condition: z_t}"
    third = f"pretrain.arms={{{both}, fixed: {{process.ratios: fixed}}}}"
    assert ran(third) == ["pretrain pretrain/fixed/seed0", "sweep finetune/fixed"]
    # other settings of one arm repeat it and what depends on it; of random weights, only the architecture counts
    longer = "pretrain.arms={ours: {train.steps: 50}, z_t: {process.condition: z_t}}"
    assert ran(longer) == [RUNS[0], SWEEPS[0]]
    assert (out / "before" / "pretrain-ours-1" / "seed0").exists()
    # a further seed keeps the runs of the first
    assert ran(longer, "pretrain.seeds=[0,1]", "seeds=[0,1]") == [
        *("pretrain pretrain/ours/seed0", "pretrain pretrain/ours/seed1"),
        *("pretrain pretrain/z_t/seed0", "pretrain pretrain/z_t/seed1"),
        *SWEEPS,
    ]
    assert not (out / "before" / "pretrain-ours-2").exists()
    assert not (out / "before" / "finetune-ours-2").exists()


def test_seeds_of_pretraining_and_transfer_are_the_same(toys, recipes, fake, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(bench_line(toys, recipes, out, "pretrain.seeds=[3,4]", "seeds=[3,4]")) == 0
    sweep = (out / "finetune" / "z_t" / "sweep.yaml").read_text()
    assert f"{out}/pretrain/z_t/seed{{seed}}" in sweep
    assert f"model: {out}/pretrain/ours/seed3" in (out / "finetune" / "random" / "sweep.yaml").read_text()
    assert main(bench_line(toys, recipes, out, "pretrain.seeds=[3,4]", "seeds=[3,5]")) == 2
    assert "finetune.seeds: found 5, expected seeds of pretrain.seeds: [3, 4]" in last_line(capsys)
    assert main(bench_line(toys, recipes, tmp_path / "one", "pretrain.seeds=[3]", "seeds=[0,1]")) == 0
    assert "seed3\n" in (tmp_path / "one" / "finetune" / "z_t" / "sweep.yaml").read_text()


def test_scores_of_another_seed_of_pretraining_are_void(toys, recipes, fake, tmp_path):
    out, one_arm = tmp_path / "out", "pretrain.arms={ours: {}}"

    def ran(*settings: str) -> list[str]:
        assert main(bench_line(toys, recipes, out, one_arm, "random=false", *settings)) == 0
        return commands_run(fake, out)

    assert ran("seeds=[0,1]") == [*STAGES, RUNS[0], SWEEPS[0]]
    # seed 1 started from the pretraining with seed 0
    assert ran("seeds=[0,1]", "pretrain.seeds=[0,1]") == [RUNS[0], "pretrain pretrain/ours/seed1", SWEEPS[0]]
    assert (out / "before" / "finetune-ours-1").exists()
    assert ran("seeds=[0]", "pretrain.seeds=[0,1]") == [SWEEPS[0]]  # fewer seeds, with the same pretrainings
    assert not (out / "before" / "finetune-ours-2").exists()
    # seed 1, whose run is still there, started from the pretraining with seed 1
    assert ran("seeds=[0,1]") == [RUNS[0], SWEEPS[0]]
    assert (out / "before" / "finetune-ours-2").exists()


def test_what_needs_another_step_follows_the_pretraining_of_that_one(toys, recipes, fake, tmp_path):
    out, only = tmp_path / "out", "bench.only=[finetune/ours,generation/file]"
    models = f"models={{file: {toys}/a}}"
    generation = "generation.set={extractor: 'best:finetune/ours', n: 4}"
    with pytest.raises(SystemExit, match="1"):  # the stand-in leaves no evaluation.json
        main(bench_line(toys, recipes, out, only, models, generation, "seeds=[0]"))
    before = json.loads((out / "generation/file/step.json").read_text())["fingerprint"]
    with pytest.raises(SystemExit, match="1"):
        main(bench_line(toys, recipes, out, only, models, generation, "seeds=[0]", "pretrain.seeds=[1]"))
    assert json.loads((out / "generation/file/step.json").read_text())["fingerprint"] != before


def test_results_stay_void_if_what_they_need_fails_first(toys, recipes, fake, tmp_path):
    out, only = tmp_path / "out", "bench.only=[finetune/ours]"
    assert main(bench_line(toys, recipes, out, only)) == 0
    longer = [only, "pretrain.arms={ours: {train.steps: 50}}"]
    set_behavior(fake, fail="pretrain/ours")
    with pytest.raises(SystemExit, match="1"):
        main(bench_line(toys, recipes, out, *longer))
    assert states(out)["finetune/ours"] == "blocked"
    with pytest.raises(SystemExit, match="1"):  # with other seeds, too
        main(bench_line(toys, recipes, out, *longer, "pretrain.seeds=[1]"))
    assert states(out)["finetune/ours"] == "blocked"
    set_behavior(fake)
    assert main(bench_line(toys, recipes, out, *longer)) == 0
    assert (out / "before" / "finetune-ours-1").exists()


def test_frozen_parts_stay_where_they_are_when_arms_change(toys, recipes, fake, tmp_path):
    out, only = tmp_path / "out", "bench.only=[pretrain]"
    ours, wide, long = "ours: {}", "wide: {data.size: [16,24]}", "long: {data.size: [24,16]}"
    assert main(bench_line(toys, recipes, out, only, f"pretrain.arms={{{ours}, {wide}}}")) == 0
    commands_run(fake, out)
    assert main(bench_line(toys, recipes, out, only, f"pretrain.arms={{{wide}}}")) == 0
    assert commands_run(fake, out) == []
    assert main(bench_line(toys, recipes, out, only, f"pretrain.arms={{{long}, {wide}, {ours}}}")) == 0
    stages = [line.replace("stages", "stages-long") for line in STAGES]
    assert commands_run(fake, out) == [*stages, "pretrain pretrain/long/seed0"]
    assert not (out / "before").exists()
    # the folder that this arm would have is that of another one's
    swapped = "pretrain.arms={ours: {}, other: {data.size: [16,24]}, wide: {data.size: [32,16]}}"
    assert main(bench_line(toys, recipes, out, only, swapped)) == 0
    assert commands_run(fake, out) == [
        *(line.replace("stages", "stages-wide-2") for line in STAGES),
        *("pretrain pretrain/other/seed0", "pretrain pretrain/wide/seed0"),
    ]
    other, wide = (step_entry(out, f"pretrain/{arm}")["commands"][0] for arm in ("other", "wide"))
    assert f"tokenizer={out}/pretrain/stages-wide/tokenizer" in other
    assert f"tokenizer={out}/pretrain/stages-wide-2/tokenizer" in wide


def test_random_weights_keep_the_arm_that_their_architecture_came_from(toys, recipes, fake, tmp_path):
    out, only = tmp_path / "out", "bench.only=[finetune/random]"
    assert main(bench_line(toys, recipes, out, only, "seeds=[0]")) == 0
    swapped = "pretrain.arms={z_t: {process.condition: z_t}, ours: {}}"
    assert main(bench_line(toys, recipes, out, only, swapped, "seeds=[0,1]")) == 0
    assert f"model: {out}/pretrain/ours/seed0\n" in (out / "finetune" / "random" / "sweep.yaml").read_text()


def test_a_bench_from_before_files_counted_holds(toys, recipes, fake, tmp_path):
    out, start = tmp_path / "out", tmp_path / "start.safetensors"
    shutil.copy(toys / "a" / "model.safetensors", start)
    settings = ["bench.only=[finetune/ours]", f"pretrain.set={{stages: {recipes}, init: {start}}}"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tools.bench.pretraining.digests_of_files", lambda *_, **__: {})
        assert main(bench_line(toys, recipes, out, *settings)) == 0
    assert main(bench_line(toys, recipes, out, *settings, "seeds=[0,1]")) == 0
    assert not (out / "before").exists()
    shutil.copy(toys / "b" / "model.safetensors", start)
    assert main(bench_line(toys, recipes, out, *settings, "seeds=[0,1]")) == 0
    assert sorted(path.name for path in (out / "before").iterdir()) == ["finetune-ours-1", "pretrain-ours-1"]


def test_files_that_a_recipe_names_count_by_their_content(toys, recipes, fake, tmp_path):
    out, start = tmp_path / "out", tmp_path / "start.safetensors"
    shutil.copy(toys / "a" / "model.safetensors", start)
    settings = ["bench.only=[pretrain/ours]", f"pretrain.set={{stages: {recipes}, init: {start}}}"]
    assert main(bench_line(toys, recipes, out, *settings)) == 0
    commands_run(fake, out)
    assert main(bench_line(toys, recipes, out, *settings)) == 0
    assert commands_run(fake, out) == []
    shutil.copy(toys / "b" / "model.safetensors", start)
    assert main(bench_line(toys, recipes, out, *settings)) == 0
    assert commands_run(fake, out) == [RUNS[0]]


def test_a_pretraining_of_the_bench_with_other_settings_in_its_transfers(toys, recipes, fake, tmp_path, capsys):
    out = tmp_path / "out"
    models = "models={norm: {model: 'pretrain:ours', tokenizer_norm: true}}"
    assert main(bench_line(toys, recipes, out, models, "bench.only=[finetune/ours,finetune/norm]")) == 0
    assert commands_run(fake, out)[len(STAGES) :] == [
        "pretrain pretrain/ours/seed0",
        "sweep finetune/ours",
        "sweep finetune/norm",
    ]
    plain, norm = ((out / "finetune" / arm / "sweep.yaml").read_text() for arm in ("ours", "norm"))
    same_model = f"model: {out}/pretrain/ours/seed0\n"
    assert same_model in plain
    assert same_model in norm
    assert "tokenizer_norm" not in plain
    assert "tokenizer_norm: true" in norm
    assert bench_json(out)["arms"]["norm"]["settings"]["tokenizer_norm"] is True


def test_arms_beside_files_and_intermediate_checkpoints(toys, recipes, fake, tmp_path, capsys):
    out = tmp_path / "out"
    models = f"models={{early: 'pretrain:ours/models/step-20', file: {toys}/a}}"
    sizes = "pretrain.arms={ours: {}, wide: {data.size: [16,24]}, tokens: {process.ids_to: none}}"
    only = "bench.only=[finetune/early,finetune/file,pretrain]"
    assert main(bench_line(toys, recipes, out, models, sizes, only)) == 0
    assert commands_run(fake, out) == [
        *STAGES,
        *(line.replace("stages", "stages-wide") for line in STAGES),  # of other images
        *("pretrain pretrain/ours/seed0", "pretrain pretrain/wide/seed0"),
        "pretrain pretrain/tokens/seed0",
        *("sweep finetune/early", "sweep finetune/file"),
    ]
    assert "seed0/models/step-20" in (out / "finetune" / "early" / "sweep.yaml").read_text()
    assert list(bench_json(out)["arms"]) == ["ours", "wide", "tokens", "early", "file", "random"]
    assert main(bench_line(toys, recipes, out, f"model={toys}/a", "bench.only=finetune")) == 0
    assert "replaces the models of the recipe: ours, z_t" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["pretrain.arms={{ours: {{}}, z_t: {{process.conditon: z_t}}}}"],
            "pretrain.arms.z_t: unknown key 'process.conditon'; did you mean 'process.condition'?",
        ),
        (
            ["pretrain.arms={{z_t: {{process.condition: z_t-1}}}}"],
            "pretrain.arms.z_t: process.condition: found 'z_t-1'",
        ),
        (["pretrain.set={{stage: tiny}}"], "pretrain: unknown key 'stage'; did you mean 'stages'?"),
        (["pretrain.set={{}}"], "pretrain.arms.ours: tokenizer: not given; expected tokenizer=<file or run>"),
        (["pretrain.recipe=tinny"], "pretrain: no recipe named 'tinny'"),
        (
            ["pretrain.arms={{z: {{train.seed: 1}}}}"],
            "pretrain.arms.z: train.seed: found 1, but it follows from pretrain",
        ),
        (["pretrain.arms={{stages: {{}}}}"], "pretrain.arms: 'stages', expected a name"),
        (["pretrain.arms={{a: {{}}}}", "models={{a: {toys}/a}}"], "models: 'a' is also in pretrain.arms"),
        (["data.imagenet="], "pretrain: data.source: not given; expected data.imagenet=<folder>"),
        (["data.imagenet={toys}/nowhere"], "data.imagenet: {toys}/nowhere does not exist"),
        (["pretrain.arms={{z: {{data.source: {toys}/no}}}}"], "pretrain.arms.z: data.source: {toys}/no does not exist"),
        (["pretrain.arms={{z: {{data.size: 18}}}}"], "pretrain.arms.z: data.size: "),
        (
            ["pretrain.arms={{z: {{tokenizer: {toys}/other, predictor: {toys}/a/model.safetensors}}}}"],
            "pretrain.arms.z: {toys}/other: ",
        ),
        (["models={{e: 'pretrain:our/models/step-20'}}"], "expected an arm of pretrain.arms (ours, z_t); did you mean"),
        (["models={{e: 'pretrain:ours/models/step-30'}}"], "expected models/step-<a multiple of 20 below 40>"),
        (["models={{e: 'pretrain:ours/models/step-40'}}"], "expected models/step-<a multiple of 20 below 40>"),
        (["bench.only=pretrain/ourz"], "bench.only: found 'pretrain/ourz', expected benchmarks (pretrain, generation"),
        (["bench.only=pretrain/stages-x"], "bench.only: found 'pretrain/stages-x', expected benchmarks (pretrain"),
    ],
)
def test_wrong_input_is_named_before_the_first_step(toys, recipes, fake, tmp_path, capsys, settings, message):
    out = tmp_path / "out"
    assert main(bench_line(toys, recipes, out, *(setting.format(toys=toys) for setting in settings))) == 2
    assert message.format(toys=toys) in last_line(capsys)
    assert not out.exists()
    assert commands_run(fake, out) == []


def test_a_pretraining_that_fails_blocks_its_own_steps_alone(toys, recipes, fake, tmp_path):
    set_behavior(fake, fail="pretrain/z_t")
    with pytest.raises(SystemExit, match="1"):
        main(bench_line(toys, recipes, tmp_path))
    found = {name: state for name, state in states(tmp_path).items() if name.startswith(("pretrain", "finetune"))}
    assert {name: state for name, state in found.items() if state != "done"} == {
        "pretrain/z_t": "failed",
        "finetune/z_t": "blocked",
    }


def test_pretraining_jobs_come_first(toys, recipes, slurm, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(bench_line(toys, recipes, out, "bench.launch=slurm", "random=false")) == 0
    names = capsys.readouterr().out.split()[1::2]
    assert names == ["pretrain/stages", "pretrain/ours", "pretrain/z_t", "finetune/ours", "finetune/z_t", "report"]
    jobs = [line.split()[1] for line in (slurm / "sbatch.txt").read_text().splitlines()]
    assert jobs[1:5] == [f"--dependency=afterok:{number}" for number in (101, 101, 102, 103)]
    for name in names[:-1]:  # do here what the jobs do
        (script,) = (out / name).glob("job.sbatch")
        assert f"bench.only=[{name}]" in script.read_text().replace("'", "")
        only = ["bench", f"{out}/recipe.yaml", f"bench.only=[{name}]", "bench.launch=local", "bench.share=true"]
        assert main(only) == 0
    assert commands_run(slurm, out) == [*STAGES, *RUNS, *SWEEPS[:2]]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(4000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


def results(out: Path) -> dict[str, object]:
    """Return what a bench has measured, and the weights of its models, without times."""
    files = [*out.glob("pretrain/*/*/model.safetensors"), *out.glob("finetune/*/*/*/results.json")]
    found: dict[str, object] = {str(path.relative_to(out)): path.read_bytes() for path in files}
    for step in bench_json(out)["steps"]:
        if step["state"] != "left out":
            found[step["name"]] = [
                step["state"],
                step["scores"],
                [each.replace(str(out), "") for each in step["commands"]],
            ]
    return found


def test_a_bench_killed_in_its_second_pretraining_continues(toys, recipes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killed, whole = (bench_line(toys, recipes, tmp_path / name, "random=false") for name in ("killed", "whole"))
    out = tmp_path / "killed"
    with monkeypatch.context() as patches:  # the first arm in this process, which saves the start of three others
        patches.setattr(children.Children, "run_addp", run_here)
        assert main([*(each for each in killed if not each.startswith("bench.only")), "bench.only=pretrain/ours"]) == 0
    with subprocess.Popen([*children.ADDP, *killed], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(out / "pretrain" / "z_t" / "seed0" / "last_checkpoint.json", process)
        finally:
            process.send_signal(signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in out.glob("pretrain/[so]*/*/model.safetensors")}
    assert len(before) == 3  # tokenizer, predictor, the first arm
    assert not (out / "pretrain" / "z_t" / "seed0" / "model.safetensors").exists()
    monkeypatch.setattr(children.Children, "run_addp", run_here)
    assert main(killed) == 0
    table = capsys.readouterr().out.splitlines()[-6:-1]  # the last line is the report's path
    assert {path: path.stat().st_mtime_ns for path in before} == before
    lines = (out / "pretrain" / "z_t" / "seed0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in line] == [10, 20, 30, 40]
    assert main(whole) == 0
    assert capsys.readouterr().out.splitlines()[-6:-1] == table
    assert [line.split()[0] for line in table[1:4]] == ["ours", "z_t", "chance"]
    assert results(out) == results(tmp_path / "whole")
    assert bench_json(out)["arms"]["z_t"]["images_seen"] == 160
