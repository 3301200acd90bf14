"""`addp bench`: commands that are printed, and jobs of Slurm."""

import json
import os
import shlex
import signal
import subprocess
import time

import pytest
import yaml
from bench_commands import bench_command, commands_run, last_line, states

from addp_core.recipes.cli import main
from addp_core.training.run_folder import lock_out, release_out
from tools.bench.slurm import _write_job_script


def addp_arguments(script: str) -> list[str]:
    """Return the arguments of `addp` in a job's script."""
    (line,) = [line for line in script.splitlines() if " -m addp_core " in line]
    return shlex.split(line.removesuffix(" &").partition(" -m addp_core ")[2])


def test_the_printed_commands_are_those_that_run(toys, fake, tmp_path, capsys):
    out = tmp_path / "out"
    line = bench_command(toys, out, "random=false", "bench.only=[robustness/a,det/a]")
    assert main([*line, "bench.launch=print", "bench.processes=4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "# finetune/a",
        f"addp sweep {out}/finetune/a/sweep.yaml",
        "# robustness/a (after finetune/a)",
        f"torchrun --standalone --nproc_per_node 4 -m addp_core robustness model={out}/finetune/a/a/best-seed0 "
        f"out={out}/robustness/a/seed0 imagenet_a={toys}/toy/imagenet-a",
        "# det/a",
        f"addp sweep {out}/det/a/sweep.yaml",
        f"addp det predict model={out}/det/a/a/best-seed0 images={out}/inputs/coco out={out}/det/a/pictures "
        "score=0.1 most=8",
    ]
    assert yaml.safe_load((out / "det" / "a" / "sweep.yaml").read_text())["processes"] == 4
    assert sorted(path.name for path in (out / "inputs" / "coco").iterdir())[0].startswith("000.")
    assert commands_run(fake, out) == []
    assert main(line) == 0
    assert len(commands_run(fake, out)) == 4


def test_models_with_settings_of_their_encoder(toys, fake, tmp_path, capsys):
    out = tmp_path / "out"
    arms = {"pixels": {"model": str(toys / "a"), "init": "random"}}
    arms["tokens"] = {**arms["pixels"], "input": "token"}
    line = [*bench_command(toys, out, "random=false"), f"models={json.dumps(arms)}", "bench.only=finetune,det,seg"]
    assert main([*line, "bench.launch=print"]) == 0
    assert "# seg/tokens\n" in capsys.readouterr().out
    for task in ("finetune", "det", "seg"):
        sweep = yaml.safe_load((out / task / "tokens" / "sweep.yaml").read_text())
        assert sweep["arms"] == {"tokens": arms["tokens"]}
    assert main([*line, "models={a: {init: random}}"]) == 2
    assert "models.a: found no model, expected {model: <run or file>, ...}" in last_line(capsys)


def test_slurm_gets_a_job_for_each_step(toys, fake, slurm, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    line = bench_command(toys, out, "random=false", "bench.only=[robustness/a,det/a]", "bench.launch=slurm")
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert main(line) == 2
    assert "no sbatch on the PATH" in last_line(capsys)
    assert not out.exists()
    monkeypatch.setenv("PATH", path)
    assert main([*line, "bench.sbatch=['--gres=gpu:8','--account=us','-p short']"]) == 0
    assert capsys.readouterr().out.split() == [
        *("101", "finetune/a", "102", "robustness/a", "103", "det/a", "104", "report")
    ]
    jobs = (fake / "sbatch.txt").read_text().splitlines()
    assert jobs[0] == f"--parsable {out}/finetune/a/job.sbatch"
    assert jobs[1].startswith("--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes ")
    assert jobs[3] == f"--parsable --dependency=afterany:101:102:103 {out}/job.sbatch"
    script = (out / "robustness" / "a" / "job.sbatch").read_text()
    assert "#SBATCH --gres=gpu:8\n" in script
    report = (out / "job.sbatch").read_text()  # it takes no GPU, but needs an account too
    assert "#SBATCH --account=us\n#SBATCH -p short\n" in report
    assert "gpu" not in report
    arguments = addp_arguments(script)
    assert arguments[:3] == ["bench", f"{out}/recipe.yaml", "bench.only=[robustness/a]"]

    # do here what the jobs do: they share the folder, and each has its own step
    lock_out(out, shared=True)
    try:
        assert main(addp_arguments((out / "finetune" / "a" / "job.sbatch").read_text())) == 0
        assert main(arguments) == 0
        assert commands_run(fake, out) == ["sweep finetune/a", "robustness robustness/a/seed0"]
        assert states(out)["robustness/a"] == "done"
        assert states(out)["det/a"] == "missing"
    finally:
        release_out(out)


def test_a_second_submit_adds_only_what_has_no_job(toys, fake, slurm, tmp_path, capsys, caplog):
    line = bench_command(
        toys, tmp_path / "out", "random=false", "bench.only=[robustness/a,det/a]", "bench.launch=slurm"
    )
    assert main(line) == 0
    (slurm / "queue.txt").write_text("7\n101\n102\n103\n104\n")
    assert main(line) == 0
    assert len((slurm / "sbatch.txt").read_text().splitlines()) == 4
    assert "robustness/a: job 102 is in the queue" in caplog.text
    (slurm / "queue.txt").write_text("101\n103\n104\n")  # one job has failed
    capsys.readouterr()
    assert main(line) == 0
    assert capsys.readouterr().out.split() == ["105", "robustness/a", "106", "report"]
    jobs = (slurm / "sbatch.txt").read_text().splitlines()
    assert "--dependency=afterok:101 " in jobs[4]
    assert jobs[5].split()[1] == "--dependency=afterany:101:103:105"
    (slurm / "down").touch()
    assert main(line) == 2
    assert last_line(capsys) == (
        "addp: bench.launch=slurm: squeue failed: slurm_load_jobs error: Unable to contact slurm controller"
    )


def test_values_in_job_scripts_may_contain_anything(toys, fake, slurm, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a folder, 100%"
    line = bench_command(toys, out, "random=false", "bench.only=[det/a]", "bench.launch=slurm")
    options = ["--comment=two words", "-p short", "--account  it's #1", "--exclusive", "-n4"]
    assert main([*line, f"bench.sbatch={json.dumps(options)}"]) == 0
    script = out / "det" / "a" / "job.sbatch"
    lines = [each.removeprefix("#SBATCH ") for each in script.read_text().splitlines() if each.startswith("#SBATCH")]
    assert [shlex.split(each) for each in lines] == [
        ["--job-name=addp-det-a"],
        [f"--output={out}/det/a/slurm-%j.txt".replace("100%", "100%%")],
        *(["--requeue"], ["--signal=B:USR1@120"], ["--open-mode=append"]),
        *(["--comment=two words"], ["-p", "short"], ["--account", "it's #1"], ["--exclusive"], ["-n4"]),
    ]
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert f"\ncd {shlex.quote(os.getcwd())} || exit\n" in script.read_text()
    for option in ("gres=gpu:8", "--comment=a\nrm"):
        assert main([*line, f"bench.sbatch={json.dumps([option])}"]) == 2
        assert f"bench.sbatch: found {option!r}, expected an option in one line" in last_line(capsys)


@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [(signal.SIGUSR1, 1, True), (signal.SIGUSR1, 0, False), (signal.SIGTERM, 1, False), (None, 3, False)],
)
def test_a_job_stopped_at_its_time_limit_goes_back_into_the_queue(slurm, tmp_path, monkeypatch, number, code, requeued):
    """The jobs after it go on waiting then; a job that is cancelled or fails ends with its code."""
    program = tmp_path / "addp"
    program.write_text(
        f"#!/bin/bash\ntrap 'touch {tmp_path}/stopped; exit {code}' USR1\ntouch {tmp_path}/begun\n"
        + ("while true; do sleep 0.05; done\n" if number else f"exit {code}\n")
    )
    program.chmod(0o755)
    monkeypatch.setattr("tools.bench.slurm.ADDP", [str(program)])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    job = subprocess.Popen(["bash", _write_job_script(tmp_path, "step", [], [])])
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    if number:
        job.send_signal(number)
    assert job.wait(timeout=20) == code
    assert (tmp_path / "stopped").exists() == bool(number)
    assert (slurm / "scontrol.txt").exists() == requeued
    if requeued:
        assert (slurm / "scontrol.txt").read_text() == "requeue 7\n"
