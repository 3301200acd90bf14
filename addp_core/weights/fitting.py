"""Fitting tensors to modules: copying them in, replacing parts, and resampling positions to other sizes."""

import logging
import re
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn import functional

from addp_core.base.errors import UserError
from addp_core.networks.attention import resize_bias_table
from addp_core.networks.cnn import CnnArchitecture, CnnEncoder
from addp_core.networks.encoder import Encoder, resample_positions
from addp_core.networks.layers import Block
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.weights.architectures import EncoderArchitecture, TokenEncoderArchitecture
from addp_core.weights.files import State

log = logging.getLogger("addp")

POSITIONS = re.compile(r"(^|\.)(decoder_)?pos(_\w+)?_embed(_learned)?$|position_embeddings")

AnyArchitecture = EncoderArchitecture | TokenEncoderArchitecture | CnnArchitecture
AnyEncoder = Encoder | TokenEncoder | CnnEncoder
Module = TypeVar("Module", bound=nn.Module)


def fill(module: Module, state: State, source: str) -> Module:
    """Copy the tensors into the module and return it in eval mode.

    Raises UserError that lists every missing, unexpected or mis-shaped tensor.
    """
    expected = module.state_dict()
    faults = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "mis-shaped": [
            f"{key} (found {tuple(state[key].shape)}, expected {tuple(value.shape)})"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise UserError(f"{source}: the tensors do not fit the {type(module).__name__}: {found}")
    module.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return module.eval()


def replace_part(state: State, prefix: str, part: State) -> State:
    """Replace all tensors whose names begin with `prefix` by those of `part`."""
    return {key: value for key, value in state.items() if not key.startswith(prefix)} | {
        prefix + key: value for key, value in part.items()
    }


# -------------------- other sizes


def resample_state(state: State, old: tuple[int, int], new: tuple[int, int]) -> State:
    """Resample all absolute positions from the old token grid (rows, columns) to the new one, bicubically; the class
    token's position is kept.
    """
    if tuple(old) == tuple(new):
        return state
    return {key: _resample(value, old, new) if POSITIONS.search(key) else value for key, value in state.items()}


def fit_encoder_state(state: State, architecture: AnyArchitecture, encoder: AnyEncoder) -> State:
    """Fit the tensors of a file's encoder to `encoder`: resample positions to its grid, drop parts that it lacks (with
    a warning for trained relative positions), and add the relative positions that the file lacks, at their initial
    zeros. Of a CNN, the part that only pretraining has is dropped.
    """
    if isinstance(architecture, CnnArchitecture) or isinstance(encoder, CnnEncoder):
        return {key: value for key, value in state.items() if key.startswith("body.")}
    state, expected = dict(state), encoder.state_dict()
    if not encoder.config.tokenizer_norm:
        state = {key: value for key, value in state.items() if not key.startswith("tokenizer_norm.")}
    if not encoder.attention.class_token:
        state.pop("cls_token", None)
    dropped = {key for key in state if ".relative." in key and key not in expected}
    if any(state[key].any() for key in dropped):
        log.warning(
            "relative positions: found relative=%s in the file, whose trained values are left out of an encoder with "
            "relative=%s",
            architecture.attention.relative,
            encoder.attention.relative,
        )
    state = {key: value for key, value in state.items() if key not in dropped}
    for key, value in expected.items():
        if ".relative." in key:
            state[key] = _resample_relative(state[key], value, key, architecture, encoder) if key in state else value
    return resample_state(state, architecture.grid, encoder.grid)


def _resample(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    batched = positions if positions.ndim == 3 else positions[None]
    resized = resample_positions(batched.float(), old, new)
    return resized if positions.ndim == 3 else resized[0]


def _resample_relative(
    table: Tensor,
    target: Tensor,
    key: str,
    architecture: EncoderArchitecture | TokenEncoderArchitecture,
    encoder: Encoder | TokenEncoder,
) -> Tensor:
    """Resample one table of relative positions to the shape of `target`, for the grid that its block attends over."""
    if not key.endswith("relative_position_bias_table"):
        if table.shape == target.shape:
            return table
        return functional.interpolate(table.float().t().unsqueeze(0), size=len(target), mode="linear")[0].t()
    if architecture.attention.class_token and not encoder.attention.class_token:
        table = table[:-3]  # the biases to, from and between class tokens
    index = int(key.split(".")[1])
    old_window = architecture.attention.windows(len(encoder.blocks))[index]
    new_window = cast(Block, encoder.blocks[index]).window
    old = (old_window, old_window) if old_window else architecture.grid
    new = (new_window, new_window) if new_window else encoder.grid
    return resize_bias_table(table.float(), old, new, encoder.num_prefix_tokens)
