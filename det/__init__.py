"""Detection: ViTDet Mask R-CNN on COCO, on detectron2 where it is installed and on torchvision everywhere.

    from det import add_encoder_config

For users of detectron2, this module re-exports what registers the encoder there; it needs detectron2 on first use.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {  # name: the module of this package that defines it
    "add_encoder_config": "native.config",
    "EncoderBackbone": "native.backbone",
    "EncoderFPN": "native.stages",
    "EncoderPyramid": "native.pyramid",
    "EncoderStages": "native.stages",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: a plain install has no detectron2."""
    if name in _EXPORTS:
        return getattr(import_module(f"det.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'det' has no attribute {name!r}")
