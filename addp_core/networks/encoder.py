"""The encoder that everything shares: a ViT over pixels, for pretraining, recognition, detection and segmentation.

Pretraining passes normalised noisy images and keeps `tokenizer_norm` and the final `norm` (Sec. 3.3); recognition drops
both (App. D.2) and reads the patch tokens. Reference: ViT (arXiv 2010.11929).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from addp_core.networks.attention import PLAIN_ATTENTION, AttentionConfig
from addp_core.networks.layers import (
    Dropout,
    LayerNorm,
    check_heads,
    init_transformer,
    learned,
    take_rows,
    transformer_blocks,
)
from addp_core.networks.tokenizer import to_feature_map


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of the ViT; the defaults are ViT-B's."""

    width: Annotated[int, Ge(1), "features a token"] = 768
    depth: Annotated[int, Ge(1), "blocks"] = 12
    heads: Annotated[int, Ge(1), "attention heads"] = 12
    dropout: Annotated[float, Interval(ge=0, lt=1), "in attention and MLP"] = 0.0
    drop_path: Annotated[float, Interval(ge=0, lt=1), "stochastic depth of the last block, growing from 0"] = 0.0
    tokenizer_norm: Annotated[
        bool, "LayerNorm on the embedded patches: on in pretraining, off by default in transfer"
    ] = False
    input_dropout: Annotated[float, Interval(ge=0, lt=1), "after `tokenizer_norm`, where that is on"] = 0.1
    layer_scale: Annotated[bool, "learned scales on the branches of each block (BEiT's; ADDP has none)"] = False
    pre_norm: Annotated[
        bool, "`tokenizer_norm` is the ViT's own (CLIP's), and transfer keeps it (ADDP's is dropped)"
    ] = False

    def __post_init__(self):
        check_heads("heads", self.heads, self.width)


VIT_SIZES = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
}


class FeatureEncoder(nn.Module):
    """What tasks read of an encoder that has `blocks` and a `patch_size`."""

    checkpointing = False
    """Whether training computes the blocks' activations a second time rather than keep them."""
    prefix = 1
    """Tokens before the patches."""

    def embed(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] normalised -> Float[B,1+N,W], what the first block sees."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] normalised -> Float[B,1+N,W], class token (where it attends) first, without the final norm."""
        return self.forward_tokens(images, (-1,))[0]

    def forward_maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Float[B,3,H,W] normalised -> the patch tokens after each of the named blocks (negative counts from the end),
        Float[B,W,h,w], without the final norm.
        """
        grid = self.grid_of(images)
        return [to_feature_map(x[:, self.prefix :], grid) for x in self.forward_tokens(images, blocks)]

    def forward_tokens(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Float[B,3,H,W] normalised -> all tokens after each of the named blocks, Float[B,1+N,W]; later ones are not
        computed.
        """
        wanted = [i % len(self.blocks) for i in blocks]
        x, grid, outputs = self.embed(images), self.grid_of(images), {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, grid=grid, use_reentrant=False)
            else:
                x = block(x, grid=grid)
            if i in wanted:
                outputs[i] = x
        return [outputs[i] for i in wanted]

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of Float[B,3,H,W]."""
        return (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)


class Encoder(FeatureEncoder):
    """ViT with learned positions and a class token, over images of `image_size` (height, width) cut into `patch_size`
    squares.

    attention: windows and relative positions, for dense prediction. dynamic: images may have any size that is a
    multiple of the patch; absolute positions are then resampled, relative ones interpolated, at each call.
    """

    def __init__(
        self,
        config: EncoderConfig,
        image_size: tuple[int, int],
        patch_size: int = 16,
        attention: AttentionConfig = PLAIN_ATTENTION,
        dynamic: bool = False,
    ):
        super().__init__()
        self.config, self.image_size, self.patch_size = config, tuple(image_size), patch_size
        self.attention, self.dynamic = attention, dynamic
        if image_size[0] % patch_size or image_size[1] % patch_size:
            raise ValueError(
                f"image size {image_size[0]} x {image_size[1]}: expected multiples of the patch size {patch_size}"
            )
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.patch_embed = PatchEmbed(self.image_size, patch_size, 3, config.width, strict_img_size=not dynamic)
        if attention.class_token:
            self.cls_token = learned(1, 1, config.width)
        self.pos_embed = learned(1, 1 + self.grid[0] * self.grid[1], config.width)
        if config.tokenizer_norm:
            self.tokenizer_norm = LayerNorm(config.width)
            self.tokenizer_dropout = Dropout(config.input_dropout)
        self.blocks = transformer_blocks(
            config.width,
            config.depth,
            config.heads,
            config.dropout,
            config.drop_path,
            config.layer_scale,
            attention,
            self.grid,
        )
        self.norm = LayerNorm(config.width)
        init_transformer(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as a linear layer on the patch

    def forward(self, images: Tensor, extra: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Float[B,3,H,W] normalised -> Float[B,1+N,W] after the final norm, class token (where it attends) first.

        extra: Float[B,E,W], further tokens that the image attends to; they are not part of the output. ValueError
        where attention is windowed, relative or dynamic.
        at: Long[B,Q], patches whose features are wanted, instead of the class token and all -> Float[B,Q,W].
        """
        if self.attention != PLAIN_ATTENTION or self.dynamic:
            if extra is not None:
                raise ValueError("extra: tokens without a place need plain attention")
            x = self.norm(self.forward_features(images))
            return x if at is None else take_rows(x, self.prefix + at)
        x = self.embed(images, extra)
        if at is None:
            at = torch.arange(-1, self.pos_embed.shape[1] - 1, device=x.device).expand(len(x), -1)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, at=1 + at))

    def embed(self, images: Tensor, extra: Tensor | None = None) -> Tensor:
        """Float[B,3,H,W] normalised -> Float[B,1+N(+E),W]: class token, patches with positions, extra tokens."""
        x = self.patch_embed(images)
        positions = self.pos_embed
        if (grid := self.grid_of(images)) != self.grid:
            positions = resample_positions(positions, self.grid, grid)
        if self.attention.class_token:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + positions
        else:
            x = x + positions[:, 1:]
        if extra is not None:
            x = torch.cat([x, extra], 1)
        return self.tokenizer_dropout(self.tokenizer_norm(x)) if self.config.tokenizer_norm else x

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.attention.class_token)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay spares, beside one-dimensional ones (App. D.2). Relative positions decay, as in
        the published recipes of ViTDet and BEiT.
        """
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict[str, str]:
        """timm's description of the layers for layer-wise decay: what embeds is layer 0, block i is layer i + 1.

        prefix: of the encoder's names in the model around it.
        """
        start = "^" + re.escape(prefix)
        stem = rf"{start}(?:cls_token|pos_embed|patch_embed|tokenizer_norm)"
        return {"stem": stem, "blocks": start + (r"blocks" if coarse else r"blocks\.(\d+)")}


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions Float[1,1+N,W] on the old grid (rows, columns) -> the new one, bicubically, the class position kept."""
    # Without antialiasing, as published fine-tuning does it.
    return resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=1, antialias=False)
