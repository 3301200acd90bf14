"""A trained segmentor: its description, and the file that stores its weights beside that description."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from annotated_types import Ge
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.networks.cnn import STAGES, CnnConfig, CnnEncoder
from addp_core.networks.encoder import EncoderConfig
from addp_core.networks.token_encoder import TokenEncoder, TokenInput
from addp_core.weights.architectures import ARCHITECTURES, parse_architecture
from addp_core.weights.files import read_file
from addp_core.weights.fitting import AnyEncoder
from addp_core.weights.saving import save_state
from seg.mmseg_checkpoint import MmsegSegmentor, is_runner_checkpoint, read_runner_checkpoint

SEGMENTOR_KIND = "segmentor"  # in the metadata of its file


@dataclass(frozen=True)
class Segmentor:
    """Everything that is needed to build a segmentor again: its architecture, its classes and its image sizes."""

    width: Annotated[int, Ge(1)]
    depth: Annotated[int, Ge(1)]
    heads: Annotated[int, Ge(1)]
    layer_scale: bool
    patch_size: Annotated[int, Ge(1)]
    tokenizer_norm: bool
    relative: Literal["none", "table"]
    out_indices: tuple[int, ...]
    channels: Annotated[int, Ge(1)]  # of the UperNet head
    aux_channels: Annotated[int, Ge(1)]  # of the auxiliary FCN head
    classes: tuple[str, ...]
    crop: Annotated[int, Ge(1)]  # side in pixels
    scale: tuple[int, int]  # shorter and longest side of a resized image
    normalisation: Literal["imagenet", "half"] = "imagenet"
    class_token: bool | None = None  # None in files from before this field: see `has_class_token`
    tokens: TokenInput | None = None  # of an encoder that reads the ids of a frozen tokenizer
    cnn: CnnConfig | None = None  # of a CNN, which has no blocks, heads, patches or relative positions
    rescales: tuple[float, ...] = (4, 2, 1, 0.5)  # of the pyramid's maps over a ViT, from the patches' grid

    @property
    def has_class_token(self) -> bool:
        """Whether attention has the class token. At first it had one only without relative positions."""
        return self.relative == "none" if self.class_token is None else self.class_token

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise UserError(
                f"classes: found only {', '.join(self.classes) or 'none'}; a segmentor needs at least two: train it "
                "with background and foreground numbered 1 and 2"
            )
        if len(self.out_indices) not in (1, 4):
            raise UserError(f"out_indices: found {list(self.out_indices)}, expected four blocks or one")
        if self.cnn is None and self.crop % self.patch_size:
            raise UserError(
                f"data.crop: found {self.crop}, expected a multiple of the model's patch size {self.patch_size}"
            )


ARCHITECTURES[SEGMENTOR_KIND] = Segmentor  # lets `parse_architecture` read a segmentor's file


class EncoderFields(TypedDict):
    """What `Segmentor` stores about the encoder."""

    width: int
    depth: int
    heads: int
    layer_scale: bool
    patch_size: int
    tokenizer_norm: bool
    out_indices: tuple[int, ...]
    tokens: TokenInput | None
    cnn: CnnConfig | None


def default_out_indices(depth: int) -> tuple[int, ...]:
    """Return the last blocks of the first third, half, two thirds and all of the depth; for 12: 3, 5, 7, 11."""
    return tuple(max(round(depth * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 1))


def describe_vit(config: EncoderConfig, patch_size: int, tokens: TokenInput | None = None) -> EncoderFields:
    """Return what `Segmentor` stores about a ViT of pixels or, with their description, of token ids."""
    return EncoderFields(
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        layer_scale=config.layer_scale,
        patch_size=patch_size,
        tokenizer_norm=config.tokenizer_norm,
        out_indices=default_out_indices(config.depth),
        tokens=tokens,
        cnn=None,
    )


def describe_encoder(encoder: AnyEncoder) -> EncoderFields:
    """Return what `Segmentor` stores about an encoder."""
    if isinstance(encoder, CnnEncoder):
        return EncoderFields(
            width=encoder.width,
            depth=STAGES,
            heads=1,
            layer_scale=False,
            patch_size=encoder.patch_size,
            tokenizer_norm=False,
            out_indices=tuple(range(STAGES)),
            tokens=None,
            cnn=encoder.config,
        )
    tokens = None
    if isinstance(encoder, TokenEncoder):
        tokens = TokenInput(encoder.vocabulary, encoder.tokenizer.config)
    return describe_vit(encoder.config, encoder.patch_size, tokens)


def save_segmentor(segmentor: Segmentor, state: dict[str, Tensor], path: Path) -> None:
    """Write a segmentor as one safetensors file. Raises OSError if it cannot be written."""
    save_state(state, path, SEGMENTOR_KIND, segmentor)


def load_segmentor(source: str | Path) -> tuple[Segmentor | MmsegSegmentor, dict[str, Tensor]]:
    """Return the description and the tensors of a run of `addp seg train`, or of its file or mmengine's checkpoint.

    Raises UserError if it is not a segmentor.
    """
    content = read_file(source)
    if is_runner_checkpoint(content):
        return read_runner_checkpoint(content)
    if content.description is not None:
        kind, architecture = parse_architecture(content.source, content.description)
        if kind == SEGMENTOR_KIND:
            return architecture, content.state
    raise UserError(
        f"model: {content.source} is not a segmentor; expected a run of `addp seg train`, its file, or a checkpoint of "
        "mmengine's Runner"
    )


def load_tensors(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy the tensors into the model. Raises UserError if any are missing, unknown or of another shape.

    source: where the tensors come from, for the message.
    """
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    misshapen = sorted(name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape)
    if missing or unknown or misshapen:
        raise UserError(
            f"{source}: does not fit this segmentor: missing {missing[:5]}, unknown {unknown[:5]}, "
            f"of another shape {misshapen[:5]}"
        )
    model.load_state_dict(state)
