"""The keys with which transfer recipes choose their pretrained encoder, and the encoder that they build."""

from collections.abc import Iterable

from addp_core.base.errors import UserError
from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.encoder import Encoder
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.weights.architectures import NORMALISATION as NORMALISATION
from addp_core.weights.config import EncoderKeys as EncoderKeys


def has_encoder(names: Iterable[str]) -> bool:
    """Return whether the tensors of a checkpoint, by their names, are or include those of a pretrained ViT."""
    return any(name.endswith("blocks.0.attn.qkv.weight") for name in names)


def has_cnn(names: Iterable[str], encoder: CnnEncoder) -> bool:
    """Return whether the tensors of a checkpoint, by their names, are or include those of a CNN like `encoder`."""
    *_, last = (name.removeprefix("body.") for name, _ in encoder.named_parameters())
    return any(name.endswith(last) for name in names)


def check_positions(encoder: Encoder | TokenEncoder, source: str, key: str) -> None:
    """Raise UserError if the encoder has no position information, as BEiT's without its relative tables.

    Args:
        encoder: the encoder as it will be trained.
        source: its checkpoint, for the message.
        key: the recipe's key for the kind of relative positions, for the message.
    """
    tables = [value for name, value in encoder.named_parameters() if ".relative." in name]
    if not any(value.any() for value in (encoder.positions, *tables)):
        raise UserError(
            f"{key}={encoder.attention.relative}: {source} has no positions but relative tables (BEiT), which this "
            f"setting drops; expected {key}=table"
        )
