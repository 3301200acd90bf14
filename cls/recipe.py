"""The keys of `addp finetune`, and one that `addp linprobe` shares."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval, Le, Lt

from addp_core.base.paths import DatasetPath
from addp_core.data.config import DataConfig
from addp_core.networks.config import Pooling
from addp_core.training.config import TrainConfig
from addp_core.training.submission import LaunchChoice, SlurmConfig
from addp_core.weights.config import EncoderKeys

EvaluationCrop: TypeAlias = Annotated[
    float | None,
    Gt(0),
    Le(1),
    "fraction of the shorter side that validation crops (default: 0.875 up to 224 px, 1 above)",
]
LabelShare: TypeAlias = Annotated[
    float,
    Gt(0),
    Le(1),
    "train on this share of the training images of each class, chosen by train.seed (usual few-label "
    "protocols: 0.01 and 0.1); 1: all",
]


@dataclass
class AugmentConfig:
    """timm's augmentation; the random crop and the mirror image are set in `data`."""

    auto: Annotated[str, "RandAugment or AutoAugment policy in timm's notation; empty: none"] = "rand-m9-mstd0.5-inc1"
    color_jitter: Annotated[float, Ge(0), "strength of color jitter, used if `auto` is empty"] = 0.0
    erase: Annotated[float, Interval(ge=0, le=1), "probability of random erasing"] = 0.25
    mixup: Annotated[float, Ge(0), "alpha of Mixup; 0: off"] = 0.8
    cutmix: Annotated[float, Ge(0), "alpha of CutMix; 0: off"] = 1.0
    mix_probability: Annotated[float, Interval(ge=0, le=1), "probability of mixing a batch"] = 1.0
    switch_probability: Annotated[
        float, Interval(ge=0, le=1), "probability of CutMix instead of Mixup, if both are on"
    ] = 0.5
    smoothing: Annotated[float, Ge(0), Lt(1), "label smoothing"] = 0.1
    repeats: Annotated[int, Ge(1), "times that each image appears in a row, each time with a new augmentation"] = 1

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(kw_only=True)
class FinetuneRecipe(EncoderKeys):
    """Keys of `addp finetune`."""

    out: Annotated[str, "run folder"]
    data: DataConfig = field(default_factory=partial(DataConfig, size=224, scale=(0.08, 1.0)))
    val: Annotated[DatasetPath, "images to validate on (default: the `val` split of `data`)"] = ""
    val_share: Annotated[
        float, Ge(0), Lt(1), "hold out this share of the training images of each class for validation; 0: none"
    ] = 0.0
    label_share: LabelShare = 1.0
    pooling: Annotated[Pooling, "input of the head: the mean of the patch tokens, or the class token"] = "avg"
    drop_path: Annotated[
        float, Interval(ge=0, lt=1), "stochastic depth rate of the last block, increasing linearly from 0"
    ] = 0.1
    dropout: Annotated[float, Interval(ge=0, lt=1), "dropout in attention and MLP"] = 0.0
    checkpointing: Annotated[
        bool, "recompute activations in the backward pass to save memory (gradient checkpointing; compute only)"
    ] = False
    loss: Annotated[Literal["ce", "bce"], "cross-entropy, or binary cross-entropy of each class"] = "ce"
    bce_threshold: Annotated[
        float | None, Gt(0), Le(1), "loss=bce: mixed targets above this value count as 1 (default: unchanged targets)"
    ] = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(
        default_factory=partial(
            TrainConfig,
            batch=1024,
            betas=(0.9, 0.999),
            base_lr=1e-3,
            min_lr=1e-6,
            layer_decay=0.65,
            warmup_epochs=5.0,
            clip_grad=None,
        )
    )
    eval_crop: EvaluationCrop = None
    eval_batch: Annotated[int, Ge(1), "images at a time on each process, in validation"] = 64
    confusion: Annotated[bool, "write confusion.csv and images/confusion.png at each validation"] = False
    launch: LaunchChoice = "local"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
