"""The keys of `addp seg probe`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt, MinLen

from addp_core.base.errors import UserError
from addp_core.networks.config import FeatureNorm
from addp_core.training.precision import PrecisionChoice
from addp_core.training.probe_keys import FeatureFolder, FeatureType, HeadDecay, HeadMomentum, SpacedBlocks
from addp_core.training.submission import LaunchChoice, SlurmConfig
from addp_core.weights.config import EncoderKeys
from seg.recipe import SceneFiles


@dataclass
class ProbeData(SceneFiles):
    """The dataset, and what is read of it."""

    size: Annotated[
        int, Ge(1), "side in pixels to which whole images are resized, as squares; a multiple of the patch size"
    ] = 224
    patches: Annotated[
        int | None,
        Ge(1),
        "labeled patches of each training image that are probed, drawn once for all runs; null: all",
    ] = None


@dataclass
class ProbeTraining:
    """How the linear heads are trained, and in which arithmetic the encoder computes its features."""

    lrs: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1), "learning rates to try, all at once"] = (
        *(0.001, 0.003, 0.01, 0.03),
        *(0.1, 0.3, 1.0, 3.0),
    )
    epochs: Annotated[int, Ge(1), "passes over the patches, with a cosine learning rate schedule"] = 10
    batch: Annotated[int, Ge(1), "patches of one step"] = 4096
    momentum: HeadMomentum = 0.9
    weight_decay: HeadDecay = 0.0
    held_out: Annotated[
        float,
        Ge(0),
        Lt(1),
        "fraction of the training images held out to choose the learning rate and the best block; 0: choose them on "
        "the validation images, which biases the result upwards",
    ] = 0.1
    seed: Annotated[int, Ge(0), "of the held-out images and of the order of the patches"] = 0
    precision: PrecisionChoice = "auto"

    def held_out_images(self, images: int) -> int:
        """Return how many of so many training images are held out. Raises UserError if that leaves none to train on."""
        count = max(1, round(self.held_out * images)) if self.held_out else 0
        if count >= images:
            raise UserError(
                f"train.held_out={self.held_out}: leaves none of the {images} labeled images to train on; expected a "
                "smaller share, more images, or 0"
            )
        return count


@dataclass(kw_only=True)
class Recipe(EncoderKeys):
    """Keys of `addp seg probe`."""

    out: Annotated[str, "run folder"]
    data: ProbeData
    mode: Annotated[
        Literal["linear", "knn", "both"], "linear: batch norm and a linear layer; knn: vote of the nearest patches"
    ] = "both"
    blocks: Annotated[
        tuple[int, ...],
        "blocks whose patch tokens are probed, counted from 1, or from the end as -1, -2, ...; empty: as `spaced` says",
    ] = ()
    spaced: SpacedBlocks = None
    norm: Annotated[
        FeatureNorm,
        "norm of each token before the batch norm; layer: a LayerNorm without parameters; pretrained: the encoder's "
        "own final norm (DINOv3's protocol)",
    ] = "none"
    k: Annotated[int, Ge(1), "neighbors that vote in the k-NN classifier"] = 30
    bank: Annotated[
        int | None, Ge(1), "patches among which neighbors are searched, drawn from the training patches; null: all"
    ] = 1_000_000
    train: ProbeTraining = field(default_factory=ProbeTraining)
    cache: FeatureFolder = ""
    store: FeatureType = "float16"
    shard: Annotated[int, Ge(1), "images in one file of features"] = 256
    eval_batch: Annotated[int, Ge(1), "images at a time when features are computed"] = 32
    maps: Annotated[bool, "also write each probe's class maps of the validation split to <out>/maps"] = False
    launch: LaunchChoice = "local"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    preview: Annotated[int, Ge(0), "validation images in images/predictions.png"] = 4

    def __post_init__(self) -> None:
        for key, values in (("blocks", self.blocks), ("train.lrs", self.train.lrs)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: found {list(values)}, expected each value once")

    @property
    def probes(self) -> tuple[str, ...]:
        """The probes of each block."""
        return ("linear", "knn") if self.mode == "both" else (self.mode,)
