"""The weights that a stage starts from in place of random ones: those of an earlier run of the same stage (`init`)."""

import logging
from dataclasses import asdict
from typing import Any

from torch import nn

from addp_core.base.errors import UserError

log = logging.getLogger("addp")

RATES = ("dropout", "input_dropout", "drop_path")  # of a training; the weights do not depend on them


def start_from(model: nn.Module, weights: nn.Module, recipe_config: Any, file_config: Any, source: str) -> None:
    """Copy the weights of a file into a model that is going to be trained.

    Args:
        model: as the recipe builds it.
        weights: the same part, as the file holds it.
        recipe_config, file_config: the dataclasses of both architectures: the section `model` of the recipe.
        source: the file, which `init` names.

    Raises UserError with the first key in which the architectures differ, or the first tensor of another shape.
    """
    found, expected = _flat(asdict(file_config)), _flat(asdict(recipe_config))
    for key in [*expected, *found]:
        if key.split(".")[-1] not in RATES and found.get(key) != expected.get(key):
            raise UserError(
                f"init: {source} has {key} = {found.get(key)}, this recipe {expected.get(key)}; expected the same "
                f"architecture: model.{key}={found.get(key)}, or another file"
            )
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
