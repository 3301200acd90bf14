"""Keys that the recipes of several probes have; without torch, which help and errors in recipes need not load."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from addp_core.base.paths import CachePath

SpacedBlocks = Annotated[
    int | None,
    Ge(1),
    "if `blocks` is empty: probe this many blocks, evenly spaced up to the last one, or all of a shallower encoder "
    "(default: all blocks)",
]
HeadMomentum = Annotated[float, Interval(ge=0, lt=1), "momentum of SGD"]
HeadDecay = Annotated[float, Ge(0), "weight decay of the heads' weights"]
FeatureFolder = Annotated[
    CachePath, "folder for the features, which several runs may share (default: the folder `features` in `out`)"
]
FeatureType = Annotated[Literal["float16", "float32"], "type that the features are stored in"]


@dataclass
class HeadTraining:
    """How linear heads on the features of whole images are trained."""

    epochs: Annotated[int, Ge(1), "passes over the features, with a cosine learning rate schedule"] = 50
    batch: Annotated[int, Ge(1), "images of one step"] = 256
    momentum: HeadMomentum = 0.9
    weight_decay: HeadDecay = 0.0
