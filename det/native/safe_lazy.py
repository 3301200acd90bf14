"""Reading LazyConfigs that were saved as YAML without running code that they name.

A LazyConfig calls whatever its `_target_` keys name. Here only classes and functions that build detectors are called:
those of detectron2's models, layers and transforms, torch's modules, and ours.
"""

from dataclasses import asdict
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from addp_core.base.errors import UserError
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.cnn import CnnArchitecture, CnnConfig, CnnEncoder
from addp_core.networks.encoder import Encoder, EncoderArchitecture, EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.networks.tokenizer import TokenizerConfig, Vocabulary
from addp_core.weights.encoders import load_encoder
from addp_core.weights.files import first_line
from addp_core.weights.fitting import AnyArchitecture

ALLOWED = (  # the modules that define what may be called
    "detectron2.modeling.",
    "detectron2.layers.",
    "detectron2.data.transforms.",
    "torch.nn.modules.",
    "fvcore.transforms.",
    "addp_core.networks.",
    "det.native.",
)
PACKAGES = {name.split(".")[0] for name in ALLOWED}  # nothing else is imported


class _Loader(yaml.SafeLoader):
    """YAML without objects, but with the tuples and shapes that detectron2 writes."""


_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)
_Loader.add_constructor(
    "tag:yaml.org,2002:python/object:detectron2.layers.shape_spec.ShapeSpec",
    lambda loader, node: ShapeSpec(**loader.construct_mapping(node, deep=True)),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config that detectron2 wrote. Raises UserError if it is missing, no mapping, or holds objects."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected the config that detectron2 wrote"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a config of plain values ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: found a {type(values).__name__}, expected a config of detectron2")
    return values


def replace_encoder(node: Any, architecture: AnyArchitecture) -> Any:
    """Return the config of a model in which the encoder is built from its architecture, and not read from a file."""
    if isinstance(node, dict):
        if "_target_" in node and _find(node["_target_"]) in (load_encoder, Encoder, TokenEncoder, CnnEncoder):
            return lazy_encoder(architecture)
        return {key: replace_encoder(value, architecture) for key, value in node.items()}
    return [replace_encoder(value, architecture) for value in node] if isinstance(node, list) else node


def lazy_encoder(architecture: AnyArchitecture) -> dict[str, Any]:
    """Return the LazyConfig of an encoder, which needs no file."""
    if isinstance(architecture, CnnArchitecture):
        config = _call(CnnConfig, asdict(architecture.encoder))
        return _call(CnnEncoder, {"config": config, "image_size": list(architecture.image_size)})
    common = {
        "image_size": list(architecture.image_size),
        "attention": _call(AttentionConfig, asdict(architecture.attention)),
        "dynamic": True,
    }
    if isinstance(architecture, EncoderArchitecture):
        config = _call(EncoderConfig, asdict(architecture.encoder))
        return _call(Encoder, {"config": config, "patch_size": architecture.patch_size, **common})
    tokenizer = asdict(architecture.tokenizer) | {"multipliers": list(architecture.tokenizer.multipliers)}
    parts = {
        "config": _call(PredictorConfig, asdict(architecture.predictor)),
        "vocabulary": _call(Vocabulary, asdict(architecture.vocabulary)),
        "tokenizer": _call(TokenizerConfig, tokenizer),
        "mean": list(architecture.mean),
        "std": list(architecture.std),
    }
    return _call(TokenEncoder, parts | common)


def _call(target: type, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": f"{target.__module__}.{target.__qualname__}", **arguments}


def build_lazy(path: Path, values: dict[str, Any], key: str) -> Any:
    """Build what a config has under `key`. Raises UserError if it calls anything but the parts of a detector."""
    root = OmegaConf.create(values)
    node = OmegaConf.select(root, key)
    try:
        plain = OmegaConf.to_container(node, resolve=True)
        _check_targets(path, plain)
        return instantiate(node)
    except (OmegaConfBaseException, TypeError, ValueError, AssertionError, ImportError) as error:
        raise UserError(f"{path}: {key} cannot be built ({first_line(error)})") from error


def _check_targets(path: Path, node: Any) -> None:
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        _check_targets(path, value)
    if not isinstance(node, dict) or "_target_" not in node:
        return
    target = _find(node["_target_"])
    home = f"{getattr(target, '__module__', '')}."
    if not callable(target) or not home.startswith(ALLOWED):
        raise UserError(
            f"{path}: refused to call {node['_target_']}, which is no part of a detector; expected detectron2's models "
            "and our encoder; write a config without it, or evaluate with detectron2's own script"
        )


def _find(name: Any) -> Any:
    """Return what a `_target_` names, by any of its names; None if it is outside of the allowed packages."""
    return locate(name) if isinstance(name, str) and name.split(".")[0] in PACKAGES else None
