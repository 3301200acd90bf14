"""Environment variables with which accelerate would change a run.

The recipe decides, so those that contradict it are an error. What `accelerate launch` writes without options is fine.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch

from addp_core.base.errors import UserError
from addp_core.training.precision import AUTO

OFF = ("", "0", "false", "no", "off", "n", "f")
NO_REPLACEMENT = "it is not supported"

# Variables that switch something on, and the key to set instead.
SWITCHES = {
    "ACCELERATE_USE_FSDP": "train.parallel=fsdp shards the training",
    "ACCELERATE_USE_DEEPSPEED": "train.parallel=fsdp saves memory in the same way",
    "ACCELERATE_USE_MEGATRON_LM": NO_REPLACEMENT,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "train.parallel=fsdp shards the training",
    "ACCELERATE_USE_SAGEMAKER": NO_REPLACEMENT,
    "ACCELERATE_DYNAMO_BACKEND": "train.compile=true compiles the model",
    "ACCELERATE_TORCH_DEVICE": "choose the GPUs with CUDA_VISIBLE_DEVICES",
}
CPU, ACCUMULATION, PRECISION = (
    f"ACCELERATE_{name}" for name in ("USE_CPU", "GRADIENT_ACCUMULATION_STEPS", "MIXED_PRECISION")
)


def check_environment(recipe: Mapping[str, Any]) -> None:
    """Raise UserError if the environment tells accelerate something else than the recipe does.

    recipe: full name of a key -> value; nothing is compared with keys that it does not have.
    """
    for name, instead in SWITCHES.items():
        if os.environ.get(name, "").lower() not in OFF:
            raise _contradiction(name, instead)
    if os.environ.get(CPU, "").lower() not in OFF and torch.accelerator.is_available():
        raise _contradiction(CPU, "hide the GPUs with CUDA_VISIBLE_DEVICES=")
    if os.environ.get(ACCUMULATION, "1") not in ("", "1"):
        raise _contradiction(ACCUMULATION, "train.accumulate is the number of micro-steps")
    precision = recipe.get("train.precision")
    launched = os.environ.get(PRECISION, "no").lower()
    if precision and launched not in ("", "no", precision):
        instead = f"={launched} asks for it" if precision == AUTO else f"={precision} is what the recipe says"
        raise _contradiction(PRECISION, f"train.precision{instead}")


def _contradiction(name: str, instead: str) -> UserError:
    return UserError(
        f"{name}={os.environ[name]}: found in the environment (`accelerate launch` or its configuration sets it), "
        f"expected it unset; {instead}"
    )
