"""The encoder that all tasks share: a ViT, for pretraining, recognition, detection and segmentation.

Its input is a part of it: patches of pixels here (`Encoder`), ids of a frozen tokenizer in `TokenEncoder`. Both stand
before the same blocks (`TransformerEncoder`), with the same windows, relative positions and image sizes.

Pretraining feeds it normalized noisy images and keeps `tokenizer_norm` and the final `norm` (Sec. 3.3). Recognition
drops both (App. D.2) and reads the patch tokens. Reference: ViT (arXiv 2010.11929).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from addp_core.networks.attention import PLAIN_ATTENTION, AttentionConfig
from addp_core.networks.config import SIZES_HELP as SIZES_HELP
from addp_core.networks.config import VIT_SIZES as VIT_SIZES
from addp_core.networks.config import EncoderConfig as EncoderConfig
from addp_core.networks.config import ViTSize as ViTSize
from addp_core.networks.layers import (
    Dropout,
    LayerNorm,
    gather_tokens,
    init_transformer,
    normal_parameter,
    transformer_blocks,
)
from addp_core.networks.tokenizer import to_feature_map

METADATA_KEY = "addp"  # under which files and state dicts store the kind and architecture of a model as JSON


@dataclass(frozen=True)
class EncoderArchitecture:
    """Architecture of an encoder over pixels, as files store it."""

    encoder: EncoderConfig
    image_size: tuple[int, int]
    patch_size: int
    attention: AttentionConfig = PLAIN_ATTENTION

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size)

    def build(self, image_size: tuple[int, int] | None = None, dynamic: bool = False) -> "Encoder":
        """Build the encoder, with random weights, for images of this size (default: its own).

        Raises ValueError if the patch size does not divide the image size.
        """
        return Encoder(self.encoder, image_size or self.image_size, self.patch_size, self.attention, dynamic)


class FeatureEncoder(nn.Module):
    """The interface through which tasks read features; subclasses set the attributes and define what is not."""

    kind: str  # of the architecture, in files
    config: EncoderConfig
    image_size: tuple[int, int]  # height and width in pixels
    blocks: nn.ModuleList
    norm: nn.Module
    patch_size: int
    num_prefix_tokens = 1  # tokens before the patches: the class token
    checkpointing = False  # in training, recompute the blocks' activations instead of storing them

    @property
    def architecture(self) -> Any:
        """Everything that builds the encoder again, as a dataclass that files store."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Features per token after the last block."""
        return self.config.width

    @property
    def depth(self) -> int:
        """The number of blocks, or of what takes their place."""
        return len(self.blocks)

    @property
    def first_wide_block(self) -> int:
        """The first block, counted from 1, after which tokens have `width` features."""
        return 1

    def embed(self, images: Tensor) -> Tensor:
        """Return the input of the first block: normalized images Float[B,3,H,W] -> Float[B,1+N,W]."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """Map normalized images Float[B,3,H,W] to tokens Float[B,1+N,W] before the final norm.

        The class token comes first, unless the attention has none.
        """
        return self.forward_tokens(images, (-1,))[0]

    def forward_maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return the patch tokens after each of these blocks as feature maps, Float[B,W,h,w], before the final norm.

        images: normalized, Float[B,3,H,W]. blocks: indices; negative ones count from the end.
        """
        grid = self.grid_of(images)
        return [to_feature_map(x[:, self.num_prefix_tokens :], grid) for x in self.forward_tokens(images, blocks)]

    def forward_tokens(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return all tokens, Float[B,1+N,W], after each of these blocks; later blocks are not computed.

        images: normalized, Float[B,3,H,W]. blocks: indices; negative ones count from the end.
        """
        block_indices = [i % len(self.blocks) for i in blocks]
        x, grid = self.embed(images), self.grid_of(images)
        outputs: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: max(block_indices) + 1]):
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, grid=grid, use_reentrant=False)
            else:
                x = block(x, grid=grid)
            if i in block_indices:
                outputs[i] = x
        return [outputs[i] for i in block_indices]

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patches of images Float[B,3,H,W]."""
        return (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides one-dimensional ones, without weight decay."""
        raise NotImplementedError

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict[str, str]:
        """Describe the layers to timm for layer-wise learning rate decay: embeddings are layer 0, block i layer i + 1.

        prefix: what precedes the names of the encoder's parameters in the enclosing model.
        """
        raise NotImplementedError


class TransformerEncoder(FeatureEncoder):
    """The blocks behind any input, with learned positions. A subclass adds its input, and then the blocks.

    Its state dict describes its architecture in the metadata that torch keeps for every module, so that the checkpoints
    of any trainer tell what their tensors do not, such as the number of heads.

    Args:
        config: the architecture of the blocks.
        image_size: height and width in pixels.
        patch_size: side in pixels of the square that a token covers.
        attention: windows and relative positions, for dense prediction.
        dynamic: accept images of any size. Absolute positions are then resampled, and relative ones interpolated, at
            each call.
    """

    stem: str  # a regular expression for the names of the input's parameters
    position_name: str  # of the parameter with the absolute positions, the class token's first

    def __init__(
        self,
        config: EncoderConfig,
        image_size: tuple[int, int],
        patch_size: int,
        attention: AttentionConfig,
        dynamic: bool,
    ):
        super().__init__()
        height, width = image_size
        self.config, self.image_size, self.patch_size = config, (height, width), patch_size
        self.attention, self.dynamic = attention, dynamic
        self.num_prefix_tokens = int(attention.class_token)
        self.grid = padded_grid(self.image_size, patch_size)

    def _add_blocks(self) -> None:
        """Add the blocks and the final norm, and initialize all linear layers."""
        config = self.config
        self.blocks = transformer_blocks(
            config.width,
            config.depth,
            config.heads,
            config.dropout,
            config.drop_path,
            config.layer_scale,
            self.attention,
            self.grid,
        )
        self.norm = LayerNorm(config.width)
        init_transformer(self)
        self.register_state_dict_post_hook(describe_state)

    @property
    def positions(self) -> Tensor:
        """The absolute positions, Float[1,1+N,W]."""
        raise NotImplementedError

    def positions_of(self, grid: tuple[int, int]) -> Tensor:
        """Return the absolute positions of a grid (rows, columns), Float[1,1+N,W], resampled if it is not the own."""
        return self.positions if grid == self.grid else resample_positions(self.positions, self.grid, grid)

    def make_dynamic(self) -> None:
        """Accept images of any size from now on."""
        self.dynamic = True

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides one-dimensional ones, without weight decay (App. D.2).

        Relative positions do decay, as in the published recipes of ViTDet and BEiT.
        """
        return {self.position_name}

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict[str, str]:
        """Describe the layers to timm for layer-wise learning rate decay: embeddings are layer 0, block i layer i + 1.

        prefix: what precedes the names of the encoder's parameters in the enclosing model.
        """
        start = "^" + re.escape(prefix)
        return {"stem": start + self.stem, "blocks": start + (r"blocks" if coarse else r"blocks\.(\d+)")}


class Encoder(TransformerEncoder):
    """A ViT over patches of pixels, with a class token.

    Args:
        config: the architecture.
        image_size: height and width in pixels, multiples of the patch size (ValueError otherwise).
        patch_size: side of a patch in pixels.
        attention: windows and relative positions, for dense prediction.
        dynamic: accept images of any size that is a multiple of the patch size. Absolute positions are then resampled,
            and relative ones interpolated, at each call.
    """

    kind = "encoder"
    stem = r"(?:cls_token|pos_embed|patch_embed|tokenizer_norm)"
    position_name = "pos_embed"

    def __init__(
        self,
        config: EncoderConfig,
        image_size: tuple[int, int],
        patch_size: int = 16,
        attention: AttentionConfig = PLAIN_ATTENTION,
        dynamic: bool = False,
    ):
        super().__init__(config, image_size, patch_size, attention, dynamic)
        height, width = image_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"image size {height} x {width}: expected multiples of the patch size {patch_size}")
        self.patch_embed = PatchEmbed(self.image_size, patch_size, 3, config.width, strict_img_size=not dynamic)
        if attention.class_token:
            self.cls_token = normal_parameter(1, 1, config.width)
        self.pos_embed = normal_parameter(1, 1 + self.grid[0] * self.grid[1], config.width)
        if config.tokenizer_norm:
            self.tokenizer_norm = LayerNorm(config.width)
            self.tokenizer_dropout = Dropout(config.input_dropout)
        self._add_blocks()
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as a linear layer on the patch

    @property
    def architecture(self) -> EncoderArchitecture:
        """Everything that builds the encoder again."""
        return EncoderArchitecture(self.config, self.image_size, self.patch_size, self.attention)

    @property
    def positions(self) -> Tensor:
        """The absolute positions, Float[1,1+N,W]."""
        return self.pos_embed

    def forward(self, images: Tensor, extra: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """Map normalized images Float[B,3,H,W] to tokens after the final norm, Float[B,1+N,W], class token first.

        Args:
            extra: Float[B,E,W], further tokens that the image attends to; they are not part of the output. Raises
                ValueError if the attention is windowed or relative or the image size is dynamic.
            queries: Long[B,Q], patches whose features are wanted -> Float[B,Q,W] (default: class token and all).
        """
        if self.attention != PLAIN_ATTENTION or self.dynamic:
            if extra is not None:
                raise ValueError("extra: tokens without a position need plain attention and a fixed image size")
            x = self.norm(self.forward_features(images))
            return x if queries is None else gather_tokens(x, self.num_prefix_tokens + queries)
        x = self.embed(images, extra)
        if queries is None:
            queries = torch.arange(-1, self.pos_embed.shape[1] - 1, device=x.device).expand(len(x), -1)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, queries=1 + queries))

    def embed(self, images: Tensor, extra: Tensor | None = None) -> Tensor:
        """Map normalized images Float[B,3,H,W] to class token, patches with positions and extra tokens.

        -> Float[B,1+N(+E),W].
        """
        x = self.patch_embed(images)
        positions = self.positions_of(self.grid_of(images))
        if self.attention.class_token:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + positions
        else:
            x = x.contiguous() + positions[:, 1:]  # every block would copy tokens in the layout of a convolution
        if extra is not None:
            x = torch.cat([x, extra], 1)
        return self.tokenizer_dropout(self.tokenizer_norm(x)) if self.config.tokenizer_norm else x

    def make_dynamic(self) -> None:
        """Accept images of any size that is a multiple of the patch size from now on."""
        super().make_dynamic()
        self.patch_embed.strict_img_size = False

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides one-dimensional ones, without weight decay (App. D.2)."""
        return super().no_weight_decay() | {"cls_token"}


def padded_grid(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return the rows and columns of an image (height, width) that is padded to multiples of the stride."""
    return (-(-image_size[0] // stride), -(-image_size[1] // stride))


def describe_state(encoder: nn.Module, _state: Any, _prefix: str, metadata: dict[str, Any]) -> None:
    """Add an encoder's architecture to the metadata of its state dict: for `register_state_dict_post_hook`."""
    assert isinstance(encoder, FeatureEncoder)
    metadata[METADATA_KEY] = json.dumps({"kind": encoder.kind, "architecture": asdict(encoder.architecture)})


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample positions Float[1,1+N,W] from the grid `old` (rows, columns) to `new` bicubically.

    The class position is kept. There is no antialiasing, as in the published fine-tuning.
    """
    return resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=1, antialias=False)
