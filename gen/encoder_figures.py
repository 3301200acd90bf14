"""Figures of what an encoder sees: its features as colors, the attention of its class token, its nearest neighbors.

The encoder is that of an ADDP file or of any other one that `load_encoder` reads (MAE, BEiT, MAGE, DINO, a ViT or CNN
of timm). The images are natural ones, as in every transfer.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.base.errors import UserError
from addp_core.data.config import DataConfig
from addp_core.data.sources import ImageSource
from addp_core.data.stream import example_images
from addp_core.networks.classifier import RGB, normalize
from addp_core.networks.config import Normalisation
from addp_core.networks.encoder import FeatureEncoder
from addp_core.training.processes import process_state
from addp_core.weights.architectures import NORMALISATION
from addp_core.weights.encoders import load_encoder
from addp_core.weights.frozen import resolve_block, spaced_blocks
from gen.drawing import draw_image_grid, heat_colors, principal_colors, upsample_tokens

BATCH = 32  # images that an encoder reads at a time
BLOCKS = 4  # shown unless a recipe says otherwise
NEIGHBORS = 7
HEAT_SHARE = 0.65  # of the color of attention over the gray image


@dataclass(frozen=True)
class EncoderView:
    """An encoder, and what is shown of it.

    Attributes:
        name: of the checkpoint, for captions.
        mean, std: of the normalization that the encoder expects.
        blocks: to show, counted from 1.
    """

    encoder: FeatureEncoder
    name: str
    mean: RGB
    std: RGB
    blocks: tuple[int, ...]

    @torch.inference_mode()
    def tokens(self, images: Tensor, blocks: tuple[int, ...]) -> list[Tensor]:
        """Return the patch tokens after each of these blocks, Float[B,N,W]."""
        device = next(self.encoder.parameters()).device
        parts = []
        for batch in normalize(images, self.mean, self.std).split(BATCH):
            outputs = self.encoder.forward_tokens(batch.to(device), [block - 1 for block in blocks])
            parts.append([x[:, self.encoder.num_prefix_tokens :].float().cpu() for x in outputs])
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def descriptors(self, images: Tensor) -> Tensor:
        """Return the averages of the patch tokens after the last of the blocks, of length 1, Float[B,W]."""
        (tokens,) = self.tokens(images, self.blocks[-1:])
        return F.normalize(tokens.mean(1), dim=-1)


@dataclass(frozen=True)
class Subject(EncoderView):
    """An encoder, and the images on which it is shown.

    Attributes:
        shown: number of images in a figure.
        pool: number of images in which neighbors are looked for.
    """

    source: ImageSource
    shown: int
    pool: int

    def images(self, count: int) -> Tensor:
        """Return up to `count` images, spread over the dataset, Float[n,3,H,W] in [0,1], at least one."""
        return readable_images(self.source, self.encoder.image_size, count)


def readable_images(source: ImageSource, hw: tuple[int, int], count: int) -> Tensor:
    """Return up to `count` images, spread over the dataset, Float[n,3,h,w] in [0,1]. Raises UserError if none of those
    can be read.
    """
    images = example_images(source, DataConfig(size=hw), count)
    if not len(images):
        tried = min(count, len(source))
        raise UserError(f"data: none of the {tried} images tried can be read, such as {source.name(0)}; repair them")
    return images


class ViewKeys(Protocol):
    """A recipe with the keys that name an encoder and what is shown of it."""

    model: str
    blocks: list[int]
    tokenizer: str
    encoder_heads: int | None
    normalisation: Normalisation


def open_view(recipe: ViewKeys, kind: str) -> EncoderView:
    """Load the encoder of a recipe, of a file of this kind, at its own size.

    Raises UserError if it cannot be read, or has no such blocks.
    """
    encoder = load_encoder(
        recipe.model,
        None,
        tokenizer=recipe.tokenizer if kind != "addp" and recipe.tokenizer else None,  # an ADDP encoder reads no ids
        encoder_heads=recipe.encoder_heads,
        normalisation=recipe.normalisation,
    )
    blocks = tuple(resolve_block(encoder, block, "blocks") for block in recipe.blocks)
    encoder = encoder.to(process_state().device).requires_grad_(False)
    mean, std = NORMALISATION[recipe.normalisation]
    return EncoderView(encoder, Path(recipe.model).name, mean, std, blocks or default_blocks(encoder))


def default_blocks(encoder: FeatureEncoder) -> tuple[int, ...]:
    """Return the blocks to show, evenly spaced up to the last."""
    return tuple(spaced_blocks(encoder.depth, BLOCKS, encoder.first_wide_block))


def feature_maps(view: EncoderView, images: Tensor) -> list[Tensor]:
    """Return the patch features after each block as colors, Float[B,3,H,W]: their first three principal components,
    over all images together.
    """
    grid, size = view.encoder.grid_of(images), (images.shape[-2], images.shape[-1])
    maps = []
    for tokens in view.tokens(images, view.blocks):
        colors = principal_colors(tokens).transpose(1, 2).unflatten(2, grid)
        maps.append(torch.stack([upsample_tokens(each, size) for each in colors]))
    return maps


def draw_features(subject: Subject) -> dict[str, Figure]:
    """Draw the patch features after several blocks, by the first three principal components of all images together."""
    images = subject.images(subject.shown)
    caption = (
        f"Patch features of {subject.name} after each block: their first three principal components, over all images "
        "together,\nas red, green and blue"
    )
    columns = [images, *feature_maps(subject, images)]
    return {"features": _grid(columns, ["image", *block_titles(subject)], "Features", caption)}


def attention_maps(view: EncoderView, images: Tensor) -> list[Tensor]:
    """Return what the class token attends to in each of the blocks, as colors over the gray images, Float[B,3,H,W].

    Raises ValueError as `class_attention` does.
    """
    grid, size = view.encoder.grid_of(images), (images.shape[-2], images.shape[-1])
    gray = images.cpu().mean(1, keepdim=True)
    maps = []
    for weights in class_attention(view, images):
        heat = weights.mean(1).unflatten(1, grid)
        heat = F.interpolate(heat[:, None], size, mode="bilinear").clamp(min=0)
        heat = heat / heat.amax((2, 3), keepdim=True).clamp(min=1e-12)
        maps.append((1 - HEAT_SHARE) * gray + HEAT_SHARE * heat_colors(heat[:, 0]))
    return maps


def draw_attention(subject: Subject) -> dict[str, Figure]:
    """Draw what the class token attends to in several blocks, the mean over the heads.

    Raises ValueError if the encoder has no class token in attention, or more than scores of queries and keys.
    """
    images = subject.images(subject.shown)
    caption = (
        f"How much the class token of {subject.name} attends to each part, from violet (least) to yellow (most), over "
        "the gray image:\nmean over the heads, relative to the largest weight"
    )
    columns = [images, *attention_maps(subject, images)]
    return {"attention": _grid(columns, ["image", *block_titles(subject)], "Attention of the class token", caption)}


@torch.inference_mode()
def class_attention(view: EncoderView, images: Tensor) -> list[Tensor]:
    """Return the attention weights from the class token to the patches in each of the blocks, Float[B,heads,N].

    Raises ValueError if the encoder has no class token in attention, or relative positions beside queries and keys.
    """
    encoder: Any = view.encoder
    attention = getattr(encoder, "attention", None)
    if attention is None or not attention.class_token:
        raise ValueError("there is no class token in its attention")
    if attention.relative != "none":
        raise ValueError("its attention has relative positions")
    captured: dict[int, list[Tensor]] = {block: [] for block in view.blocks}
    heads = encoder.config.heads
    with ExitStack() as hooks:
        for block, projections in captured.items():
            qkv = cast(nn.Module, encoder.blocks[block - 1].attn.qkv)
            hooks.enter_context(qkv.register_forward_hook(_keeper(projections)))
        view.tokens(images, view.blocks)
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
    features = subject.descriptors(images)
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


def block_titles(view: EncoderView) -> list[str]:
    """Return the titles of the columns that show one block each."""
    return [f"block {block}" for block in view.blocks]


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
