"""ADDP (arXiv 2306.05423): pretrain once, then generate, recognize, detect and segment.

    from addp_core import load_addp, load_encoder, sample, inpaint

This module re-exports the public functions and classes of its subpackages.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {  # name: the module of this package that defines it
    "ADDP": "method.addp",
    "ADDPConfig": "method.addp",
    "Encoder": "networks.encoder",
    "MAGE": "method.mage",
    "inpaint": "method.sampler",
    "load_addp": "weights.loading",
    "load_classifier": "weights.loading",
    "load_encoder": "weights.encoders",
    "load_mage": "weights.mage",
    "load_predictor": "weights.loading",
    "load_tokenizer": "weights.loading",
    "sample": "method.sampler",
    "save_model": "weights.saving",
    "save_published": "weights.saving",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `addp --help` and errors in recipes do not wait for torch."""
    if name in _EXPORTS:
        return getattr(import_module(f"addp_core.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'addp_core' has no attribute {name!r}")
