"""Stage 2: `addp predictor` trains the token predictor (MAGE, arXiv 2211.09117) on the ids of a trained tokenizer.

A share of the ids is masked, at least half of the positions are hidden from the encoder altogether, and the masked ids
are predicted.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.data.config import DataConfig
from addp_core.data.images import pretrain_transform
from addp_core.data.sources import open_source
from addp_core.data.stream import Batch, Stream, example_images
from addp_core.method.diffusion import map_tokens
from addp_core.networks.predictor import PredictorConfig, TokenPredictor
from addp_core.networks.tokenizer import Tokenizer, Vocabulary, to_feature_map
from addp_core.recipes.config import dump
from addp_core.training.engine import Draw, Stage, TrainConfig, prepare_out, train
from addp_core.weights.checkpoint import fingerprint, load_tokenizer, save_model
from pretrain.tokenizer import token_grid

EXAMPLES = 8  # images in a preview


@dataclass
class MaskingConfig:
    """MAGE's variable masking: ratios from a truncated normal."""

    ratio_mean: Annotated[float, Interval(gt=0, lt=1), "peak of the mask ratio's truncated normal"] = 0.55
    ratio_std: Annotated[float, Interval(gt=0), "its spread"] = 0.25
    ratio_min: Annotated[
        float, Interval(ge=0, lt=1), "smallest ratio; this share of positions is hidden from the encoder"
    ] = 0.5
    ratio_max: Annotated[float, Interval(gt=0, le=1), "largest ratio"] = 1.0
    label_smoothing: Annotated[float, Interval(ge=0, lt=1), "over the whole vocabulary"] = 0.1

    def __post_init__(self):
        if self.ratio_min >= self.ratio_max:
            raise ValueError(f"ratio_min: found {self.ratio_min}, expected less than ratio_max = {self.ratio_max}")


@dataclass
class Recipe:
    """Keys of `addp predictor`."""

    out: Annotated[str, "run folder"]
    tokenizer: Annotated[
        str, "trained tokenizer: a run of `addp tokenizer`, a VQGAN file, or hf://owner/repository/file"
    ]
    data: DataConfig = field(default_factory=DataConfig)
    model: PredictorConfig = field(default_factory=PredictorConfig)
    unused_ids: Annotated[
        int,
        Ge(1),
        "ids beside the codebook's and the mask's, one of them the class slot's; published: 1000 (MaskGIT's "
        "classes). None is ever right, and a small network spends its first thousands of steps on learning that",
    ] = Vocabulary.unused
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def run(recipe: Recipe) -> None:
    """Train a token predictor, or continue; ends with `<out>/model.safetensors`."""
    text = dump(recipe)
    if prepare_out(recipe.out, text):
        return
    source = open_source(recipe.data)
    tokenizer = load_tokenizer(recipe.tokenizer)
    grid = token_grid(tokenizer.config, recipe.data)
    torch.manual_seed(recipe.train.seed)
    vocabulary = Vocabulary.with_slots(tokenizer.config.codebook, recipe.unused_ids)
    predictor = TokenPredictor(recipe.model, grid[0] * grid[1], vocabulary)
    predictor.trained_on = fingerprint(tokenizer)
    stage = PredictorStage(predictor, tokenizer, grid, recipe.masking, example_images(source, recipe.data, EXAMPLES))
    stream = Stream(
        source, pretrain_transform(recipe.data), recipe.data, seed=recipe.train.seed, batch=recipe.train.micro_batch
    )
    train(stage, stream, recipe.train, recipe.out, text)


class PredictorStage(Stage):
    """What the engine trains: MAGE's loss over a frozen tokenizer's ids."""

    name = "predictor"

    def __init__(
        self,
        predictor: TokenPredictor,
        tokenizer: Tokenizer,
        grid: tuple[int, int],
        masking: MaskingConfig,
        examples: Tensor,
    ):
        self.model = MaskedTokenModel(predictor, masking.label_smoothing)
        self.frozen = [tokenizer]
        self.tokenizer, self.grid, self.masking, self.examples = tokenizer, grid, masking, examples

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        with torch.no_grad():
            ids = self.tokenizer.encode(batch.images)
        mask, hidden = mage_masks(self.masking, draw.batch, ids.shape[1], draw.generator("mask"))
        return model(ids, mask[draw.rows].to(ids.device), hidden[draw.rows].to(ids.device))

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Rows of: the image, its reconstruction from the ids, the predictor's guess with half of the ids hidden."""
        images = self.examples.to(self.tokenizer.quantize.embedding.weight.device)
        ids = self.tokenizer.encode(images)
        half = torch.arange(ids.shape[1], device=ids.device) // self.grid[1] % 2 == 1
        mask = half.expand(len(ids), -1)
        codebook = self.tokenizer.quantize.embedding.weight
        guess = map_tokens(model.predictor(ids, mask), codebook, "weighted")
        mixed = torch.where(mask.unsqueeze(-1), guess, self.tokenizer.quantize.embedding(ids))
        rows = torch.cat(
            [
                images,
                self.tokenizer.decode(self.tokenizer.lookup(ids, self.grid)),
                self.tokenizer.decode(to_feature_map(mixed, self.grid)),
            ]
        )
        return {"guess": rows.clamp(0, 1)}

    def export(self, model: nn.Module, path: Path) -> None:
        save_model(model.predictor, path, grid=self.grid)


class MaskedTokenModel(nn.Module):
    """The predictor with MAGE's loss as its forward pass, so that data-parallel wrappers see one call."""

    def __init__(self, predictor: TokenPredictor, label_smoothing: float):
        super().__init__()
        self.predictor, self.label_smoothing = predictor, label_smoothing

    def forward(self, ids: Tensor, mask: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Long[B,N] ids, Bool[B,N] mask and, part of it, positions hidden from the encoder -> {"loss", "accuracy",
        "context"}, on masked ids.

        context: nats by which the loss lies below that of the batch's own frequencies of ids, the best guess without
        looking at the image. While it is not clearly positive, a predictor has nothing to teach. (Frequencies of a
        small batch flatter the guess: context starts below zero by about codes / 2 / masked ids.)
        """
        logits, truth = self.predictor.logits(ids, mask, hidden)[mask].float(), ids[mask]
        loss = F.cross_entropy(logits, truth, label_smoothing=self.label_smoothing)
        vocabulary = logits.shape[-1]
        seen = torch.bincount(truth, minlength=vocabulary) / max(len(truth), 1)
        guess = (1 - self.label_smoothing) * seen + self.label_smoothing / vocabulary
        accuracy = (logits.argmax(-1) == truth).float().mean()
        return {"loss": loss, "accuracy": accuracy, "context": torch.special.entr(guess).sum() - loss.detach()}


def mage_masks(config: MaskingConfig, batch: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One mask ratio for the batch -> Bool[B,N] masked, and Bool[B,N] hidden from the encoder; the second lies in the
    first.
    """
    bounds = (
        torch.tensor([config.ratio_min, config.ratio_max], dtype=torch.float64) - config.ratio_mean
    ) / config.ratio_std
    low, high = torch.special.ndtr(bounds)
    share = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64)
    ratio = float(config.ratio_mean + config.ratio_std * torch.special.ndtri(share))
    ratio = min(max(ratio, config.ratio_min), config.ratio_max)
    rank = torch.rand(batch, tokens, generator=generator).argsort(1).argsort(1)
    return rank < max(math.ceil(tokens * ratio), 1), rank < math.ceil(tokens * config.ratio_min)
