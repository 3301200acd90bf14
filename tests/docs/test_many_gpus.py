"""The commands of docs/many-gpus.md start several processes: each block runs on two CPU processes, with a small
training in place of the one named.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checks import shards_on_cpus
from ranks import free_port
from slurm_commands import stand_in_for_slurm
from transfers import NO_AUGMENTATION, write_color_images

PAGE = Path(__file__).parents[2] / "docs" / "many-gpus.md"
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
SUBMITTED = "launch=slurm"  # what such a job does, tests/core/training/test_submission.py tests


def on_two_cpus(block: str, training: str, out: Path) -> str:
    """Return a block of the page for two processes that do another training in the folder `out`."""
    block = re.sub(r"\\\n\s*", "", block)
    block, trainings = re.subn(r"-m addp_core [^\n']*", f"-m addp_core {training}", block)
    assert trainings == 1
    block = block.replace("runs/vit_b/", f"{out}/")
    block = re.sub(r"(--nproc_per_node|--num_processes) 8", r"\1 2", block)
    return block.replace("29400", str(free_port()))


def name_of(block: str) -> str:
    """Return what a block starts, as the name of its test."""
    return " ".join(word for word in ("torchrun", "srun", "accelerate", "fsdp") if word in block)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=name_of(block), marks=[shards_on_cpus] if "fsdp" in block else [])
        for block in BLOCKS
        if SUBMITTED not in block
    ],
)
def test_each_command_trains_on_two_processes(block, tmp_path, monkeypatch):
    write_color_images(tmp_path / "data", train=2, val=2)
    keys = {"model": "tiny", "init": "random", "patch_size": 4, "data": tmp_path / "data", "data.size": 12}
    keys |= {"data.workers": 0, "train.steps": 2, "train.batch": 4, "eval_batch": 2, "out": tmp_path / "run"}
    if "fsdp" in block:
        keys["train.parallel"] = "fsdp"
    training = "finetune " + " ".join(f"{key}={value}" for key, value in (keys | NO_AUGMENTATION).items())
    stand_in_for_slurm(tmp_path, monkeypatch)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    if "srun" in block:
        environment["MASTER_PORT"] = str(free_port())  # tests at the same time are of the same job
    done = subprocess.run(
        ["bash", "-c", on_two_cpus(block, training, tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "scontrol.txt").exists()
    assert done.stderr.count("finished after 2 steps") == 1, done.stderr  # one job, not two
