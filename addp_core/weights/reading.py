"""Reading any supported file as tensors under our names, with the kind of model and its architecture."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from addp_core.base.errors import UserError
from addp_core.method.addp import ADDPConfig
from addp_core.networks.cnn import CnnEncoder
from addp_core.weights.architectures import (
    PredictorArchitecture,
    TokenizerArchitecture,
    check_stored_heads,
    parse_architecture,
    with_own_norm,
)
from addp_core.weights.assumptions import Assumption, Hints, settle
from addp_core.weights.entries import select_prefix
from addp_core.weights.files import MODULES_KEY, FileContent, Source, State, read_file, strip_prefix
from addp_core.weights.layouts.published import from_published, is_published_addp
from addp_core.weights.layouts.registry import LAYOUTS, describe_tensors, is_model, is_other_method
from addp_core.weights.stated import STATED_KIND, stated_by_training


@dataclass(frozen=True)
class Weights:
    """The tensors of a file under our names, the kind of model (a key of `ARCHITECTURES`) and its architecture."""

    source: str  # names the file in error messages
    kind: str
    state: State
    architecture: Any
    stored: bool = False  # whether the file stores the architecture, which is otherwise read off the shapes
    assumptions: tuple[Assumption, ...] = ()

    def settle(self, used: Iterable[str], demanded: Iterable[str] = (), fixed: Iterable[str] = ()) -> None:
        """Say what was assumed about the facts `used`. Raises UserError if one of `demanded` is not known.

        fixed: facts that the caller has no argument for.
        """
        settle(self.source, self.assumptions, used, demanded, fixed)

    def assumes(self, key: str) -> bool:
        """Check whether the fact of this key was assumed, because the file does not tell it."""
        return any(assumption.key == key for assumption in self.assumptions)

    def part(self, prefix: str) -> State:
        """Return the tensors whose names begin with `prefix`, without it."""
        return strip_prefix(self.state, prefix)


def read_weights(
    source: Source,
    preferred_kind: str | None = None,
    heads: Mapping[str, int] | None = None,
    image_size: tuple[int, int] | None = None,
    wanted: str = "",
    encoder_only: bool = False,
) -> Weights:
    """Read any supported file.

    The architecture is the one that the file stores, otherwise it is inferred from shapes; what shapes do not tell is
    assumed, and `Weights.settle` says so.

    Args:
        source: a path, a run folder, "hf://owner/repository[/file]", or a state dict.
        preferred_kind: the kind to read if the file holds several, such as "tokenizer" for a MAGE file with its VQGAN.
        heads: numbers of attention heads, which shapes do not tell, by the keys of `HEAD_KEYS`.
        image_size: (height, width) in pixels that the caller asks for, which tells apart the grids that fit a file.
        wanted: the name of the model, if the file holds several: an entry, part of a prefix, or "ema".
        encoder_only: read only the encoder of a detector or segmentor of ours.

    Raises:
        UserError: if the file is missing, damaged, unsafe to read, or of another method; says what it looks like.
    """
    content = read_file(source, wanted)
    heads = heads or {}
    if content.description is not None:
        if content.wanted:
            raise UserError(f"weights={wanted}: {content.source} holds one model; leave the key out")
        if encoder_only and (modules := content.description.get(MODULES_KEY)):
            prefix, description = next(iter(modules.items()))
            return _read_module(content, prefix, description, heads)
        kind, architecture = parse_architecture(content.source, content.description)
        state = content.state
        if kind == "addp" and is_published_addp(state):
            state = from_published(state)
        check_stored_heads(content.source, architecture, heads)
        return Weights(content.source, kind, state, architecture, True, content.assumptions)
    state = content.state
    within = "backbone." if is_other_method(state) else ""
    prefix, left_out = select_prefix(content.source, state, content.wanted, is_model, content.entries, within)
    if prefix or not within:
        state = strip_prefix(state, prefix)
    described = {
        name.removeprefix(prefix): parse_architecture(content.source, description)
        for name, description in content.descriptions.items()
        if name.startswith(prefix)
    }
    kind, architecture = described.get("", ("", None))
    if kind and kind != STATED_KIND:
        check_stored_heads(content.source, architecture, heads)
        architecture = with_own_norm(architecture) if prefix else architecture  # trained inside of another model
        return Weights(content.source, kind, state, architecture, True, (*content.assumptions, *left_out))
    stated = stated_by_training(content.metadata, state, architecture)
    stated.check_heads(content.source, heads.get("encoder_heads"))
    modules = {name: module for name, (kind, module) in described.items() if kind == "encoder"}
    hints = Hints(heads, image_size, prefix, [*content.assumptions, *left_out], stated, modules)
    for layout in sorted(LAYOUTS, key=lambda layout: layout.kind != preferred_kind):
        if layout.matches(state):
            with as_user_error(content.source):
                converted, architecture = layout.convert(content.source, state, hints)
            assumptions = tuple(hints.assumptions)
            return Weights(content.source, layout.kind, converted, architecture, assumptions=assumptions)
    if cnns := _described_cnns(content):
        return _read_module(content, *cnns[0], heads)
    raise UserError(
        f"{content.source}: {describe_tensors(content.state)}; expected an ADDP, MAGE, VQGAN or ViT checkpoint"
    )


def _described_cnns(content: FileContent) -> list[tuple[str, Any]]:
    """Return prefix and description of the CNNs inside of another model, which their tensors' names do not tell."""
    found = content.descriptions.items()
    return [(prefix, text) for prefix, text in found if prefix and text.get("kind") == CnnEncoder.kind]


def _read_module(content: FileContent, prefix: str, description: Any, heads: Mapping[str, int]) -> Weights:
    """Return one module of a model that a transfer has trained."""
    kind, architecture = parse_architecture(content.source, description)
    check_stored_heads(content.source, architecture, heads)
    left_out = Assumption("weights", f"took the model under '{prefix}' and left out the other tensors")
    state = strip_prefix(content.state, prefix)
    return Weights(content.source, kind, state, with_own_norm(architecture), True, (*content.assumptions, left_out))


def read_part(source: Source, kind: str, heads: Mapping[str, int] | None = None) -> Weights:
    """Read a "tokenizer" or "predictor" from its own file or from an ADDP file. Raises UserError if there is none."""
    weights = read_weights(source, kind, heads)
    if weights.kind == kind:
        return weights
    if weights.kind == "addp" and (state := weights.part(f"{kind}.")):
        config: ADDPConfig = weights.architecture
        architecture: TokenizerArchitecture | PredictorArchitecture
        if kind == "tokenizer":
            architecture = TokenizerArchitecture(config.tokenizer, config.grid)
        else:
            assert config.predictor is not None  # the file has its tensors
            architecture = PredictorArchitecture(config.predictor, config.grid, config.vocabulary)
        return Weights(weights.source, kind, state, architecture, weights.stored, weights.assumptions)
    expected = {"tokenizer": "VQGAN", "predictor": "MAGE"}[kind]
    raise UserError(f"{kind}={weights.source}: {describe_kind(weights)}; expected a {expected} checkpoint")


def describe_kind(weights: Weights) -> str:
    """Say what a file is, for errors about a file of the wrong kind."""
    descriptions = {
        "addp": "this is an ADDP checkpoint",
        "predictor": "this is a MAGE checkpoint: pass it as predictor=",
        "tokenizer": "this is a VQGAN checkpoint: pass it as tokenizer=",
        "encoder": "this is the checkpoint of a ViT encoder (MAE, timm or exported): load_encoder reads it",
        "token_encoder": "this is the checkpoint of an encoder over token ids",
        "cnn_encoder": "this is the checkpoint of a convolutional encoder: load_encoder reads it",
        "classifier": "this is the checkpoint of a fine-tuned classifier",
    }
    return descriptions.get(weights.kind, f"this is the checkpoint of a {weights.kind}")


@contextlib.contextmanager
def as_user_error(source: str) -> Iterator[None]:
    """Turn the ValueError of an impossible architecture, such as heads that do not divide the width, into a UserError
    that names the source.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
