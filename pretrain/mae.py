"""`addp mae` trains the baseline of pixel encoders, MAE (arXiv 2111.06377), on the same images as ADDP.

Three quarters of the patches are hidden; from the others, the encoder and a small decoder reconstruct them. The encoder
is ADDP's own and ends as `<out>/model.safetensors`, which every transfer reads.
"""

from pathlib import Path
from typing import cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.data.sources import ImageSource
from addp_core.data.stream import Batch, example_images
from addp_core.networks.classifier import normalize
from addp_core.networks.layers import checkpoint_blocks
from addp_core.networks.mae import (
    VARIANCE_EPS,
    MaskedAutoencoder,
    count_visible,
    draw_visible,
    from_patches,
    mark_visible,
    to_patches,
)
from addp_core.training.stage import MicroStep
from addp_core.weights.saving import save_model
from pretrain.common import run_stage
from pretrain.evaluation import EvaluatedStage, Evaluation, Measured
from pretrain.recipe import MaeRecipe as Recipe

PREVIEW_IMAGES = 8
PREVIEW_SEED = 0  # of the masks of previews
GRAY = 0.5  # masked patches in previews


def run(recipe: Recipe) -> None:
    """Train MAE, or continue; ends with its encoder in `<out>/model.safetensors`."""
    run_stage(recipe, lambda source: build_stage(recipe, source), MaeStage.measured)


def build_stage(recipe: Recipe, source: ImageSource) -> "MaeStage":
    """Return the stage with a randomly initialized model. `source` provides the images of previews.

    Raises UserError if the patches do not fit the images, or the mask leaves none or all of them.
    """
    torch.manual_seed(recipe.train.seed)
    try:
        model = MaskedAutoencoder(recipe.model, recipe.data.hw)
    except ValueError as error:
        raise UserError(f"model.patch_size: {error}") from error
    tokens = model.encoder.grid[0] * model.encoder.grid[1]
    if not 0 < count_visible(tokens, recipe.mask_ratio) < tokens:
        visible = count_visible(tokens, recipe.mask_ratio)
        raise UserError(
            f"mask_ratio: {recipe.mask_ratio} of the {tokens} patches of an image leaves {visible} of them visible; "
            "expected at least one, and not all"
        )
    checkpoint_blocks(model, recipe.train.checkpointing)
    examples = example_images(source, recipe.data, PREVIEW_IMAGES)
    return MaeStage(model, recipe.mask_ratio, recipe.norm_pix_loss, examples)


class MaeStage(EvaluatedStage):
    """Trains MAE's encoder and decoder.

    Args:
        model: with its encoder and decoder.
        mask_ratio: share of the patches that are masked.
        norm_pix_loss: see `MaskedAutoencoder.forward`.
        examples: Float[n,3,H,W] in [0,1], the images of previews.
    """

    name = "mae"
    model: MaskedAutoencoder
    measured = Measured({"val_loss": False}, encoder=True)

    def __init__(self, model: MaskedAutoencoder, mask_ratio: float, norm_pix_loss: bool, examples: Tensor):
        self.model, self.mask_ratio, self.norm_pix_loss, self.examples = model, mask_ratio, norm_pix_loss, examples
        self.tokens = model.encoder.grid[0] * model.encoder.grid[1]

    def loss(self, model: nn.Module, batch: Batch, micro_step: MicroStep) -> dict[str, Tensor]:
        drawn = draw_visible(micro_step.batch, self.tokens, self.mask_ratio, micro_step.generator("mask"))
        visible = drawn[micro_step.rows].to(batch.images.device, non_blocking=True)
        return model(_normalize(batch.images), visible, self.norm_pix_loss)

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Show beside each image what the encoder sees of it, and the reconstruction."""
        mae = cast(MaskedAutoencoder, model)
        images, side, grid = self.examples.to(mae.mask_token.device), mae.config.patch_size, mae.encoder.grid
        generator = torch.Generator().manual_seed(PREVIEW_SEED)
        visible = draw_visible(len(images), self.tokens, self.mask_ratio, generator).to(images.device)
        patches = to_patches(_normalize(images), side)
        predicted = mae.reconstruct(_normalize(images), visible).float()
        if self.norm_pix_loss:  # mean and contrast of a masked patch are not predicted: they are those of the image
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            predicted = predicted * (variance + VARIANCE_EPS).sqrt() + mean
        is_visible = mark_visible(visible, self.tokens).bool().unsqueeze(-1)
        seen = torch.where(is_visible, to_patches(images, side), GRAY)
        reconstructed = torch.where(is_visible, patches, predicted)
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        shown = [images, from_patches(seen, grid, side), from_patches(reconstructed, grid, side) * std + mean]
        return {"reconstruction": torch.cat(shown, 3).clamp(0, 1)}

    def measure(self, model: nn.Module, evaluation: Evaluation) -> dict[str, float]:
        """Return the loss over all images, and probes of the encoder."""
        mae = cast(MaskedAutoencoder, model)
        (drawn,) = evaluation.rows(lambda n, rng: (draw_visible(n, self.tokens, self.mask_ratio, rng),), "mask")
        sums, start = torch.zeros(2), 0  # loss times images, images
        for images in evaluation.batches():
            visible = drawn[start : start + len(images)].to(images.device)
            loss = mae(_normalize(images), visible, self.norm_pix_loss)["loss"]
            sums += torch.stack([loss.float() * len(images), loss.new_tensor(len(images))]).cpu()
            start += len(images)
        loss, count = evaluation.total(sums.to(mae.mask_token.device)).cpu().tolist()
        return {"val_loss": loss / count} | evaluation.probe(mae.encoder)

    def export(self, model: nn.Module, path: Path) -> None:
        save_model(cast(MaskedAutoencoder, model).encoder, path)


def _normalize(images: Tensor) -> Tensor:
    """Normalize images Float[B,3,H,W] in [0,1] by ImageNet's mean and standard deviation."""
    return normalize(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
