"""`addp bench`: commands that are printed, and jobs of Slurm."""

import yaml
from bench_commands import bench_command, commands_run, last_line, states

from addp_core.recipes.cli import main
from addp_core.training.run_folder import lock_out, release_out

SBATCH = """#!/bin/bash
echo "$@" >> $FAKE_ADDP/sbatch.txt
echo $((100 + $(wc -l < $FAKE_ADDP/sbatch.txt)));
"""


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


def test_slurm_gets_a_job_for_each_step(toys, fake, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    line = bench_command(toys, out, "random=false", "bench.only=[robustness/a,det/a]", "bench.launch=slurm")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert main(line) == 2
    assert "no sbatch on the PATH" in last_line(capsys)
    assert not out.exists()
    (fake / "sbatch").write_text(SBATCH)
    (fake / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:/usr/bin:/bin")
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
    arguments = script.splitlines()[-1].replace("'", "").partition(" -m addp_core ")[2].split()
    assert arguments[:3] == ["bench", f"{out}/recipe.yaml", "bench.only=[robustness/a]"]

    # do here what the jobs do: they share the folder, and each has its own step
    lock_out(out, shared=True)
    try:
        first = (out / "finetune" / "a" / "job.sbatch").read_text().splitlines()[-1].replace("'", "")
        assert main(first.partition(" -m addp_core ")[2].split()) == 0
        assert main(arguments) == 0
        assert commands_run(fake, out) == ["sweep finetune/a", "robustness robustness/a/seed0"]
        assert states(out)["robustness/a"] == "done"
        assert states(out)["det/a"] == "missing"
    finally:
        release_out(out)
