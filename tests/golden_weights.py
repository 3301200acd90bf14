"""The weights of the parity data: a state dict in the published layout, generated from names, shapes and a seed."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
SPEC = json.loads((GOLDEN / "spec.json").read_text())
HEADS = {
    "encoder_heads": SPEC["heads"],
    "decoder_heads": SPEC["decoder_heads"],
    "predictor_heads": SPEC["heads"],
    "predictor_decoder_heads": SPEC["decoder_heads"],
}


def golden_state() -> dict[str, Tensor]:
    """Return {published name: float32 tensor}, the weights with which the parity data was computed."""
    return {name: _random_weight(name, tuple(shape)) for name, shape in SPEC["shapes"].items()}


def _random_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return normal numbers seeded by the name.

    Matrices are scaled by their fan-in, codes and embeddings to a fixed standard deviation; the rest is small.
    """
    seed = (zlib.crc32(f"addp.{name}".encode()) ^ SPEC["seed"]) & 0x7FFFFFFF
    values = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    leaf = name.split(".")[-1]
    is_matrix = len(shape) > 1 and "embed" not in leaf and not name.endswith(("cls_token", "mask_token"))
    if is_matrix:
        fan_in = int(np.prod(shape[1:]))
        values *= 1 / np.sqrt(fan_in)
        if "token_emb" in name or "embedding" in name:
            values *= np.sqrt(fan_in) * (0.3 if "quantize" in name else 0.2)
    elif leaf == "weight":
        values = 1 + 0.1 * values
    else:
        values *= 0.1 if leaf == "bias" else 0.2
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
