"""The keys with which transfer recipes choose their pretrained encoder. torch is imported when it is loaded."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from addp_core.weights.fitting import AnyEncoder


from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from addp_core.base.errors import UserError
from addp_core.base.paths import FilePath
from addp_core.networks.config import SIZES_HELP, InputChoice, Normalisation


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

    def load_encoder(self, size: int | tuple[int, int], **options: Any) -> "AnyEncoder":
        """Load the encoder for images of this size (a side, or height and width).

        `options` are further arguments of the function `load_encoder`. Raises UserError like that function, with the
        names of a recipe's keys.
        """
        from addp_core.weights.encoders import load_encoder

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
