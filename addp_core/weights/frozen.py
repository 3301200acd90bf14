"""What is probed of a frozen encoder: the blocks whose features are taken, and the final norm."""

import math
from typing import cast

from torch import nn

from addp_core.base.errors import UserError
from addp_core.networks.cnn import CnnEncoder
from addp_core.weights.fitting import AnyEncoder
from addp_core.weights.reading import read_weights


def resolve_block(encoder: AnyEncoder, block: int, key: str = "block") -> int:
    """Return the number of a block, counted from 1, where a negative number counts from the end.

    key: the recipe's key that holds the number, for messages.

    Raises UserError if the encoder has no such block.
    """
    depth, first = encoder.depth, encoder.first_wide_block
    number = block if block > 0 else depth + 1 + block
    if not first <= number <= depth or not block:
        narrower = f" (those before have fewer than {encoder.width} channels)" if first > 1 else ""
        raise UserError(
            f"{key}: found {block}, expected {first} to {depth}, or -1 to -{depth + 1 - first} from the end{narrower}"
        )
    return number


def spaced_blocks(depth: int, count: int | None, first: int = 1) -> list[int]:
    """Return `count` evenly spaced blocks, counted from 1, up to the last; all from `first` on if that is fewer."""
    depth -= first - 1
    count = min(depth, count or depth)
    return [first - 1 + math.ceil(depth * number / count) for number in range(1, count + 1)]


def check_pretrained_norm(encoder: AnyEncoder, checkpoint: str, weights: str = "") -> None:
    """Check that the encoder's final norm was trained with it: ADDP's and MAE's `norm`, MAGE's of its encoder.

    Args:
        encoder: as it will be probed.
        checkpoint: the file that it comes from.
        weights: which of the file's models it is, as in `load_encoder`.

    Raises:
        UserError: the file has no such norm, which then has its initial values, or it is a fine-tuned classifier, whose
            encoder was trained on without it.
    """
    advice = "expected norm=layer or norm=none, or a checkpoint of pretraining"
    norm = cast(nn.LayerNorm, encoder.norm)
    if isinstance(encoder, CnnEncoder):
        raise UserError(f"norm=pretrained: {encoder.config.arch} has no final norm; expected norm=layer or norm=none")
    if norm.weight.eq(1).all() and not norm.bias.any():
        raise UserError(f"norm=pretrained: {checkpoint} has no trained final norm; {advice}")
    file = read_weights(checkpoint, wanted=weights)
    if file.kind == "classifier" and file.architecture.norm == "layer":
        raise UserError(f"norm=pretrained: {checkpoint} was fine-tuned without its final norm; {advice}")
