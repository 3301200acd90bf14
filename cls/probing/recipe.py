"""The keys of `addp linprobe`."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt, MinLen

from addp_core.base.paths import DatasetPath
from addp_core.data.config import DataConfig
from addp_core.networks.config import FeatureNorm, Pooling
from addp_core.training.config import TrainConfig
from addp_core.training.probe_keys import FeatureFolder, FeatureType, HeadTraining, SpacedBlocks
from addp_core.training.submission import LaunchChoice, SlurmConfig
from addp_core.weights.config import EncoderKeys
from cls.recipe import EvaluationCrop, LabelShare


@dataclass
class FastConfig(HeadTraining):
    """For mode=fast: features computed once per image, then linear heads trained with many learning rates."""

    blocks: Annotated[
        tuple[int, ...],
        "blocks whose features are probed, counted from 1, or from the end as -1, -2, ...; empty: as `spaced` says",
    ] = ()
    spaced: SpacedBlocks = None
    poolings: Annotated[
        tuple[Pooling, ...], MinLen(1), "features to probe: mean of the patch tokens, class token, or both"
    ] = ("avg",)
    mirrored: Annotated[bool, "train on the features of the mirror images too"] = False
    lrs: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1), "learning rates to try"] = (
        *(0.0003, 0.001, 0.003, 0.01),
        *(0.03, 0.1, 0.3, 1.0, 3.0),
    )
    held_out: Annotated[
        float,
        Ge(0),
        Lt(1),
        "fraction of the training images held out to choose the learning rate; 0: choose it on the validation images, "
        "which biases the result upwards",
    ] = 0.1
    knn: Annotated[int, Ge(0), "neighbors of the k-NN classifier; 0: no k-NN"] = 20
    cache: FeatureFolder = ""
    store: FeatureType = "float16"
    shard: Annotated[int, Ge(1), "images in one file of features"] = 4096

    def __post_init__(self) -> None:
        for key in ("blocks", "poolings", "lrs"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: found {list(values)}, expected each value once")


@dataclass(kw_only=True)
class Recipe(EncoderKeys):
    """Keys of `addp linprobe`."""

    out: Annotated[str, "run folder"]
    data: DataConfig = field(default_factory=partial(DataConfig, scale=(0.08, 1.0)))
    val: Annotated[DatasetPath, "images to validate on (default: the `val` split of `data`)"] = ""
    val_share: Annotated[
        float, Ge(0), Lt(1), "hold out this share of the training images of each class for validation; 0: none"
    ] = 0.0
    label_share: LabelShare = 1.0
    mode: Annotated[
        Literal["full", "fast"],
        "full: the published training of one head, as set in `train`; fast: features computed once and many heads, as "
        "set in `fast` (of `train`, only seed, precision, compile and channels_last are used)",
    ] = "full"
    pooling: Annotated[Pooling, "mode=full: input of the head: the mean of the patch tokens, or the class token"] = (
        "avg"
    )
    norm: Annotated[
        FeatureNorm,
        "norm of each image's feature before the batch norm; layer: a LayerNorm without parameters (MAE's protocol for "
        "pooling=avg, and MAGE's); pretrained: the encoder's own final norm, on its tokens (MAE's for pooling=token)",
    ] = "none"
    batch_norm: Annotated[
        int | None,
        Ge(2),
        "mode=full: images that the batch norm takes its statistics from in training, a divisor of train.batch "
        "(published: 512, those of one GPU; default: the whole batch)",
    ] = None
    block: Annotated[
        int, "mode=full: the block whose features are probed, counted from 1, or from the end as -1, -2, ..."
    ] = -1
    fast: FastConfig = field(default_factory=FastConfig)
    train: TrainConfig = field(
        default_factory=partial(
            TrainConfig,
            epochs=90.0,
            batch=1024,
            optimizer="lars",
            weight_decay=0.0,
            base_lr=0.1,
            warmup_epochs=10.0,
            clip_grad=None,
        )
    )
    eval_crop: EvaluationCrop = None
    eval_batch: Annotated[
        int, Ge(1), "images at a time on each process, in validation and when features are computed"
    ] = 64
    launch: LaunchChoice = "local"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        if self.train.parallel == "fsdp":
            raise ValueError("train.parallel: found fsdp, expected ddp: the head that is trained is small")
