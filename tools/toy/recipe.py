"""The keys of `addp toy`, and the random numbers of an image as a function of the seed, the dataset and a number."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Interval

if TYPE_CHECKING:
    import numpy as np

DatasetName = Literal["imagenet", "coco", "ade20k", "imagenet-a", "imagenet-r", "sketch", "imagenet-c"]


@dataclass
class Recipe:
    """Toy datasets of handwritten digits in the formats of the real ones."""

    out: Annotated[str, "output folder, with one folder for each dataset"]
    seed: Annotated[int, Ge(0), "the same seed gives the same files"] = 0
    only: Annotated[list[DatasetName], "datasets to make, as in only=[coco,ade20k]; all by default"] = field(
        default_factory=list
    )
    size: Annotated[int, Interval(ge=16, le=512), "side of the classification images in pixels"] = 64
    scene: Annotated[int, Interval(ge=48, le=1024), "shorter side of the scenes in coco and ade20k in pixels"] = 96
    imagenet_train: Annotated[int, Ge(10), "images in imagenet/train"] = 2000
    imagenet_val: Annotated[int, Ge(10), "images in imagenet/val"] = 500
    coco_train: Annotated[int, Ge(1), "training scenes in coco"] = 400
    coco_val: Annotated[int, Ge(1), "validation scenes in coco"] = 100
    coco_rle: Annotated[
        float, Interval(ge=0, le=1), "share of single objects whose mask is run-length encoded instead of polygons"
    ] = 0.1
    coco_names: Annotated[
        bool,
        "name the categories of coco as COCO's 80 (0 is a person, 5 a train), because detectron2's registered names of "
        "COCO accept no others",
    ] = False
    ade_train: Annotated[int, Ge(1), "training scenes in ade20k"] = 400
    ade_val: Annotated[int, Ge(1), "validation scenes in ade20k"] = 100
    variants: Annotated[int, Ge(6), "images in each of imagenet-a, imagenet-r and sketch"] = 200
    corrupted: Annotated[int, Ge(1), "images of each corruption and severity in imagenet-c"] = 30


def rng_for(recipe: Recipe, *parts: int | str) -> "np.random.Generator":
    """Return the generator of one image: it depends on the seed and on `parts` (dataset, split, number) alone."""
    # Imported late: they are slow to load, and `addp toy --help` does not need them.
    import numpy as np

    from addp_core.base.rng import seed_for

    return np.random.default_rng(seed_for(recipe.seed, "toy", *parts))
