"""ViTDet in detectron2's own way: the encoder as registered backbones, LazyConfigs and a training program.

Importing anything of this package registers the backbones.
"""

from det.native.backbone import EncoderBackbone
from det.native.pyramid import EncoderPyramid
from det.native.stages import EncoderFPN, EncoderStages

__all__ = ["EncoderBackbone", "EncoderFPN", "EncoderPyramid", "EncoderStages"]
