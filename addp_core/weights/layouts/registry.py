"""The foreign layouts that can be read, in the order in which they are tried, and descriptions of those that cannot."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from addp_core.weights.assumptions import Hints
from addp_core.weights.files import State
from addp_core.weights.layouts.cnn import (
    convert_resnet,
    convert_resnet_classifier,
    is_resnet,
    is_resnet_classifier,
)
from addp_core.weights.layouts.ours import convert_our_addp, convert_our_classifier, is_our_addp, is_our_classifier
from addp_core.weights.layouts.published import (
    convert_addp,
    convert_mage,
    convert_vqgan,
    is_mage,
    is_published_addp,
    is_vqgan,
)
from addp_core.weights.layouts.shapes import has_tensors
from addp_core.weights.layouts.vit import convert_vit, convert_vit_classifier, is_mae, is_vit, is_vit_classifier


class Layout(NamedTuple):
    """A layout of weights and its conversion to ours."""

    kind: str  # a key of ARCHITECTURES
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[str, State, Hints], tuple[State, Any]]
    """(source named in errors, tensors, what the caller knows) -> (tensors under our names, architecture)"""


LAYOUTS = (
    Layout("addp", is_published_addp, convert_addp),
    Layout("addp", is_our_addp, convert_our_addp),
    Layout("predictor", is_mage, convert_mage),
    Layout("tokenizer", is_vqgan, convert_vqgan),
    Layout("encoder", is_vit, convert_vit),
    Layout("classifier", is_our_classifier, convert_our_classifier),
    Layout("classifier", is_vit_classifier, convert_vit_classifier),  # if a classifier is asked for
    Layout("cnn_encoder", is_resnet, convert_resnet),
    Layout("classifier", is_resnet_classifier, convert_resnet_classifier),
)

# It is read if it tells its architecture, and has no layout of its own otherwise.
is_token_encoder = has_tensors("token_emb.word_embeddings.weight", "tokenizer.quantize.embedding.weight")

_DESCRIPTIONS: tuple[tuple[Callable[[Mapping[str, Any]], bool], str], ...] = (
    (is_published_addp, "an ADDP checkpoint"),
    (is_mage, "a MAGE checkpoint: pass it as predictor="),
    (is_token_encoder, "an encoder over token ids that does not tell its architecture"),
    (is_vqgan, "a VQGAN checkpoint: pass it as tokenizer="),
    (is_mae, "a MAE checkpoint: load_encoder reads it"),
    (is_vit, "a plain ViT checkpoint: load_encoder reads it"),
    (has_tensors("conv1.weight", "layer1.0.conv1.weight"), "a ResNet checkpoint"),
    (
        lambda state: any("diffusion_model" in key or key.startswith("first_stage_model") for key in state),
        "a latent diffusion checkpoint",
    ),
    (
        lambda state: any(key.startswith(("backbone.", "roi_heads.", "decode_head.")) for key in state),
        "a detector's or segmenter's checkpoint",
    ),
)


_OTHER_METHODS = ("roi_heads.", "proposal_generator.", "decode_head.", "model.diffusion_model.", "first_stage_model.")


def is_model(state: Mapping[str, Any]) -> bool:
    """Check whether tensors are one whole model in a layout that can be read."""
    return is_token_encoder(state) or any(layout.matches(state) for layout in LAYOUTS)


def is_other_method(state: Mapping[str, Any]) -> bool:
    """Check whether tensors are a detector, a segmenter or a latent diffusion, whose parts are not read."""
    return any(key.startswith(_OTHER_METHODS) for key in state)


def describe_tensors(state: Mapping[str, Any]) -> str:
    """Say what a state dict looks like, for example 'this is a MAGE checkpoint: pass it as predictor='."""
    for prefix in ("", *dict.fromkeys(key.split(".")[0] + "." for key in state)):
        below = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for matches, description in _DESCRIPTIONS:
            if matches(below):
                return f"under '{prefix}' this is {description}" if prefix else f"this is {description}"
    names = ", ".join(list(state)[:4])
    return f"unknown content ({len(state)} entries such as {names})" if state else "there are no tensors in it"
