"""`addp evaluate`: FID, Inception score, precision, recall and KID of generated images, one row for each setting.

The images come from a folder, or are generated from a model: with `sampling`, or with every combination in `sweep`.
The metrics equal torch-fidelity's on the same images. With `extractor`, the features are those of a classifier trained
with `addp finetune`; Frechet distance, score and kernel distance are then called FD, CS and KD, because FID, IS and KID
are defined on Inception's features.
"""

import logging
import shutil
import sys
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from accelerate import PartialState
from annotated_types import Ge, Gt, Interval

from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.files import TEMPORARY_PREFIX
from addp_core.data.images import ImageError
from addp_core.data.sources import ImageSource
from addp_core.method.sampler import SampleConfig
from addp_core.training.compute import Precision
from addp_core.training.processes import process_state
from gen import generate
from gen.extractors import Extractor, open_extractor
from gen.features import FeatureSet, extract_features, require_size
from gen.image_folder import open_images
from gen.metrics import check_image_count, frechet_distance, inception_score, kernel_distance, precision_recall
from gen.model import DecoderHeads, EncoderHeads, TokenizerSource, load_recipe_model
from gen.reference import Reference, digest_of_images, load_reference, open_reference
from gen.report import REPORT_FILE, format_report, write_report

log = logging.getLogger("addp")

ENOUGH_IMAGES = 10_000  # with fewer, FID is biased upwards


@dataclass
class Sweep:
    """Sampling settings to compare, in every combination; a setting without values is that of `sampling`."""

    steps: Annotated[tuple[Annotated[int, Ge(1)], ...], "as in steps=[4,8,20]"] = ()
    schedule: tuple[Literal["cosine", "linear"], ...] = ()
    temperature: tuple[Annotated[float, Ge(0)], ...] = ()
    top_p: tuple[Annotated[float, Interval(ge=0, le=1)], ...] = ()
    top_k: tuple[Annotated[int, Ge(0)], ...] = ()
    order: tuple[Literal["confidence", "halton"], ...] = ()


@dataclass
class Recipe:
    """Keys of `addp evaluate`."""

    out: Annotated[str, f"folder for {REPORT_FILE} and, with `model`, for the generated images"]
    reference: Annotated[
        str,
        "images to compare with: a folder, ImageNet root, .tar file or hub dataset, center-cropped to the size of the "
        "generated images; or statistics: a folder of the cache, or an .npz file with mu and sigma",
    ]
    split: Annotated[str, "split of the reference, if it has splits"] = "val"
    images: Annotated[str, "folder of generated images, all of one size"] = ""
    model: Annotated[
        str, "instead of `images`: a run or ADDP file, from which missing images are generated into folders in `out`"
    ] = ""
    n: Annotated[int, Ge(1), "number of images to generate; published metrics use 50000"] = 50_000
    seed: Annotated[int, "random seed of the generated images"] = 0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    sweep: Sweep = field(default_factory=Sweep)
    inception: Annotated[str, "file of torch-fidelity's Inception-v3 weights; empty: download it"] = ""
    extractor: Annotated[str, "instead of Inception-v3: a run of `addp finetune` on labeled images, or its file"] = ""
    is_splits: Annotated[int, Ge(1), "parts over which the score's mean and standard deviation are taken"] = 10
    kid_subset: Annotated[int, Ge(2), "images in each of KID's 100 subsets, or all images if there are fewer"] = 1000
    cache: Annotated[str, "folder that keeps the features of references"] = "~/.cache/addp/features"
    batch: Annotated[int, Gt(0), "images generated at a time by each process"] = 16
    workers: Annotated[int, Ge(0), "data loading processes of each process"] = 2
    precision: Precision = "fp32"
    tokenizer: TokenizerSource = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None


def run(recipe: Recipe) -> None:
    """Generate missing images, extract features, print the table and write the report to `out`."""
    out, state = Path(recipe.out), process_state()
    settings = sampling_settings(recipe)
    folder_images = None
    if recipe.images:
        with renaming_keys({"data.source": "images", "data.split": "images"}):
            folder_images = open_images(Path(recipe.images).expanduser())
    check_image_count(recipe.n if folder_images is None else len(folder_images), recipe.is_splits)
    reference_source = open_reference(recipe.reference, recipe.split)
    hw = load_recipe_model(recipe).config.image_size if folder_images is None else size_of_first(folder_images)
    extractor = open_extractor(recipe.inception, recipe.extractor, state.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror})") from error
    # Before generating, which can take hours: the reference may turn out to be unusable.
    if not isinstance(reference_source, Path):
        check_image_count(len(reference_source), name="reference")
    cache = Path(recipe.cache).expanduser()
    reference = load_reference(reference_source, hw, extractor, cache, recipe.workers)

    report: dict[str, Any] = {"features": extractor.label, "reference": recipe.reference, "rows": []}
    for name, sampling in settings.items():
        if sampling is not None:
            generate.run(generate_recipe(recipe, out / name, sampling))
        images = open_images(out / name, recipe.n) if folder_images is None else folder_images
        warn_if_same_images(images, reference, recipe)
        features = extract_features(
            images, require_size(hw), extractor, out / f"{TEMPORARY_PREFIX}features", recipe.workers
        )
        if state.is_main_process:
            row = {"name": name, "images": len(images), **compute_metrics(features, reference, recipe, extractor)}
            report["rows"].append(row | ({} if sampling is None else {"sampling": vars(sampling)}))
            write_report(report, out)
        state.wait_for_everyone()
    if state.is_main_process:
        if len(images) < ENOUGH_IMAGES:
            log.warning("%d images are too few to compare the metrics with published ones", len(images))
        shutil.rmtree(out / f"{TEMPORARY_PREFIX}features", ignore_errors=True)
        sys.stdout.write(format_report(report))


# -------------------- images and settings


def sampling_settings(recipe: Recipe) -> dict[str, SampleConfig | None]:
    """Return the name and the sampling settings of each row; the settings are None for a folder of existing images."""
    swept = {f.name: getattr(recipe.sweep, f.name) for f in fields(Sweep)}
    if bool(recipe.images) == bool(recipe.model):
        raise UserError(
            "images, model: expected one of them, a folder of generated images or a model to generate them from"
        )
    if recipe.images:
        if any(swept.values()):
            raise UserError("sweep: needs model=<run or file>, from which the images of each setting are generated")
        return {recipe.images: None}
    swept = {key: values for key, values in swept.items() if values}
    combinations = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    settings = [replace(recipe.sampling, **combination) for combination in combinations]
    return {row_name(sampling): sampling for sampling in settings}


def row_name(sampling: SampleConfig) -> str:
    """Return the name of a row and its folder, which abbreviates the settings, such as "cosine-20-t6-p0.9"."""
    name = f"{sampling.schedule}-{sampling.steps}"
    name += "-halton" if sampling.order == "halton" else f"-t{sampling.temperature:g}"
    name += f"-p{sampling.top_p:g}" if sampling.top_p < 1 else ""
    return name + (f"-k{sampling.top_k}" if sampling.top_k else "")


def generate_recipe(recipe: Recipe, out: Path, sampling: SampleConfig) -> generate.Recipe:
    """Return the recipe of `addp generate` for one row, with the keys that both verbs have."""
    shared = {f.name: getattr(recipe, f.name) for f in fields(generate.Recipe) if hasattr(recipe, f.name)}
    return generate.Recipe(**shared | {"out": str(out), "sampling": sampling, "grid": 0})


def size_of_first(images: ImageSource) -> tuple[int, int]:
    """Return (height, width) of the first image."""
    try:
        image, _ = images.open_image(0)
    except ImageError as error:
        raise UserError(f"{images.name(0)}: {error}; repair or remove it") from error
    return image.height, image.width


def warn_if_same_images(images: ImageSource, reference: Reference, recipe: Recipe) -> None:
    """Warn if the reference is the set of images itself."""
    if reference.digest and digest_of_images(images) == reference.digest:
        log.warning(
            "reference: %s holds the same images as those evaluated, so the metrics are meaningless", recipe.reference
        )


# -------------------- metrics


def compute_metrics(
    generated: FeatureSet, reference: Reference, recipe: Recipe, extractor: Extractor
) -> dict[str, float]:
    """Return all metrics by their names, which say whether the features are Inception's."""
    distance, score, kernel = ("fid", "is", "kid") if extractor.is_inception else ("fd", "cs", "kd")
    assert generated.features is not None  # as `extract_features` returned them
    assert generated.logits is not None
    metrics = {distance: frechet_distance(generated, reference.features)}
    metrics[f"{score}_mean"], metrics[f"{score}_std"] = inception_score(generated.logits, recipe.is_splits)
    if reference.features.features is not None:
        pair = generated.features, reference.features.features
        metrics["precision"], metrics["recall"] = precision_recall(*pair, PartialState().device)
        subset = min(recipe.kid_subset, *map(len, pair))
        metrics[f"{kernel}_mean"], metrics[f"{kernel}_std"] = kernel_distance(*pair, subset)
        metrics[f"{kernel}_subset"] = subset
    return metrics
