"""`launch=slurm`: a training as a job, submitted, stopped at its time limit, and continued."""

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ranks import free_port
from slurm_commands import stand_in_for_slurm
from toy_stage import metrics
from transfers import NO_AUGMENTATION, write_color_images

from addp_core.recipes.cli import main
from addp_core.recipes.keys import all_keys
from addp_core.recipes.verbs import VERBS, recipe_module, verb_of
from addp_core.training.submission import KEYS

TRAININGS = ("tokenizer", "predictor", "pretrain", "mae", "finetune", "linprobe", "det train", "seg train", "seg probe")


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    return stand_in_for_slurm(folder, monkeypatch)


@pytest.fixture
def training(tmp_path) -> list[str]:
    """A short fine-tuning; only `out` is missing."""
    write_color_images(tmp_path / "data", train=2, val=2)
    keys = {"model": "tiny", "init": "random", "patch_size": 4, "data": tmp_path / "data", "data.size": 12}
    keys |= {"data.workers": 0, "train.steps": 40, "train.batch": 4, "train.log_every": 1, "eval_batch": 2}
    keys |= {"train.precision": "fp32", "drop_path": 0}  # the same numbers on any number of processes
    return ["finetune", *(f"{key}={value}" for key, value in (keys | NO_AUGMENTATION).items())]


def submit(arguments: list[str]) -> None:
    """Run a command that ends as soon as the job is in the queue."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "launch=slurm"])
    assert ended.value.code == 0


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_every_training_has_the_keys():
    with_keys = [verb for verb in VERBS if {name for name, _ in all_keys(recipe_module(verb).Recipe)} >= KEYS]
    assert tuple(with_keys) == TRAININGS
    assert [verb_of(recipe_module(verb).Recipe) for verb in TRAININGS] == with_keys


def test_a_training_is_submitted_once(training, slurm, tmp_path, capsys):
    out = tmp_path / "a run, 100%"
    job = ["slurm.partition=gpu", "slurm.account=us", "slurm.time=24:00:00", "slurm.nodes=2", "slurm.gpus=8"]
    job += ["slurm.cpus=12", "slurm.mem=200G", "slurm.sbatch=['--qos=long','--comment=two words']", "train.batch=32"]
    submit([*training, f"out={out}", *job])
    captured = capsys.readouterr()
    assert captured.out == f"101 {out}\n"
    assert "job 101 trains on 16 processes; its log: " in captured.err
    assert (slurm / "sbatch.txt").read_text() == f"--parsable {out}/job.sbatch\n"
    lines = (out / "job.sbatch").read_text().splitlines()
    options = [shlex.split(line.removeprefix("#SBATCH "))[0] for line in lines if line.startswith("#SBATCH")]
    assert options[:2] == ["--job-name=addp-a run, 100%", f"--output={out}/slurm-%j.txt".replace("100%", "100%%")]
    assert options[2:] == [
        *("--requeue", "--signal=B:USR1@120", "--open-mode=append", "--partition=gpu", "--account=us"),
        *("--time=24:00:00", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12"),
        *("--mem=200G", "--qos=long", "--comment=two words"),
    ]
    (command,) = [line for line in lines if line.startswith("srun ")]
    assert shlex.split(command)[-5:] == ["addp_core", "finetune", f"{out}/recipe.yaml", "launch=local", "&"]
    assert "launch: slurm\n" in (out / "recipe.yaml").read_text()

    (slurm / "queue.txt").write_text("99\n101\n")
    submit([*training, f"out={out}", *job])
    assert "job 101 is in the queue or runs; nothing to submit" in last_line(capsys)
    (slurm / "queue.txt").write_text("99\n")
    submit([*training, f"out={out}", *job])
    assert json.loads((out / "jobs.json").read_text()) == {"training": "102"}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["data=nowhere"], "addp: data.source: nowhere does not exist"),
        (["slurm.sbatch=[gres=gpu:8]"], "addp: slurm.sbatch: found 'gres=gpu:8', expected an option in one line"),
        (["slurm.partition=a\nb"], "addp: slurm.partition: found 'a\\nb', expected"),
        (["slurm.nodes=0"], "addp: slurm.nodes: found 0, expected a whole number >= 1"),
        (["slurm.nodes=3"], "addp: train.batch=4: found 1 micro-steps x 3 processes, expected their product to"),
    ],
)
def test_mistakes_are_found_before_the_job_waits(training, slurm, tmp_path, capsys, settings, line):
    assert main([*training, f"out={tmp_path / 'run'}", "launch=slurm", *settings]) == 2
    assert last_line(capsys).startswith(line)
    assert not (slurm / "sbatch.txt").exists()


def test_what_slurm_refuses_is_one_line(training, slurm, tmp_path, capsys, monkeypatch):
    line = [*training, f"out={tmp_path / 'run'}", "launch=slurm"]
    (slurm / "refused").touch()
    assert main(line) == 2
    assert last_line(capsys).endswith("job.sbatch: sbatch failed: sbatch: error: invalid partition specified: mars")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(line) == 2
    assert last_line(capsys) == (
        "addp: launch=slurm: no sbatch on the PATH; expected a machine of a Slurm cluster, or local"
    )


def test_runs_of_a_sweep_are_no_jobs(training, slurm, tmp_path, capsys):
    settings = {key: value for key, _, value in (each.partition("=") for each in training[1:])}
    line = ["sweep", "verb=finetune", f"out={tmp_path / 'sweep'}", "metric=top1", "arms={a: {}}"]
    assert main([*line, f"set={json.dumps(settings | {'launch': 'slurm'})}"]) == 2
    assert "launch: found slurm, expected local in a bench or sweep" in last_line(capsys)


@pytest.mark.slow
def test_a_job_that_is_stopped_at_its_limit_finishes_with_the_numbers_of_an_uninterrupted_run(
    training, slurm, tmp_path, monkeypatch
):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # two jobs of 101 may run on this machine
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out, script = tmp_path / "run", tmp_path / "run" / "job.sbatch"
    assert main([*training, f"out={tmp_path / 'reference'}"]) == 0
    submit([*training, f"out={out}", "slurm.processes=2"])
    job = subprocess.Popen(["bash", script])
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    assert (slurm / "scontrol.txt").read_text() == "requeue 101\n"
    stopped_after = metrics(out)[-1]["step"]
    assert stopped_after < 40

    assert subprocess.run(["bash", script], timeout=120).returncode == 0
    assert (slurm / "scontrol.txt").read_text() == "requeue 101\n"  # once
    lines, reference = metrics(out), metrics(tmp_path / "reference")
    assert [line["step"] for line in lines] == [line["step"] for line in reference]
    losses, expected = ([line["loss"] for line in each if "loss" in line] for each in (lines, reference))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert (out / "model.safetensors").exists()
