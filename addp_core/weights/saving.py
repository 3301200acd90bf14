"""Writing models: our safetensors with the architecture in their metadata, and the published layout."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from addp_core.base.files import atomic_replace
from addp_core.method.addp import ADDP
from addp_core.networks.classifier import Classifier
from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.encoder import METADATA_KEY, TransformerEncoder
from addp_core.networks.predictor import TokenPredictor
from addp_core.networks.tokenizer import Tokenizer
from addp_core.weights.architectures import (
    ClassifierArchitecture,
    PredictorArchitecture,
    TokenizerArchitecture,
)
from addp_core.weights.entries import describe_modules
from addp_core.weights.files import MODULES_KEY, State
from addp_core.weights.layouts.published import to_published


def save_model(module: nn.Module, path: str | os.PathLike, grid: tuple[int, int] | None = None) -> None:
    """Write a model as one safetensors file with its architecture in the metadata.

    The file appears complete or not at all.

    Args:
        module: an ADDP, Tokenizer, TokenPredictor, Encoder, TokenEncoder, CnnEncoder or Classifier.
        path: the file to write.
        grid: the token grid (rows, columns) of a TokenPredictor, which does not store it.

    Raises:
        OSError: if the file cannot be written.
    """
    kind, architecture = _describe_module(module, grid)
    save_state(dict(module.state_dict()), path, kind, architecture)


def save_state(state: State, path: str | os.PathLike, kind: str, architecture: Any) -> None:
    """Write tensors as a safetensors file, with their kind and architecture (a dataclass) in the metadata.

    So are the architectures of modules that describe themselves in the metadata of a module's `state_dict()`. The file
    appears complete or not at all. Raises OSError if it cannot be written.
    """
    modules = {prefix: json.loads(description) for prefix, description in describe_modules(state).items()}
    text = json.dumps(
        {"kind": kind, "architecture": asdict(architecture)} | ({MODULES_KEY: modules} if modules else {})
    )
    tensors = {key: value.detach().to("cpu").contiguous() for key, value in state.items()}
    with atomic_replace(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: text})
        except SafetensorError as error:  # raised, for example, if the disk is full
            raise OSError(str(error)) from error


def save_published(model: ADDP, path: str | os.PathLike) -> None:
    """Write `{"model": ...}` with every tensor that the published implementation declares.

    Raises ValueError like `to_published`, and OSError if the file cannot be written.
    """
    text = json.dumps({"kind": "addp", "architecture": asdict(model.config)})
    content = {"model": to_published(model), METADATA_KEY: text}
    with atomic_replace(Path(path)) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def _describe_module(module: nn.Module, grid: tuple[int, int] | None) -> tuple[str, Any]:
    """Return (kind, architecture) of a model. Raises TypeError if it is of no kind that can be saved."""
    if isinstance(module, ADDP):
        return "addp", module.config if module.predictor else replace(module.config, predictor=None)
    if isinstance(module, Tokenizer):
        return "tokenizer", TokenizerArchitecture(module.config, module.grid)
    if isinstance(module, TokenPredictor):
        if grid is None:
            raise TypeError("save_model: missing grid=(rows, columns), which a TokenPredictor does not store")
        return "predictor", PredictorArchitecture(module.config, grid, module.vocabulary, module.trained_on)
    if isinstance(module, TransformerEncoder | CnnEncoder):
        return module.kind, module.architecture
    if isinstance(module, Classifier):
        _, encoder = _describe_module(module.encoder, None)
        return "classifier", ClassifierArchitecture(
            encoder,
            module.num_classes,
            module.pooling,
            module.norm,
            module.class_names,
            module.mean,
            module.std,
            module.crop,
            module.feature_norm,
        )
    expected = "ADDP, Tokenizer, TokenPredictor, Encoder, TokenEncoder, CnnEncoder or Classifier"
    raise TypeError(f"cannot save a {type(module).__name__}; expected {expected}")
