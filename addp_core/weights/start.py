"""The encoder that a transfer starts from: the keys that its recipes share, and what they build."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)

from addp_core.base.errors import UserError, calling
from addp_core.networks.encoder import Encoder
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.weights.checkpoint import load_encoder

NORMALISATION = {  # mean and std of images in [0,1]
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "half": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
}


@dataclass(kw_only=True)
class Start:
    """Keys of a transfer that say which encoder it starts from."""

    model: Annotated[
        str,
        "a run, a file (ADDP, classifier, MAE, BEiT, MAGE, timm ViT), hf://owner/repository/file, or with init=random "
        "a size (tiny, small, base, large)",
    ]
    init: Annotated[
        Literal["pretrained", "random"], "the file's weights, or its architecture with weights drawn from the seed"
    ] = "pretrained"
    patch_size: Annotated[int | None, Ge(1), "pixels, where `model` is a size (default: 16)"] = None
    encoder_heads: Annotated[int | None, Ge(1), "of a file whose heads are not width/64"] = None
    tokenizer: Annotated[str, "for an encoder over token ids: the VQGAN of a MAGE file that does not hold it"] = ""
    tokenizer_norm: Annotated[bool, "keep ADDP's norm after the patches (the published recipes drop it)"] = False
    normalisation: Annotated[
        Literal["imagenet", "half"], "mean and std of the images: ImageNet's, or 0.5 (BEiT files)"
    ] = "imagenet"

    def encoder(self, size: int | tuple[int, int], **options: Any) -> Encoder | TokenEncoder:
        """The encoder for images of this size (height, width); `options` as those of `load_encoder`.

        UserError as there, with the names of a recipe's keys.
        """
        try:
            return load_encoder(
                self.model,
                size,
                init=self.init,
                patch_size=self.patch_size,
                encoder_heads=self.encoder_heads,
                tokenizer=self.tokenizer or None,
                tokenizer_norm=self.tokenizer_norm,
                **options,
            )
        except UserError as error:
            raise UserError(str(error).replace("img_size", "data.size")) from error

    def pixel_encoder(self, size: int | tuple[int, int], **options: Any) -> Encoder:
        """As `encoder`; UserError for one over token ids."""
        with calling({"attention: ": f"model: {self.model}: "}):  # no value of the key would do
            encoder = self.encoder(size, **options)
        if not isinstance(encoder, Encoder):
            raise UserError(
                f"model: {self.model} sees token ids, not pixels; expected an encoder of pixels (ADDP, MAE, BEiT, ViT)"
            )
        return encoder


def check_positions(encoder: Encoder, source: str, key: str) -> None:
    """UserError where an encoder of `source` knows no place: BEiT has relative tables alone. key: of their kind."""
    tables = [value for name, value in encoder.named_parameters() if ".relative." in name]
    if not any(value.any() for value in (encoder.pos_embed, *tables)):
        raise UserError(
            f"{key}={encoder.attention.relative}: {source} has its positions in relative tables alone (BEiT), which "
            f"this leaves out; expected {key}=table"
        )
