"""What the heads of a yacs config read: the levels of a backbone, and images of the right channels and scale."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode

from addp_core.weights.pretrained import NORMALISATION
from det.native.config import IMAGE_FORMAT, LEVELS

log = logging.getLogger("detectron2.addp")

READERS = {  # meta architecture: the nodes whose IN_FEATURES name what it reads of the backbone
    "GeneralizedRCNN": ("RPN", "ROI_HEADS"),
    "ProposalNetwork": ("RPN",),
    "RetinaNet": ("RETINANET",),
    "FCOS": ("FCOS",),
    "PanopticFPN": ("RPN", "ROI_HEADS", "SEM_SEG_HEAD"),
    "SemanticSegmentor": ("SEM_SEG_HEAD",),
}


def levels_read(cfg: CfgNode) -> dict[str, list[str]]:
    """Return the names of the maps that the heads of detectron2's own meta architectures read, by the key."""
    nodes = READERS.get(cfg.MODEL.META_ARCHITECTURE, ())
    return {f"MODEL.{node}.IN_FEATURES": list(cfg.MODEL[node].IN_FEATURES) for node in nodes if node in cfg.MODEL}


def levels_of(cfg: CfgNode) -> tuple[str, ...]:
    """Return the pyramid's levels if MODEL.ENCODER.levels does not name them: RetinaNet's, or p2 to p6."""
    return (
        tuple(levels_read(cfg)["MODEL.RETINANET.IN_FEATURES"]) if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else LEVELS
    )


def missing_levels(cfg: CfgNode, levels: Sequence[str]) -> str:
    """Return one line about the first head that reads a map which the backbone does not have; "" if there is none."""
    for key, names in levels_read(cfg).items():
        missing = [name for name in names if name not in levels]
        if missing:
            return (
                f"{key}: reads {', '.join(missing)}, but MODEL.BACKBONE.NAME={cfg.MODEL.BACKBONE.NAME} has "
                f"{', '.join(levels)}; expected one of these, or the config of a detector with FPN and EncoderPyramid"
            )
    return ""


def check_images(cfg: CfgNode) -> None:
    """Warn if the images reach the encoder in another form than in its pretraining."""
    known = [[255 * v for v in (*mean, *std)] for mean, std in NORMALISATION.values()]
    found = [*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD]
    if not any(all(abs(a - b) < 1 for a, b in zip(found, each, strict=True)) for each in known if len(found) == 6):
        log.warning(
            "MODEL.PIXEL_MEAN=%s, MODEL.PIXEL_STD=%s: encoders were pretrained on another mean and deviation; "
            "det.add_encoder_config(cfg), called before cfg.merge_from_file, sets them",
            *([round(float(v), 2) for v in part] for part in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)),
        )
    if cfg.INPUT.FORMAT != IMAGE_FORMAT:
        log.warning("INPUT.FORMAT=%s: encoders were pretrained on %s images", cfg.INPUT.FORMAT, IMAGE_FORMAT)
