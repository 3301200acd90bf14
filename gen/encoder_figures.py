"""Figures of what an encoder sees: its features as colors, the attention of its class token, its nearest neighbors.

The encoder is that of an ADDP file or of any other one that `load_encoder` reads (MAE, BEiT, MAGE, DINO, a ViT or CNN
of timm). The images are natural ones, as in every transfer.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.data.config import DataConfig
from addp_core.data.sources import ImageSource
from addp_core.data.stream import example_images
from addp_core.networks.classifier import RGB, normalize
from addp_core.networks.encoder import FeatureEncoder
from addp_core.weights.frozen import spaced_blocks
from gen.drawing import draw_image_grid, principal_colors, upsample_tokens

BATCH = 32  # images that an encoder reads at a time
BLOCKS = 4  # shown unless a recipe says otherwise
NEIGHBORS = 7
HIDDEN = 0.2  # brightness of what the class token attends to least


@dataclass(frozen=True)
class Subject:
    """An encoder, and the images on which it is shown.

    Attributes:
        name: of the checkpoint, for captions.
        mean, std: of the normalization that the encoder expects.
        blocks: to show, counted from 1.
        shown: number of images in a figure.
        pool: number of images in which neighbors are looked for.
    """

    encoder: FeatureEncoder
    name: str
    mean: RGB
    std: RGB
    source: ImageSource
    blocks: tuple[int, ...]
    shown: int
    pool: int

    def images(self, count: int) -> Tensor:
        """Return up to `count` images, spread over the dataset, Float[n,3,H,W] in [0,1]."""
        return example_images(self.source, DataConfig(size=self.encoder.image_size), count)

    @torch.inference_mode()
    def tokens(self, images: Tensor, blocks: tuple[int, ...]) -> list[Tensor]:
        """Return the patch tokens after each of these blocks, Float[B,N,W]."""
        device = next(self.encoder.parameters()).device
        parts = []
        for batch in normalize(images, self.mean, self.std).split(BATCH):
            outputs = self.encoder.forward_tokens(batch.to(device), [block - 1 for block in blocks])
            parts.append([x[:, self.encoder.num_prefix_tokens :].float().cpu() for x in outputs])
        return [torch.cat(part) for part in zip(*parts, strict=True)]


def default_blocks(encoder: FeatureEncoder) -> tuple[int, ...]:
    """Return the blocks to show, evenly spaced up to the last."""
    return tuple(spaced_blocks(encoder.depth, BLOCKS, encoder.first_wide_block))


def draw_features(subject: Subject) -> dict[str, Figure]:
    """Draw the patch features after several blocks, by the first three principal components of all images together."""
    images = subject.images(subject.shown)
    grid, size = subject.encoder.grid_of(images), (images.shape[-2], images.shape[-1])
    columns = [images]
    for tokens in subject.tokens(images, subject.blocks):
        colors = principal_colors(tokens).transpose(1, 2).unflatten(2, grid)
        columns.append(torch.stack([upsample_tokens(each, size) for each in colors]))
    caption = (
        f"Patch features of {subject.name} after each block: their first three principal components, over all images "
        "together,\nas red, green and blue"
    )
    return {"features": _grid(columns, ["image", *_block_titles(subject)], "Features", caption)}


def draw_attention(subject: Subject) -> dict[str, Figure]:
    """Draw what the class token attends to in several blocks, the mean over the heads.

    Raises ValueError if the encoder has no class token in attention, or more than scores of queries and keys.
    """
    images = subject.images(subject.shown)
    grid, size = subject.encoder.grid_of(images), (images.shape[-2], images.shape[-1])
    columns = [images]
    for weights in class_attention(subject, images):
        heat = weights.mean(1).unflatten(1, grid)
        heat = F.interpolate(heat[:, None], size, mode="bilinear").clamp(min=0)
        heat = heat / heat.amax((2, 3), keepdim=True).clamp(min=1e-12)
        columns.append(images * (HIDDEN + (1 - HIDDEN) * heat))
    caption = (
        f"The brighter, the more the class token of {subject.name} attends to it: mean over the heads, relative to the "
        "largest weight"
    )
    return {"attention": _grid(columns, ["image", *_block_titles(subject)], "Attention of the class token", caption)}


@torch.inference_mode()
def class_attention(subject: Subject, images: Tensor) -> list[Tensor]:
    """Return the attention weights from the class token to the patches in each of the blocks, Float[B,heads,N].

    Raises ValueError if the encoder has no class token in attention, or relative positions beside queries and keys.
    """
    encoder: Any = subject.encoder
    attention = getattr(encoder, "attention", None)
    if attention is None or not attention.class_token:
        raise ValueError("there is no class token in its attention")
    if attention.relative != "none":
        raise ValueError("its attention has relative positions")
    captured: dict[int, list[Tensor]] = {block: [] for block in subject.blocks}
    heads = encoder.config.heads
    with ExitStack() as hooks:
        for block, projections in captured.items():
            qkv = cast(nn.Module, encoder.blocks[block - 1].attn.qkv)
            hooks.enter_context(qkv.register_forward_hook(_keeper(projections)))
        subject.tokens(images, subject.blocks)
    results = []
    for parts in captured.values():
        q, k, _ = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in torch.cat(parts).chunk(3, -1))
        scores = q[:, :, :1] @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # [B,heads,1,1+N]
        results.append(scores.softmax(-1)[:, :, 0, encoder.num_prefix_tokens :])
    return results


def _keeper(projections: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        projections.append(output.float().cpu())

    return keep


def draw_neighbors(subject: Subject) -> dict[str, Figure]:
    """Draw the images with the most similar features beside each of a few."""
    images = subject.images(subject.pool)
    (tokens,) = subject.tokens(images, subject.blocks[-1:])
    features = F.normalize(tokens.mean(1), dim=-1)
    queries = torch.linspace(0, len(images) - 1, min(subject.shown, len(images))).long()
    similarities = features[queries] @ features.T
    similarities[torch.arange(len(queries)), queries] = -torch.inf  # not itself
    nearest = similarities.topk(min(NEIGHBORS, len(images) - 1)).indices
    columns = [images[queries], *images[nearest].unbind(1)]
    caption = (
        f"The nearest of {len(images):,} images, by the cosine of the averages of the patch features of {subject.name} "
        f"after block {subject.blocks[-1]}"
    )
    titles = ["image", *(f"neighbor {i + 1}" for i in range(nearest.shape[1]))]
    return {"neighbors": _grid(columns, titles, "Nearest neighbors", caption)}


def _block_titles(subject: Subject) -> list[str]:
    return [f"block {block}" for block in subject.blocks]


def _grid(columns: list[Tensor], titles: list[str], title: str, caption: str) -> Figure:
    """Draw columns of images, each Float[n,3,H,W]."""
    rows = [list(row) for row in zip(*columns, strict=True)]
    return draw_image_grid(rows, titles, [""] * len(rows), title, caption)


# The figures of an encoder by name; each function returns the figures to save, by file name without extension.
DRAW_ENCODER: dict[str, Callable[[Subject], dict[str, Figure]]] = {
    "features": draw_features,
    "attention": draw_attention,
    "neighbors": draw_neighbors,
}
