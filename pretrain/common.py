"""What the three stages share: running a stage, the token grid of the images, and the frozen tokenizer."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from addp_core.base.errors import UserError
from addp_core.data.config import DataConfig
from addp_core.data.images import Interpolation, pretrain_transform
from addp_core.data.sources import ImageSource, open_source
from addp_core.data.stream import Stream
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig
from addp_core.training.engine import train
from addp_core.training.run_folder import prepare_out
from addp_core.training.stage import Stage, TrainConfig
from addp_core.weights.loading import load_tokenizer
from pretrain.recipe import TokenData
from pretrain.tokens import TokenCache, TokenCacheKey, TokenStream

log = logging.getLogger("addp")


class StageRecipe(Protocol):
    """The keys that every stage has."""

    out: str

    @property
    def data(self) -> DataConfig:
        """The section `data`, which a stage may extend."""

    @property
    def train(self) -> TrainConfig:
        """The section `train`, which a stage may extend."""


def run_stage(
    recipe: StageRecipe, build_stage: Callable[[ImageSource], Stage], interpolation: Interpolation = "bicubic"
) -> None:
    """Train a stage, or continue it; does nothing if this run has finished.

    Args:
        build_stage: called with the images once the run folder is claimed.
        interpolation: how the crops are resized.
    """
    datasets = functools.cache(lambda: {"train": open_source(recipe.data)})
    if prepare_out(recipe.out, recipe, datasets):
        return
    source, settings = datasets()["train"], recipe.train
    cache = open_token_cache(recipe.data, interpolation, source)
    stage = build_stage(source)
    stream: Stream | TokenStream
    if cache:
        cache.check_tokenizer(next(part for part in stage.frozen if isinstance(part, Tokenizer)))
        stream = TokenStream(cache, seed=settings.seed, batch=settings.micro_batch)
    else:
        transform = pretrain_transform(recipe.data, interpolation)
        stream = Stream(source, transform, recipe.data, seed=settings.seed, batch=settings.micro_batch)
    train(stage, stream, settings, recipe.out, recipe)


def open_token_cache(data: DataConfig, interpolation: Interpolation, source: ImageSource) -> TokenCache | None:
    """Open the cache that the recipe names, if it names one. Raises UserError if it is not one of these crops."""
    if not (isinstance(data, TokenData) and data.tokens):
        return None
    cache = TokenCache(Path(data.tokens).expanduser(), TokenCacheKey.of(data, interpolation, source))
    log.info("data: %s: ids of %d crops of each image; no image is read for training", data.tokens, cache.crops)
    return cache


def token_grid(tokenizer: TokenizerConfig, data: DataConfig) -> tuple[int, int]:
    """Return the rows and columns of tokens of the recipe's images.

    Raises UserError if the tokenizer's stride does not divide the image size.
    """
    try:
        return tokenizer.grid(data.hw)
    except ValueError as error:
        raise UserError(f"data.size: {error}") from error


def load_frozen_tokenizer(source: str, data: DataConfig) -> tuple[Tokenizer, tuple[int, int]]:
    """Load the tokenizer that a later stage builds on, and return it with its grid for the recipe's images."""
    tokenizer = load_tokenizer(source)
    return tokenizer, token_grid(tokenizer.config, data)
