"""What the environment tells accelerate against the recipe is an error; what `accelerate launch` always sets is not."""

import os

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from toy_stage import run

from addp_core.base.errors import UserError
from addp_core.training.environment import check_environment


@pytest.mark.parametrize(
    ("name", "value", "settings", "instead"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", [], "train.accumulate"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", ["train.accumulate=4"], "train.accumulate"),  # 4 x 4 otherwise
        ("ACCELERATE_MIXED_PRECISION", "bf16", [], "train.precision=bf16"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", ["train.precision=fp32"], "train.precision=fp32"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", ["train.precision=bf16"], "train.precision=bf16"),
        ("ACCELERATE_USE_FSDP", "true", [], "train.parallel=fsdp"),
        ("ACCELERATE_USE_FSDP", "true", ["train.parallel=fsdp"], "train.parallel=fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "true", [], "train.parallel=fsdp"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", [], "not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", [], "train.parallel=fsdp"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", [], "train.compile=true"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:0", [], "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_variables_against_the_recipe(name, value, settings, instead, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=f"^{name}={value}: found in the environment .*, expected it unset; .*{instead}"
    ):
        run([f"out={tmp_path / 'run'}", *settings])
    assert not (tmp_path / "run").exists()


def launched(*options: str) -> dict[str, str]:
    """Return the environment that `accelerate launch` gives to its processes; it fills in what is not given."""
    filled_in = ("--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
    return prepare_multi_gpu_env(launch_command_parser().parse_args([*filled_in, *options, "--multi_gpu", "script"]))


@pytest.mark.parametrize(
    "options", [(), ("--mixed_precision=bf16",), ("--gradient_accumulation_steps=4",), ("--gradient_clipping=1",)]
)
def test_what_accelerate_launch_sets_by_default_is_fine(options, monkeypatch):
    """Some options matter with DeepSpeed alone."""
    monkeypatch.setattr(os, "environ", launched(*options))
    check_environment({"train.precision": "bf16"})


@pytest.mark.parametrize("version", ["1", "2"])
def test_accelerates_fsdp_is_refused_with_the_key_to_set(version, monkeypatch):
    monkeypatch.setattr(os, "environ", launched("--use_fsdp", f"--fsdp_version={version}"))
    with pytest.raises(UserError, match=r"^ACCELERATE_USE_FSDP=true: .*; train.parallel=fsdp shards the training$"):
        check_environment({})
