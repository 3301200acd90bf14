"""MAE (arXiv 2111.06377): the encoder of ADDP over the visible patches, and a decoder of the masked patches' pixels.

It is the baseline to which encoders of pixels are compared. Transfers read its encoder alone.
"""

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.networks.config import MaeConfig as MaeConfig
from addp_core.networks.encoder import Encoder
from addp_core.networks.layers import (
    LayerNorm,
    gather_tokens,
    init_transformer,
    normal_parameter,
    scatter_tokens,
    transformer_blocks,
)

VARIANCE_EPS = 1e-6  # added to the variance of a patch before division


class MaskedAutoencoder(nn.Module):
    """MAE; absolute positions of both parts are sines and cosines, and stay so.

    Args:
        config: the architecture.
        image_size: height and width in pixels, multiples of the patch size (ValueError otherwise).
    """

    def __init__(self, config: MaeConfig, image_size: tuple[int, int]):
        super().__init__()
        self.config, decoder = config, config.decoder
        self.encoder = Encoder(config.encoder, image_size, config.patch_size)
        self.decoder_embed = nn.Linear(config.encoder.width, decoder.width)
        self.mask_token = normal_parameter(1, 1, decoder.width)
        self.decoder_pos_embed = nn.Parameter(sincos_positions(self.encoder.grid, decoder.width), requires_grad=False)
        self.decoder_blocks = transformer_blocks(decoder.width, decoder.depth, decoder.heads)
        self.decoder_norm = LayerNorm(decoder.width)
        self.decoder_pred = nn.Linear(decoder.width, 3 * config.patch_size**2)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            init_transformer(part)
        self.encoder.pos_embed.requires_grad_(False)
        with torch.no_grad():
            self.encoder.pos_embed.copy_(sincos_positions(self.encoder.grid, config.encoder.width))

    def forward(self, images: Tensor, visible: Tensor, norm_pix_loss: bool) -> dict[str, Tensor]:
        """Return {"loss": the mean squared error over the pixels of the masked patches}.

        Args:
            images: normalized, Float[B,3,H,W].
            visible: Long[B,K], the patches that the encoder sees, in ascending order.
            norm_pix_loss: each patch of the target is normalized by its own mean and variance.
        """
        target = to_patches(images.float(), self.config.patch_size)
        if norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + VARIANCE_EPS).sqrt()
        error = F.mse_loss(self.reconstruct(images, visible).float(), target, reduction="none").mean(-1)
        masked = 1 - mark_visible(visible, target.shape[1])
        return {"loss": (error * masked).sum() / masked.sum()}

    def reconstruct(self, images: Tensor, visible: Tensor) -> Tensor:
        """Predict the pixels of all patches, Float[B,N,3*P*P] in the order of `to_patches`, from the visible ones.

        Arguments are those of `forward`.
        """
        x = self.encoder.embed(images)
        x = torch.cat([x[:, :1], gather_tokens(x, 1 + visible)], 1)
        for block in self.encoder.blocks:
            x = block(x)
        x = self.decoder_embed(self.encoder.norm(x))
        tokens = self.decoder_pos_embed.shape[1] - 1
        is_visible = mark_visible(visible, tokens).bool().unsqueeze(-1)
        patches = torch.where(is_visible, scatter_tokens(x[:, 1:], visible, tokens), self.mask_token.to(x.dtype))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))


def draw_visible(images: int, tokens: int, mask_ratio: float, generator: torch.Generator) -> Tensor:
    """Draw the patches of each image that are not masked, Long[B,K] in ascending order, with K = N (1 - ratio)."""
    order = torch.rand(images, tokens, generator=generator).argsort(1)
    return order[:, : count_visible(tokens, mask_ratio)].sort(1).values


def count_visible(tokens: int, mask_ratio: float) -> int:
    """Return how many of so many patches are not masked: rounded down, as published."""
    return int(tokens * (1 - mask_ratio))


def mark_visible(visible: Tensor, tokens: int) -> Tensor:
    """Return Float[B,N], 1 at the positions Long[B,K] and 0 elsewhere."""
    return torch.zeros(len(visible), tokens, device=visible.device).scatter(1, visible, 1.0)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return MAE's fixed positions, Float[1,1+N,W]: sines and cosines of the column, then those of the row.

    The class token, which comes first, has zeros.
    """
    features = build_sincos2d_pos_embed(list(grid), width).unflatten(1, (2, 2, -1))  # sine or cosine, row or column
    patches = features.transpose(1, 2).flip(1).flatten(1)
    return F.pad(patches, (0, 0, 1, 0)).unsqueeze(0)


def to_patches(images: Tensor, side: int) -> Tensor:
    """Cut images Float[B,3,H,W] into patches Float[B,N,3*P*P], row by row; the channels of a pixel stand together."""
    x = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B,3,h,P,w,P]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def from_patches(patches: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Put patches Float[B,N,3*P*P] of a grid (rows, columns) together into images Float[B,3,H,W]."""
    x = patches.unflatten(2, (side, side, 3)).unflatten(1, grid)  # [B,h,w,P,P,3]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
