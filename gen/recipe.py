"""The keys of the verbs of generation."""

from dataclasses import dataclass, field, fields
from itertools import product
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from addp_core.base.paths import FilePath
from addp_core.method.config import SampleConfig
from addp_core.networks.config import Normalisation
from addp_core.training.precision import Precision
from gen.report import REPORT_FILE

ModelSource = Annotated[
    str,
    "a run folder of `addp pretrain`, an ADDP file (ours or published), zoo:cifar10, or hf://owner/repository/file; or "
    "MAGE, a run of `addp predictor` or a published file",
]
TokenizerSource = Annotated[
    str, "tokenizer file, for a model file that does not include its tokenizer (MAGE's: default that of its run)"
]
EncoderHeads = Annotated[
    int | None, Ge(1), "encoder heads of a published file, if not those of published ViTs of its width"
]
DecoderHeads = Annotated[int | None, Ge(1), "decoder heads of a published file, where they are not 16"]
GeneratedAtOnce = Annotated[
    int, Gt(0), "images generated at a time by each process; rounded up on a CPU, where small images go together"
]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "box"]  # torchvision's names


@dataclass
class GenerateRecipe:
    """Keys of `addp generate`."""

    model: ModelSource
    out: Annotated[str, "folder for 000000.png, 000001.png, ... and grid.png"]
    n: Annotated[int, Ge(1), "number of images"] = 64
    seed: Annotated[int, "random seed; image i depends on it and on i alone"] = 0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    batch: GeneratedAtOnce = 16
    grid: Annotated[int, Ge(0), "number of images in grid.png, the first ones; 0 for no grid"] = 64
    precision: Precision = "fp32"
    compile: Annotated[
        bool, "torch.compile the networks, with one graph for all steps (compute only); it takes a minute at first"
    ] = False
    tokenizer: TokenizerSource = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None


Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass
class InpaintRecipe:
    """Keys of `addp inpaint`."""

    model: ModelSource
    image: Annotated[str, "image file to fill a part of"]
    out: Annotated[str, "folder for 000000.png, 000001.png, ..., grid.png, input.png and mask.png"]
    mask: Annotated[str, "image file of the same size; what is white is filled, what is black is kept"] = ""
    box: Annotated[Box | None, "left, top, right, bottom of a box to fill, in pixels; adds to the mask"] = None
    outside: Annotated[bool, "fill what lies outside of mask and box instead"] = False
    extend: Annotated[
        tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)], Annotated[int, Ge(0)], Annotated[int, Ge(0)]],
        "pixels to add and fill at the left, top, right and bottom, counted after `size` is applied",
    ] = (0, 0, 0, 0)
    size: Annotated[
        int | tuple[int, int] | None,
        "center-crop and resize the image to this first: one side, or [height, width]; null: leave it as it is",
    ] = None
    n: Annotated[int, Ge(1), "number of variations"] = 4
    seed: Annotated[int, "random seed; variation i depends on it and on i alone"] = 0
    blend: Annotated[int, Ge(0), "width in pixels, inside the hole, over which its seam is blended"] = 8
    sampling: SampleConfig = field(default_factory=SampleConfig)
    precision: Precision = "fp32"
    tokenizer: TokenizerSource = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None


FigureName = Literal[
    "steps", "training", "denoising", "ratios", "tokens", "metrics", "features", "attention", "neighbors"
]


@dataclass
class FiguresRecipe:
    """Keys of `addp figures`."""

    model: Annotated[str, "an ADDP checkpoint, or any other encoder (MAE, DINO, timm) for its own figures alone"]
    out: Annotated[str, "folder for the PNG files"]
    data: Annotated[
        str, "images for the figures of training and of the encoder: a folder, ImageNet root, .tar file or hub dataset"
    ] = ""
    split: Annotated[str, "split of `data`, if it has splits"] = "val"
    evaluation: Annotated[
        str, "for the figure of metrics: the `out` of an `addp evaluate` with several sweep.steps"
    ] = ""
    only: Annotated[tuple[FigureName, ...], "figures to draw; by default all that the other keys allow"] = ()
    n: Annotated[int, Ge(1), "number of images in a figure"] = 4
    columns: Annotated[int, Ge(2), "maximum number of steps or mask ratios in a figure"] = 8
    blocks: Annotated[list[int], "blocks of the encoder, from 1, or from the end if negative; empty: four"] = field(
        default_factory=list
    )
    pool: Annotated[int, Ge(2), "number of images among which neighbors are looked for"] = 500
    seed: Annotated[int, "random seed of generated images and masks"] = 0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    tokenizer: TokenizerSource = ""
    predictor: Annotated[
        str, "token predictor file, which the figures of training need if the model file does not include one"
    ] = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None
    normalisation: Annotated[Normalisation, "mean and std that the encoder expects: ImageNet's, or 0.5 (BEiT)"] = (
        "imagenet"
    )


@dataclass
class AppRecipe:
    """Keys of `addp app`."""

    model: Annotated[
        str,
        "a run folder of `addp pretrain`, an ADDP file or zoo:cifar10; any other encoder (MAE, DINO, timm) for its "
        "features alone; empty: show `runs` alone",
    ] = ""
    runs: Annotated[
        tuple[str, ...], "run folders, or folders of runs, whose curves and previews are shown while they grow"
    ] = ()
    data: Annotated[
        str, "images among which an uploaded image's neighbors are looked for: a folder, .tar file or hub dataset"
    ] = ""
    split: Annotated[str, "split of `data`, if it has splits"] = "val"
    pool: Annotated[int, Ge(1), "number of images of `data` among which neighbors are looked for"] = 500
    blocks: Annotated[
        list[int], "blocks whose features are shown, from 1, or from the end if negative; empty: four"
    ] = field(default_factory=list)
    host: Annotated[str, "address to serve on; 0.0.0.0 makes the page reachable from other machines"] = "127.0.0.1"
    port: Annotated[int, Interval(ge=1, le=65535), "port of the page"] = 7860
    max_n: Annotated[int, Ge(1), "maximum number of images at a time"] = 16
    max_steps: Annotated[int, Ge(1), "maximum number of sampling steps"] = 256
    max_megabytes: Annotated[int, Ge(1), "maximum file size of an uploaded image"] = 20
    max_pixels: Annotated[
        int, Ge(1), "maximum number of pixels of an uploaded image, which is then cropped to the model's size"
    ] = 40_000_000
    tokenizer: TokenizerSource = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None
    normalisation: Annotated[Normalisation, "mean and std that the encoder expects: ImageNet's, or 0.5 (BEiT)"] = (
        "imagenet"
    )


@dataclass
class Sweep:
    """Sampling settings to compare, in every combination; a setting without values is that of `sampling`."""

    steps: Annotated[tuple[Annotated[int, Ge(1)], ...], "as in steps=[4,8,20]"] = ()
    schedule: tuple[Literal["cosine", "linear"], ...] = ()
    temperature: tuple[Annotated[float, Ge(0)], ...] = ()
    top_p: tuple[Annotated[float, Interval(ge=0, le=1)], ...] = ()
    top_k: tuple[Annotated[int, Ge(0)], ...] = ()
    order: tuple[Literal["confidence", "halton"], ...] = ()
    pairwise: Annotated[
        bool, "the first value of each setting together, then the second ones, and so on, instead of every combination"
    ] = False

    def __post_init__(self) -> None:
        counts = {name: len(values) for name, values in self.values().items()}
        if self.pairwise and len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(f"pairwise: found {listed}, expected as many values of each setting")

    def values(self) -> dict[str, tuple[Any, ...]]:
        """Return the settings that have values."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pairwise"}
        return {name: values for name, values in settings.items() if values}

    def combinations(self) -> list[dict[str, Any]]:
        """Return the settings of each row."""
        values = self.values()
        rows = zip(*values.values(), strict=True) if self.pairwise and values else product(*values.values())
        return [dict(zip(values, row, strict=True)) for row in rows]


@dataclass
class EvaluateRecipe:
    """Keys of `addp evaluate`."""

    out: Annotated[str, f"folder for {REPORT_FILE} and, with `model`, for the generated images"]
    reference: Annotated[
        str,
        "images to compare with: a folder, ImageNet root, .tar file or hub dataset, center-cropped to the size of the "
        "generated images; or statistics: a folder of the cache, or an .npz file with mu and sigma",
    ]
    split: Annotated[str, "split of the reference, if it has splits"] = "val"
    reference_resize: Annotated[
        Interpolation, "interpolation that resizes the reference's images; published: bilinear"
    ] = "bilinear"
    images: Annotated[str, "folder of generated images, all of one size"] = ""
    model: Annotated[
        str,
        "instead of `images`: a run or file of ADDP or MAGE, from which missing images are generated into folders in "
        "`out`",
    ] = ""
    n: Annotated[int, Ge(1), "number of images to generate; published metrics use 50000"] = 50_000
    seed: Annotated[int, "random seed of the generated images"] = 0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    sweep: Sweep = field(default_factory=Sweep)
    inception: Annotated[FilePath, "file of torch-fidelity's Inception-v3 weights; empty: download it"] = ""
    extractor: Annotated[
        FilePath, "instead of Inception-v3: a run of `addp finetune` on labeled images, or its file"
    ] = ""
    prc_features: Annotated[
        Literal["extractor", "vgg16"],
        "features of precision and recall: those of FID (Inception's pool3, as in ADM's evaluator), or VGG16's "
        "(torch-fidelity's default)",
    ] = "extractor"
    vgg16: Annotated[FilePath, "file of torchvision's VGG16 weights, for prc_features=vgg16; empty: download it"] = ""
    is_splits: Annotated[int, Ge(1), "parts over which the score's mean and standard deviation are taken"] = 10
    kid_subset: Annotated[int, Ge(2), "images in each of KID's 100 subsets, or all images if there are fewer"] = 1000
    cache: Annotated[str, "folder that keeps the features of references"] = "~/.cache/addp/features"
    batch: GeneratedAtOnce = 16
    workers: Annotated[int, Ge(0), "data loading processes of each process"] = 2
    precision: Precision = "fp32"
    tokenizer: TokenizerSource = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None
