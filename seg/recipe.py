"""The keys of the verbs of segmentation, except for those of `addp seg probe`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Le

from addp_core.base.paths import DatasetPath, FilePath
from addp_core.networks.config import SIZES_HELP
from addp_core.training.precision import PrecisionChoice
from addp_core.training.submission import LaunchChoice, SlurmConfig
from addp_core.training.tracker_backends import PROJECT, TrackerName
from addp_core.weights.config import EncoderKeys


@dataclass
class SceneFiles:
    """The dataset."""

    __shorthand__ = "source"

    source: Annotated[
        DatasetPath,
        "ADE20K's folder (ADEChallengeData2016), with training/ and validation/ in images/ and in annotations/",
    ]
    classes: Annotated[
        FilePath, "table of the classes; by default objectInfo150.txt or objectInfo.txt in the dataset's folder"
    ] = ""
    workers: Annotated[
        int | None, Ge(0), "data loading processes; by default one, or with a GPU one for each CPU core"
    ] = None
    check: Annotated[
        int,
        Ge(0),
        "number of training pairs, evenly spaced, that are read before training to check them (and further ones, until "
        "two classes have been found); those of validation are all read. In `addp seg test`, the number of pairs of "
        "validation",
    ] = 1000


@dataclass
class SceneConfig(SceneFiles):
    """The dataset, and the sizes of its images."""

    crop: Annotated[int | None, Ge(16), "side of the crops in pixels; null: the config's"] = None
    scale: Annotated[
        tuple[int, int] | None,
        "shorter and longest side of resized images, in training times a random factor; null: the config's",
    ] = None


@dataclass
class TrainScenes(SceneConfig):
    """The dataset, the sizes of its images, and how training varies them."""

    jitter: Annotated[
        tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]], "range of the random factor on `scale` in training"
    ] = (0.5, 2.0)
    flip: Annotated[bool, "mirror training images horizontally with probability 1/2"] = True

    def __post_init__(self) -> None:
        if self.jitter[0] > self.jitter[1]:
            raise ValueError(f"jitter: found {list(self.jitter)}, expected the smaller factor first")


@dataclass
class InferenceConfig:
    """How class maps are predicted for whole images."""

    mode: Annotated[
        Literal["slide", "whole"],
        "slide: average over crops that overlap by a third; whole: the resized image at once",
    ] = "slide"


@dataclass
class AugmentedInferenceConfig(InferenceConfig):
    """How class maps are predicted for whole images, with test-time augmentation."""

    flip: Annotated[bool, "average with the prediction for the mirrored image"] = False
    scales: Annotated[
        tuple[Annotated[float, Gt(0)], ...], "factors on the image size whose predictions are averaged"
    ] = (1.0,)


@dataclass
class TrainConfig:
    """Length, optimization and logging of the training; null stands for the config's value."""

    steps: Annotated[int | None, Ge(1), "number of optimizer steps"] = None
    batch: Annotated[int | None, Ge(2), "images in a step, over all processes"] = None
    accumulate: Annotated[int, Ge(1), "parts in which each step's images are processed, to save memory"] = 1
    lr: Annotated[float | None, Gt(0), "peak learning rate of the heads"] = None
    warmup_steps: Annotated[int | None, Ge(0), "steps over which the learning rate rises from 0"] = None
    weight_decay: Annotated[float | None, Ge(0), "weight decay; 0 for biases, norms and positions"] = None
    layer_decay: Annotated[
        float | None, Gt(0), Le(1), "factor on the learning rate from each block to the one below"
    ] = None
    drop_path: Annotated[float | None, Interval(ge=0, lt=1), "stochastic depth of the last block"] = None
    clip_grad: Annotated[float | None, Gt(0), "maximum norm of the gradient; null: no clipping"] = None
    precision: PrecisionChoice = "auto"
    checkpointing: Annotated[bool, "compute the blocks twice to save memory (does not change results)"] = False
    seed: Annotated[int, Ge(0), "random seed"] = 0
    log_every: Annotated[int, Ge(1), "steps between two lines of metrics"] = 50
    trackers: Annotated[
        tuple[TrackerName, ...],
        "where metrics and recipe are logged besides metrics.jsonl: tensorboard (<out>/tb), wandb, mlflow, trackio",
    ] = ("tensorboard",)
    tracker_project: Annotated[
        str,
        "project of the run in wandb and trackio, experiment in mlflow; their environment variables come first",
    ] = PROJECT
    evaluate_every: Annotated[int | None, Ge(1), "steps between evaluations; the last step is always evaluated"] = None
    checkpoint_every: Annotated[
        int | None,
        Ge(0),
        "steps between checkpoints; 0: only before evaluations, after a signal, if a scene cannot be read, and at the "
        "end",
    ] = None
    keep: Annotated[int, Ge(1), "number of checkpoints to keep"] = 2


@dataclass(kw_only=True)
class TrainRecipe(EncoderKeys):
    """Keys of `addp seg train`."""

    out: Annotated[str, "run folder"]
    data: TrainScenes
    config: Annotated[str, "a config of seg/configs, without .py"] = "upernet_addp-b_80k_ade20k-512x512"
    model: Annotated[
        FilePath,
        "checkpoint: a run folder, a file (ADDP, classifier, MAE, BEiT, MAGE, ViT or ResNet of timm) or "
        f"hf://owner/repository/file; with init=random also a size, {SIZES_HELP}, a CNN of timm such as resnet50, or "
        "empty for the config's",
    ] = ""
    patch_size: Annotated[int | None, Ge(1), "pixels, if `model` is a size or empty (default: the config's)"] = None
    relative: Annotated[
        Literal["table", "none"] | None,
        "table: BEiT's relative positions in each block; none: the plain ViT",
    ] = None
    class_token: Annotated[
        bool | None,
        "keep the class token in attention (with three more entries in each table), as in the segmentation of BEiT and "
        "MAE; null: yes, unless `out` holds a run with relative positions from before this key",
    ] = None
    out_indices: Annotated[
        list[int] | None,
        "the blocks whose feature maps are used, four or one; null: those at 1/3, 1/2, 2/3 and all of the depth, or "
        "the four stages of a CNN",
    ] = None
    channels: Annotated[int | None, Ge(1), "channels of the UperNet head"] = None
    train: TrainConfig = field(default_factory=TrainConfig)
    test: InferenceConfig = field(default_factory=InferenceConfig)
    launch: LaunchChoice = "local"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class TestRecipe:
    """Keys of `addp seg test`."""

    out: Annotated[str, "folder for metrics.json"]
    data: SceneConfig
    model: Annotated[str, "a run of `addp seg train` or its model.safetensors"] = ""
    predictions: Annotated[
        str, "instead of a model: a folder of class maps, with the annotations' relative paths and labels"
    ] = ""
    test: AugmentedInferenceConfig = field(default_factory=AugmentedInferenceConfig)
    precision: PrecisionChoice = "auto"
    maps: Annotated[
        bool, "also write the class maps to <out>/maps, with the annotations' relative paths and labels"
    ] = False


@dataclass
class PredictRecipe:
    """Keys of `addp seg predict`."""

    model: Annotated[str, "a run of `addp seg train` or its model.safetensors"]
    images: Annotated[str, "an image or a folder of images, which may be nested"]
    out: Annotated[str, "folder for the results"]
    n: Annotated[int | None, Ge(1), "number of images, the first ones of the folder; null: all"] = None
    test: AugmentedInferenceConfig = field(default_factory=AugmentedInferenceConfig)
    paint: Annotated[float, Interval(ge=0, le=1), "opacity of the class colors over the image"] = 0.6
    precision: PrecisionChoice = "auto"


@dataclass
class CostRecipe:
    """Keys of `addp seg cost`."""

    config: Annotated[str, "a config of seg/configs, without .py"] = "upernet_addp-b_80k_ade20k-512x512"
    model: Annotated[str, "a size, a CNN of timm, or a file whose architecture is used; by default the config's"] = ""
    relative: Annotated[Literal["table", "none"] | None, "relative positions, as in `addp seg train`"] = None
    crop: Annotated[int | None, Ge(16), "side of the crops in pixels; null: the config's"] = None
    batch: Annotated[int, Ge(2), "crops in a training step"] = 2
    steps: Annotated[int, Ge(1), "number of timed steps, after one that is not timed"] = 3
    checkpointing: Annotated[bool, "compute the blocks twice to save memory"] = False
    precision: PrecisionChoice = "auto"
    json: Annotated[bool, "print JSON instead of text"] = False
