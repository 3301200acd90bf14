"""What the three stages share: running a stage, its images, the token grid of the images, and the frozen tokenizer."""

import functools
import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Protocol

from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.paths import expand_home
from addp_core.data.config import DataConfig
from addp_core.data.held_out import hold_out, same_images
from addp_core.data.images import Interpolation, pretrain_transform
from addp_core.data.sources import ImageSource, open_source
from addp_core.data.splits import MissingSplitError
from addp_core.data.stream import Stream
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig
from addp_core.training.best import check_keep_best
from addp_core.training.engine import train
from addp_core.training.run_folder import prepare_out
from addp_core.training.stage import TrainConfig
from addp_core.weights.loading import load_tokenizer
from pretrain.evaluation import SEED, EvaluatedStage, Evaluation, Measured
from pretrain.recipe import EvaluationConfig, TokenData
from pretrain.tokens import TokenCache, TokenCacheKey, TokenStream

log = logging.getLogger("addp")


class StageRecipe(Protocol):
    """The keys that every stage has."""

    out: str

    @property
    def data(self) -> DataConfig:
        """The section `data`, which a stage may extend."""

    @property
    def evaluation(self) -> EvaluationConfig:
        """The section `evaluation`."""

    @property
    def train(self) -> TrainConfig:
        """The section `train`, which a stage may extend."""


def run_stage(
    recipe: StageRecipe,
    build_stage: Callable[[ImageSource], EvaluatedStage],
    measured: Measured,
    interpolation: Interpolation = "bicubic",
) -> None:
    """Train a stage, or continue it; does nothing if this run has finished.

    Args:
        build_stage: called with the images once the run folder is claimed.
        measured: what the stage measures in evaluations.
        interpolation: how the crops are resized.
    """
    images = functools.cache(lambda: open_images(recipe))
    if prepare_out(recipe.out, recipe, lambda: {"train": images()[0]}):
        return
    (source, evaluated), settings = images(), recipe.train
    evaluation = None
    if evaluated is not None:
        where = recipe.evaluation.data or recipe.data.source
        evaluation = Evaluation(recipe.evaluation, evaluated, recipe.data, measured, where)
    check_keep_best(settings.keep_best, evaluation.metrics if evaluation else {})
    cache = open_token_cache(recipe.data, interpolation, source)
    stage = build_stage(source)
    stage.evaluation = evaluation
    stream: Stream | TokenStream
    if cache:
        cache.check_tokenizer(next(part for part in stage.frozen if isinstance(part, Tokenizer)))
        stream = TokenStream(cache, seed=settings.seed, batch=settings.micro_batch)
    else:
        transform = pretrain_transform(recipe.data, interpolation)
        stream = Stream(source, transform, recipe.data, seed=settings.seed, batch=settings.micro_batch)
    train(stage, stream, settings, recipe.out, recipe)


def open_images(recipe: StageRecipe) -> tuple[ImageSource, ImageSource | None]:
    """Open the images to train on and those to evaluate on, if the recipe names any.

    Raises UserError if there are none, or they cannot be held out.
    """
    config, source = recipe.evaluation, open_source(recipe.data)
    if config.held_out:
        if isinstance(recipe.data, TokenData) and recipe.data.tokens:
            raise UserError(
                f"evaluation.held_out: found {config.held_out} beside data.tokens, which has the ids of all images; "
                "expected evaluation.data=<other images>, or no data.tokens"
            )
        key, instead = "evaluation.held_out", "evaluation.data"
        return hold_out(source, config.held_out, SEED, key, instead, every_class=False)
    if not config.data:
        return source, None
    evaluated = replace(recipe.data, source=config.data, split="val", classes=None)
    evaluated = DataConfig(**{key.name: getattr(evaluated, key.name) for key in fields(DataConfig)})
    with renaming_keys({"data.source": "evaluation.data", "data.split": "evaluation.data"}):
        try:
            images = open_source(evaluated)
        except MissingSplitError:
            images = open_source(evaluated, "train")
    if same_images(source, images):
        log.warning(
            "evaluation.data: %s has the images that are trained on; evaluation.held_out=0.05 would keep some from it",
            config.data,
        )
    return source, images


def open_token_cache(data: DataConfig, interpolation: Interpolation, source: ImageSource) -> TokenCache | None:
    """Open the cache that the recipe names, if it names one. Raises UserError if it is not one of these crops."""
    if not (isinstance(data, TokenData) and data.tokens):
        return None
    cache = TokenCache(expand_home(data.tokens), TokenCacheKey.of(data, interpolation, source))
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
