"""The keys with which transfer recipes choose their pretrained encoder, and the encoder that they build."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from addp_core.base.errors import UserError
from addp_core.base.paths import FilePath
from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.encoder import SIZES_HELP, Encoder
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.weights.architectures import NORMALISATION as NORMALISATION
from addp_core.weights.architectures import Normalisation
from addp_core.weights.encoders import InputChoice, load_encoder
from addp_core.weights.fitting import AnyEncoder


@dataclass(kw_only=True)
class EncoderKeys:
    """The keys that choose the encoder of a transfer."""

    model: Annotated[
        FilePath,
        "checkpoint: a run folder, a file (ADDP, classifier, MAE, BEiT, MAGE, timm ViT, or what timm's train.py, "
        "mmengine or detectron2 wrote) or "
        f"hf://owner/repository/file; with init=random also a size: {SIZES_HELP}, or a CNN of timm such as resnet50",
    ]
    init: Annotated[
        Literal["pretrained", "random"],
        "start from the weights of `model`, or only from its architecture with weights drawn from the seed (a "
        "tokenizer keeps its weights)",
    ] = "pretrained"
    patch_size: Annotated[int | None, Ge(1), "pixels, if `model` is a size (default: 16)"] = None
    encoder_heads: Annotated[int | None, Ge(1), "attention heads, if not those of published ViTs of its width"] = None
    weights: Annotated[
        str,
        "the model to read if a checkpoint holds several: an entry (model, model_ema, teacher), part of a prefix "
        "(momentum_encoder), or ema for the average whatever its name",
    ] = ""
    tokenizer: Annotated[
        FilePath,
        "VQGAN for an encoder over token ids, if the MAGE file does not contain it and its run does not name it, or if "
        "`model` is a size",
    ] = ""
    input: Annotated[
        InputChoice,
        "what the encoder reads: pixels, or the ids of a frozen tokenizer (token); auto: what the encoder of `model` "
        "reads, and token ids for a size with a `tokenizer`",
    ] = "auto"
    tokenizer_norm: Annotated[bool, "keep ADDP's norm after the patches (the published recipes drop it)"] = False
    normalisation: Annotated[Normalisation, "mean and std of the images: ImageNet's, or 0.5 (BEiT files)"] = "imagenet"

    def load_encoder(self, size: int | tuple[int, int], **options: Any) -> AnyEncoder:
        """Load the encoder for images of this size (a side, or height and width).

        `options` are further arguments of the function `load_encoder`. Raises UserError like that function, with the
        names of a recipe's keys.
        """
        try:
            return load_encoder(
                self.model,
                size,
                init=self.init,
                patch_size=self.patch_size,
                encoder_heads=self.encoder_heads,
                weights=self.weights,
                tokenizer=self.tokenizer or None,
                tokenizer_norm=self.tokenizer_norm,
                input=self.input,
                normalisation=self.normalisation,
                **options,
            )
        except UserError as error:
            raise UserError(str(error).replace("img_size", "data.size")) from error


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
