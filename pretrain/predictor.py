"""Stage 2: `addp predictor` trains the token predictor (MAGE, arXiv 2211.09117) on the ids of a trained tokenizer.

In every step a share of the ids is masked, and the predictor predicts them. The encoder does not see at least half of
the positions at all.
"""

import math
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.data.sources import ImageSource
from addp_core.data.stream import Batch, example_images
from addp_core.method.diffusion import map_tokens
from addp_core.networks.layers import MaskPositions, checkpoint_blocks, count_visible, gather_tokens
from addp_core.networks.predictor import TokenPredictor
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.networks.tokenizer import Tokenizer, Vocabulary, to_feature_map
from addp_core.training.stage import MicroStep
from addp_core.weights.fingerprint import fingerprint
from addp_core.weights.saving import save_model
from pretrain.common import load_frozen_tokenizer, run_stage
from pretrain.evaluation import EvaluatedStage, Evaluation, Measured
from pretrain.initial_weights import load_initial_predictor, start_from, warn_of_other_ids
from pretrain.recipe import MaskingConfig as MaskingConfig
from pretrain.recipe import PredictorRecipe as Recipe
from pretrain.tokens import TokenBatch

PREVIEW_IMAGES = 8


def run(recipe: Recipe) -> None:
    """Train a token predictor, or continue; ends with `<out>/model.safetensors`."""
    run_stage(recipe, lambda source: build_stage(recipe, source), PredictorStage.measured, recipe.interpolation)


def build_stage(recipe: Recipe, source: ImageSource) -> "PredictorStage":
    """Return the stage with the predictor of `init`, or a randomly initialized one.

    `source` provides the images of previews.
    """
    tokenizer, grid = load_frozen_tokenizer(recipe.tokenizer, recipe.data)
    torch.manual_seed(recipe.train.seed)
    vocabulary = Vocabulary.with_slots(tokenizer.config.codebook, recipe.unused_ids)
    predictor = TokenPredictor(recipe.model, grid[0] * grid[1], vocabulary)
    if start := load_initial_predictor(recipe, grid):
        start_from(predictor, start, recipe.init)
        warn_of_other_ids(start.trained_on, fingerprint(tokenizer), recipe.init, recipe.tokenizer)
    predictor.trained_on = fingerprint(tokenizer)
    checkpoint_blocks(predictor, recipe.train.checkpointing)
    examples = example_images(source, recipe.data, PREVIEW_IMAGES)
    return PredictorStage(predictor, tokenizer, grid, recipe.masking, examples, recipe.draw)


class PredictorStage(EvaluatedStage):
    """Trains the token predictor with MAGE's loss on the ids of a frozen tokenizer."""

    name = "predictor"
    model: "MaskedTokenModel"
    measured = Measured({"val_loss": False, "val_accuracy": True, "val_context": True}, encoder=True)

    def __init__(
        self,
        predictor: TokenPredictor,
        tokenizer: Tokenizer,
        grid: tuple[int, int],
        masking: MaskingConfig,
        examples: Tensor,
        draw: str = "batch",
    ):
        """`examples`: Float[n,3,H,W] in [0,1], the images of previews."""
        codebook_only = masking.loss_over == "codebook"
        self.model = MaskedTokenModel(predictor, masking.label_smoothing, codebook_only)
        self.one_ratio_per_batch = draw == "batch"
        self.frozen = [tokenizer]
        self.tokenizer, self.grid, self.masking, self.examples = tokenizer, grid, masking, examples

    def loss(self, model: nn.Module, batch: Batch | TokenBatch, micro_step: MicroStep) -> dict[str, Tensor]:
        with torch.no_grad():
            ids = batch.ids if isinstance(batch, TokenBatch) else self.tokenizer.encode(batch.images)
        shared = self.one_ratio_per_batch
        mask_rows = micro_step.batch if shared else len(ids)
        rows = micro_step.rows if shared else slice(None)
        generator = micro_step.generator("mask", shared=shared)
        masks = [m[rows] for m in draw_mage_masks(self.masking, mask_rows, ids.shape[1], generator)]
        counts = [count_visible(m) for m in masks]  # on the host
        mask, dropped = (m.to(ids.device, non_blocking=True) for m in masks)
        positions = MaskPositions.from_mask(mask, counts[0], self.model.predictor.compiled)
        return model(ids, mask, dropped, positions, MaskPositions.from_mask(dropped, counts[1]).visible)

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Show beside each image its reconstruction from its ids, and what the predictor makes of it with half of them
        masked.
        """
        codebook = self.tokenizer.quantize.embedding.weight
        images = self.examples.to(codebook.device)
        ids = self.tokenizer.encode(images)
        odd_rows = torch.arange(ids.shape[1], device=ids.device) // self.grid[1] % 2 == 1
        mask = odd_rows.expand(len(ids), -1)
        predictor = cast(MaskedTokenModel, model).predictor
        predicted = map_tokens(predictor(ids, mask), codebook, "weighted")
        mixed = torch.where(mask.unsqueeze(-1), predicted, self.tokenizer.quantize.embedding(ids))
        reconstructed = self.tokenizer.decode(self.tokenizer.lookup(ids, self.grid))
        completed = self.tokenizer.decode(to_feature_map(mixed, self.grid))
        return {"guess": torch.cat([images, reconstructed, completed], 3).clamp(0, 1)}

    def measure(self, model: nn.Module, evaluation: Evaluation) -> dict[str, float]:
        """Return loss, accuracy and context over the masked ids of all images, and probes of the encoder."""
        masked = cast(MaskedTokenModel, model)
        tokens = self.grid[0] * self.grid[1]
        masks, drops = evaluation.rows(lambda n, drawn: draw_mage_masks(self.masking, n, tokens, drawn), "mask")
        sums = torch.zeros(3 + masked.vocabulary, dtype=torch.float32)  # loss, hits, masked ids; uses of each id
        start = 0
        for images in evaluation.batches():
            rows = slice(start, start + len(images))
            mask, dropped = (each[rows].to(images.device) for each in (masks, drops))
            logits, targets = masked.masked_logits(self.tokenizer.encode(images), mask, dropped)
            loss = F.cross_entropy(logits, targets, label_smoothing=masked.label_smoothing, reduction="sum")
            hits = (logits.argmax(-1) == targets).sum()
            counted = torch.stack([loss, hits.float(), loss.new_tensor(len(targets))])
            sums += torch.cat([counted, masked.count(targets).float()]).cpu()
            start = rows.stop
        (loss, hits, count), uses = evaluation.total(sums.to(self._device)).cpu().split([3, masked.vocabulary])
        metrics = {
            "val_loss": (loss / count).item(),
            "val_accuracy": (hits / count).item(),
            "val_context": masked.context(uses, loss / count).item(),
        }
        size = (self.grid[0] * self.tokenizer.config.stride, self.grid[1] * self.tokenizer.config.stride)
        return metrics | evaluation.probe(TokenEncoder.of_predictor(masked.predictor, self.tokenizer, size))

    @property
    def _device(self) -> torch.device:
        return self.tokenizer.quantize.embedding.weight.device

    def export(self, model: nn.Module, path: Path) -> None:
        save_model(cast(MaskedTokenModel, model).predictor, path, grid=self.grid)


class MaskedTokenModel(nn.Module):
    """The predictor with MAGE's loss as its forward pass, because data-parallel wrappers need a single call.

    codebook_only: whether cross-entropy and smoothing cover the codebook's ids only, or the whole vocabulary.
    """

    def __init__(self, predictor: TokenPredictor, label_smoothing: float, codebook_only: bool = False):
        super().__init__()
        self.predictor, self.label_smoothing = predictor, label_smoothing
        self.vocabulary = predictor.vocabulary.codebook if codebook_only else predictor.vocabulary.size

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        dropped: Tensor,
        positions: MaskPositions | None = None,
        kept: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the scalars "loss", "accuracy" and "context" of the masked ids.

        Args:
            ids: Long[B,N].
            mask: Bool[B,N], True where ids are masked.
            dropped: Bool[B,N], the masked positions that the encoder does not see at all.
            positions: those of the mask, if the caller has computed them.
            kept: Long[B,N'], the positions that the encoder sees, if the caller has computed them.

        "context" is how many nats the loss is below the loss of predicting the frequencies of ids in this batch, which
        is the best prediction without the image. As long as it is not clearly positive, ADDP has nothing to learn from
        the predictor. The frequencies are those of the masked ids themselves, so context starts below zero, by about
        codes / 2 / masked ids.
        """
        logits, targets = self.masked_logits(ids, mask, dropped, positions, kept)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(-1) == targets).float().mean()
        return {"loss": loss, "accuracy": accuracy, "context": self.context(self.count(targets), loss.detach())}

    def masked_logits(
        self,
        ids: Tensor,
        mask: Tensor,
        dropped: Tensor,
        positions: MaskPositions | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits at the masked positions of all images, Float[R,V], and the ids there, Long[R].

        Arguments are those of `forward`.
        """
        positions = positions or MaskPositions.from_mask(mask)
        logits = self.predictor.logits(ids, mask, dropped, self.vocabulary, kept)
        logits = positions.unpad_masked(gather_tokens(logits, positions.masked)).float()
        return logits, positions.unpad_masked(ids.gather(1, positions.masked))

    def count(self, ids: Tensor) -> Tensor:
        """Count how often each id of the vocabulary is in Long[R] ids, Long[V]."""
        counts = torch.zeros(self.vocabulary, dtype=torch.long, device=ids.device)
        return counts.index_add(0, ids, torch.ones_like(ids))  # not `bincount`, for whose length the host has to wait

    def context(self, counts: Tensor, loss: Tensor) -> Tensor:
        """Return how many nats the loss is below that of predicting the frequencies of the ids counted, [V]."""
        frequencies = counts / counts.sum().clamp_min(1)
        smoothed = (1 - self.label_smoothing) * frequencies + self.label_smoothing / self.vocabulary
        return torch.special.entr(smoothed).sum() - loss


def draw_mage_masks(
    config: MaskingConfig, batch: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one mask ratio for these images and random positions for each of them.

    Returns:
        mask: Bool[B,N].
        dropped: Bool[B,N], the share `ratio_min` of the positions, all of them masked.
    """
    bounds = (
        torch.tensor([config.ratio_min, config.ratio_max], dtype=torch.float64) - config.ratio_mean
    ) / config.ratio_std
    low, high = torch.special.ndtr(bounds)
    quantile = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64)
    ratio = float(config.ratio_mean + config.ratio_std * torch.special.ndtri(quantile))
    ratio = min(max(ratio, config.ratio_min), config.ratio_max)
    rank = torch.rand(batch, tokens, generator=generator).argsort(1).argsort(1)
    return rank < max(math.ceil(tokens * ratio), 1), rank < math.ceil(tokens * config.ratio_min)
