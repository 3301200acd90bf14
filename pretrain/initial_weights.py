"""The weights that a stage starts from in place of random ones: those of an earlier run of the same stage (`init`)."""

import logging
from dataclasses import asdict
from typing import Any

from torch import nn

from addp_core.base.errors import UserError, naming_key
from addp_core.method.addp import ADDP
from addp_core.networks.config import EncoderConfig
from addp_core.networks.predictor import TokenPredictor
from addp_core.weights.loading import load_addp, load_predictor
from addp_core.weights.reading import read_weights
from pretrain.recipe import PredictorRecipe, PretrainRecipe

log = logging.getLogger("addp")

RATES = ("dropout", "input_dropout", "drop_path")  # of a training; the weights do not depend on them


def load_initial_denoiser(recipe: PretrainRecipe) -> ADDP | None:
    """Load the model of `init`, for the recipe's images; None if the recipe names none.

    Raises UserError if it cannot be read, or its encoder or decoder has another architecture than the recipe's.
    """
    if not recipe.init:
        return None
    heads = {"decoder_heads": recipe.model.decoder.heads}
    if isinstance(recipe.model.encoder, EncoderConfig):
        heads["encoder_heads"] = recipe.model.encoder.heads
    with naming_key("init"):
        start = load_addp(recipe.init, image_size=recipe.data.hw, **_unstored(heads, recipe.init, "addp"))
    check_architecture(recipe.model, start.config.denoiser, recipe.init)
    return start


def load_initial_predictor(recipe: PredictorRecipe, grid: tuple[int, int]) -> TokenPredictor | None:
    """Load the predictor of `init`, for a token grid; None if the recipe names none.

    Raises UserError if it cannot be read, or has another architecture than the recipe's.
    """
    if not recipe.init:
        return None
    heads = {"predictor_heads": recipe.model.heads, "predictor_decoder_heads": recipe.model.decoder_heads}
    with naming_key("init"):
        start = load_predictor(recipe.init, grid, **_unstored(heads, recipe.init, "predictor"))
    check_architecture(recipe.model, start.config, recipe.init)
    return start


def _unstored(heads: dict[str, int], source: str, kind: str) -> dict[str, Any]:
    """Return those of the recipe's numbers of attention heads that neither the file nor its width tells."""
    try:
        weights = read_weights(source, kind)
    except UserError:  # the file cannot be read, which loading says, or its width is no multiple of the usual heads
        return heads
    return {key: number for key, number in heads.items() if weights.assumes(key)}


def check_architecture(recipe_config: Any, file_config: Any, source: str) -> None:
    """Raise UserError with the first key in which two architectures differ, as a recipe and the file `source` say."""
    found, expected = _flat(asdict(file_config)), _flat(asdict(recipe_config))
    for key in [*expected, *found]:
        if key.split(".")[-1] not in RATES and found.get(key) != expected.get(key):
            raise UserError(
                f"init: {source} has {key} = {found.get(key)}, this recipe {expected.get(key)}; expected the same "
                f"architecture: model.{key}={found.get(key)}, or another file"
            )


def start_from(model: nn.Module, weights: nn.Module, source: str) -> None:
    """Copy the weights of a file into a model that is going to be trained.

    Args:
        model: as the recipe builds it.
        weights: the same part, as the file holds it.
        source: the file, which `init` names.

    Raises UserError with the first tensor of another shape.
    """
    shapes, needed = ({name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (weights, model))
    for name in {**needed, **shapes}:
        if shapes.get(name) != needed.get(name):
            raise UserError(
                f"init: {source}: {name} has shape {shapes.get(name)}, expected {needed.get(name)}; the file and this "
                "recipe differ in process.ids_to, or in the number of ids of the tokenizer and `unused_ids`"
            )
    model.load_state_dict(weights.state_dict())
    log.info("init: starting from the weights of %s", source)


def warn_of_other_ids(found: str, expected: str, source: str, tokenizer: str) -> None:
    """Log that the weights belong to the ids of another tokenizer, by the fingerprints of both ("": not known)."""
    if found not in ("", expected):
        log.warning(
            "init: %s was trained on the ids of another tokenizer than %s, or of the same one in another precision",
            *(source, tokenizer),
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the entries of nested dictionaries under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
