"""The keys of `addp tokenizer`, `addp tokenizer cache`, `addp predictor`, `addp pretrain` and `addp mae`."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from annotated_types import Ge, Interval, Lt, MultipleOf

from addp_core.base.paths import DatasetPath, FilePath
from addp_core.data.config import DataConfig, Interpolation
from addp_core.method.config import DenoiserConfig, ProcessConfig, check_ids_to
from addp_core.networks.config import MaeConfig, PredictorConfig, TokenizerConfig, Vocabulary
from addp_core.training.config import TrainConfig
from addp_core.training.submission import LaunchChoice, SlurmConfig


@dataclass
class EvaluationConfig:
    """Evaluation every `train.evaluate_every` steps and at the end, on images that are not trained on."""

    __shorthand__ = "data"
    data: Annotated[
        DatasetPath,
        "labeled images to evaluate on, of which the `val` split is taken if there is one; empty: those of `held_out`",
    ] = ""
    held_out: Annotated[
        float,
        Ge(0),
        Lt(1),
        "share of the images of `data`, of each class, that are not trained on but evaluated; 0: none",
    ] = 0.0
    images: Annotated[int, Ge(16), "evaluate on this many images at most, kept in memory"] = 2000
    classes: Annotated[int, Ge(2), "of at most this many classes, equally many of each"] = 100
    knn: Annotated[int, Ge(0), "neighbors of the k-NN classifier on the encoder's features; 0: no k-NN"] = 20
    probe: Annotated[bool, "train a linear probe on the encoder's features"] = True
    samples: Annotated[
        int,
        Ge(0),
        "images to generate or reconstruct, and compare with as many real ones by Frechet distance, precision and "
        "recall; 0: none",
    ] = 256
    inception: Annotated[
        FilePath,
        "file of torch-fidelity's Inception-v3 weights, whose features are compared; empty: where torch keeps "
        "downloads, or, without them, a small CNN of random weights (nothing is downloaded)",
    ] = ""
    extractor: Annotated[FilePath, "a run of `addp finetune` whose features are compared instead"] = ""
    batch: Annotated[int, Ge(1), "images at a time on each process"] = 64

    def __post_init__(self) -> None:
        if self.data and self.held_out:
            raise ValueError(f"held_out: found {self.held_out} beside data={self.data}; expected one of the two")


@dataclass
class LossConfig:
    """Terms of the loss, and how the codebook follows the encoder."""

    l1: Annotated[float, Ge(0), "weight of the mean absolute error"] = 1.0
    l2: Annotated[float, Ge(0), "weight of the mean squared error"] = 0.0
    commitment: Annotated[float, Ge(0), "weight of the squared distance from encoder outputs to their codes (beta)"] = (
        0.25
    )
    codebook_decay: Annotated[float, Interval(ge=0, lt=1), "decay of the codes' moving averages, per step"] = 0.99
    revive_after: Annotated[
        int | None, Ge(1), "steps until an unused code is moved to an encoder output; null: never"
    ] = 100
    perceptual_weights: Annotated[
        FilePath, "local file of torchvision's vgg16 state dict; empty: no perceptual term"
    ] = ""
    perceptual: Annotated[float, Ge(0), "weight of the perceptual term"] = 0.1
    perceptual_depth: Annotated[int, Interval(ge=1, le=5), "VGG blocks whose features are compared"] = 5
    adversarial: Annotated[float, Ge(0), "weight of the adversarial term; 0: no discriminator"] = 0.0
    adversarial_start: Annotated[int, Ge(0), "step from which the discriminator is trained and used"] = 0
    adversarial_balance: Annotated[
        Literal["fixed", "adaptive"],
        "adaptive: scale the weight by the ratio of the other terms' gradient to the adversarial term's at the last "
        "layer (VQGAN, Eq. 7)",
    ] = "fixed"
    discriminator_width: Annotated[int, Ge(32), MultipleOf(32), "channels of the discriminator's first layer"] = 64
    discriminator_layers: Annotated[int, Ge(1), "layers after the first; all of these but one halve the image"] = 3

    def __post_init__(self) -> None:
        if not (self.l1 or self.l2 or (self.perceptual and self.perceptual_weights)):
            raise ValueError(
                "l1: found 0, and no other term compares images; expected one of l1, l2, perceptual above 0"
            )


def _train_defaults() -> TrainConfig:
    return TrainConfig(betas=(0.9, 0.99), weight_decay=0.0, clip_grad=1.0)


@dataclass
class TokenizerRecipe:
    """Keys of `addp tokenizer`."""

    out: Annotated[str, "run folder"]
    data: DataConfig = field(default_factory=DataConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: TrainConfig = field(default_factory=_train_defaults)
    launch: LaunchChoice = "local"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        if self.train.compile and self.loss.adversarial and self.loss.adversarial_balance == "adaptive":
            raise ValueError("train.compile: found true, expected false with loss.adversarial_balance=adaptive")


@dataclass
class TransformerTraining(TrainConfig):
    """The section `train` of the stages that train transformers."""

    checkpointing: Annotated[
        bool,
        "recompute the activations of each block in the backward pass to save memory (gradient checkpointing; compute "
        "only)",
    ] = False


@dataclass
class TokenCacheRecipe:
    """Keys of `addp tokenizer cache`."""

    model: Annotated[FilePath, "a run of `addp tokenizer`, a VQGAN file, or hf://owner/repository/file"]
    out: Annotated[str, "folder of the cache, for `data.tokens`"]
    data: DataConfig = field(default_factory=DataConfig)
    crops: Annotated[int, Ge(1), "random crops of each image; each epoch shows one of them"] = 8
    seed: Annotated[int, Ge(0), "of the crops; those of a run with the same train.seed"] = 0
    interpolation: Annotated[Interpolation, "how crops are resized, as in `addp predictor`"] = "bicubic"
    batch: Annotated[int, Ge(1), "images at a time on each process"] = 64
    rows_per_file: Annotated[int, Ge(1), "crops in one file, after each of which the command can be continued"] = 16384

    def __post_init__(self) -> None:
        if self.rows_per_file % self.batch:
            raise ValueError(f"rows_per_file: found {self.rows_per_file}, expected a multiple of batch={self.batch}")


@dataclass
class TokenData(DataConfig):
    """Which images to use, how to crop them and how to load them, or where the ids of their crops are."""

    tokens: Annotated[
        FilePath,
        "folder of `addp tokenizer cache`: the ids of these images' crops, which are then neither decoded nor "
        "tokenized; empty: all crops are new",
    ] = ""

    def without_tokens(self) -> DataConfig:
        """Return the same images for a stage that needs their pixels."""
        return DataConfig(**{key.name: getattr(self, key.name) for key in fields(DataConfig)})


@dataclass
class MaskingConfig:
    """MAGE's masking and loss: mask ratios from a truncated normal distribution, and label smoothing."""

    ratio_mean: Annotated[float, Interval(gt=0, lt=1), "peak of the truncated normal of mask ratios"] = 0.55
    ratio_std: Annotated[float, Interval(gt=0), "standard deviation of the normal before truncation"] = 0.25
    ratio_min: Annotated[
        float, Interval(ge=0, lt=1), "smallest ratio; this share of positions is dropped from the encoder's input"
    ] = 0.5
    ratio_max: Annotated[float, Interval(gt=0, le=1), "largest ratio"] = 1.0
    label_smoothing: Annotated[float, Interval(ge=0, lt=1), "over all ids of `loss_over`"] = 0.1
    loss_over: Annotated[
        Literal["vocabulary", "codebook"],
        "ids among which the loss expects the answer: all, or only those that can occur, as in MAGE's later version",
    ] = "vocabulary"

    def __post_init__(self) -> None:
        if self.ratio_min >= self.ratio_max:
            raise ValueError(f"ratio_min: found {self.ratio_min}, expected less than ratio_max = {self.ratio_max}")


@dataclass
class PredictorRecipe:
    """Keys of `addp predictor`."""

    out: Annotated[str, "run folder"]
    tokenizer: Annotated[
        FilePath, "trained tokenizer: a run of `addp tokenizer`, a VQGAN file, or hf://owner/repository/file"
    ]
    data: TokenData = field(default_factory=TokenData)
    model: PredictorConfig = field(default_factory=PredictorConfig)
    init: Annotated[
        FilePath,
        "MAGE file or run to start from; positions are resampled to `data.size` (default: random weights)",
    ] = ""
    unused_ids: Annotated[
        int,
        Ge(1),
        "ids besides those of the codebook and the mask id; one of them is the class slot. Published: 1000 (MaskGIT's "
        "classes). They are never the right answer, which a small network needs thousands of steps to learn unless "
        "masking.loss_over=codebook leaves them out",
    ] = Vocabulary.unused
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    draw: Annotated[
        Literal["batch", "process"],
        "one mask ratio for the whole batch (the same numbers for any number of processes), "
        "or one for each process (as MAGE)",
    ] = "batch"
    interpolation: Annotated[Interpolation, "how crops are resized; bilinear in MAGE"] = "bicubic"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: TransformerTraining = field(default_factory=TransformerTraining)
    launch: LaunchChoice = "local"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class PretrainRecipe:
    """Keys of `addp pretrain`."""

    out: Annotated[str, "run folder"]
    data: TokenData = field(default_factory=TokenData)
    tokenizer: Annotated[FilePath, "a run of `addp tokenizer`, a VQGAN file, or hf://owner/repository/file"] = ""
    predictor: Annotated[FilePath, "a run of `addp predictor`, a MAGE file, or hf://owner/repository/file"] = ""
    stages: Annotated[
        FilePath,
        "how to train the tokenizer and predictor if they are not given: the name of a recipe that `addp tokenizer` "
        "and `addp predictor` both have, or a folder with tokenizer.yaml and predictor.yaml",
    ] = ""
    predictor_heads: Annotated[int | None, Ge(1), "for a MAGE file whose heads are not width/64"] = None
    predictor_decoder_heads: Annotated[int | None, Ge(1), "for a MAGE file whose decoder heads are not 16"] = None
    model: DenoiserConfig = field(default_factory=DenoiserConfig)
    init: Annotated[
        FilePath,
        "ADDP file or run whose encoder and decoder to start from, as zoo:cifar10; positions are resampled to "
        "`data.size` (default: random weights)",
    ] = ""
    process: ProcessConfig = field(default_factory=ProcessConfig)
    draw: Annotated[
        Literal["batch", "process"],
        "one mask ratio for the whole batch (the same numbers for any number of processes), "
        "or one for each process (as published)",
    ] = "batch"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: TransformerTraining = field(default_factory=TransformerTraining)
    launch: LaunchChoice = "local"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        check_ids_to(self.model, self.process)
        if self.data.tokens and self.process.natural_share:
            raise ValueError(
                f"process.natural_share: found {self.process.natural_share} with data.tokens, which holds no pixels; "
                "expected 0, or images as data"
            )
        if self.data.tokens and not self.tokenizer:
            raise ValueError("tokenizer: found none; expected the one that computed the ids of data.tokens")


@dataclass
class MaeRecipe:
    """Keys of `addp mae`."""

    out: Annotated[str, "run folder"]
    data: DataConfig = field(default_factory=DataConfig)
    model: MaeConfig = field(default_factory=MaeConfig)
    mask_ratio: Annotated[float, Interval(gt=0, lt=1), "share of the patches that the encoder does not see"] = 0.75
    norm_pix_loss: Annotated[
        bool, "normalize each patch of the target by its own mean and variance (published: better features)"
    ] = True
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: TransformerTraining = field(default_factory=TransformerTraining)
    launch: LaunchChoice = "local"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
