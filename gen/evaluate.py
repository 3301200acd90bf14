"""`addp evaluate`: FID, Inception score, precision, recall and KID of generated images, one row for each setting.

The images come from a folder, or are generated from a model: with `sampling`, or with every combination in `sweep`.
The metrics equal torch-fidelity's on the same images. With `extractor`, the features are those of a classifier trained
with `addp finetune`; Frechet distance, score and kernel distance are then called FD, CS and KD, because FID, IS and KID
are defined on Inception's features.
"""

import logging
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from addp_core.base.addresses import is_address
from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.files import TEMPORARY_PREFIX
from addp_core.base.paths import expand_home
from addp_core.data.images import ImageError
from addp_core.data.sources import ImageSource, open_source
from addp_core.method.sampler import SampleConfig
from addp_core.training.extractors import Extractor, open_extractor, open_vgg16
from addp_core.training.image_metrics import (
    NEIGHBORS,
    FeatureSet,
    check_image_count,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from addp_core.training.processes import process_state
from addp_core.training.run_folder import claim_out
from addp_core.weights.fingerprint import fingerprint
from gen import generate
from gen.features import RequireSize, ResizeAndCrop, check_size, extract_features
from gen.image_folder import open_images
from gen.model import load_for_sampling
from gen.recipe import EvaluateRecipe as Recipe
from gen.reference import Reference, digest_of_images, is_statistics_file, load_reference, open_reference
from gen.report import format_report, write_report

log = logging.getLogger("addp")

ENOUGH_IMAGES = 10_000  # with fewer, FID is biased upwards


def run(recipe: Recipe) -> None:
    """Generate missing images, extract features, print the table and write the report to `out`."""
    out, state = Path(recipe.out), process_state()
    settings = sampling_settings(recipe)
    folder_images = None
    if recipe.images:
        with renaming_keys({"data.source": "images", "data.split": "images"}):
            path = expand_home(recipe.images)
            folder_images = open_source(recipe.images) if is_address(recipe.images) else open_images(path)
    check_image_count(recipe.n if folder_images is None else len(folder_images), recipe.is_splits)
    reference_source = open_reference(recipe.reference, recipe.split)
    if not isinstance(reference_source, Path):
        check_image_count(len(reference_source), name="reference")
    # All that can be wrong is found before the features of the reference, which can take an hour.
    if folder_images is None:
        hw = check_rows(recipe, settings)
    else:
        hw = size_of_first(folder_images)
        if not is_address(recipe.images):
            check_headers(folder_images, hw)
    extractor = prc_extractor = open_extractor(recipe.inception, recipe.extractor, state.device)
    if recipe.prc_features == "vgg16" and not is_statistics_file(reference_source):
        prc_extractor = open_vgg16(recipe.vgg16, state.device)
    with claim_out(out):
        evaluate_rows(recipe, settings, folder_images, reference_source, hw, extractor, prc_extractor)


def evaluate_rows(
    recipe: Recipe,
    settings: dict[str, SampleConfig | None],
    folder_images: ImageSource | None,
    reference_source: ImageSource | Path,
    hw: tuple[int, int],
    extractor: Extractor,
    prc_extractor: Extractor,
) -> None:
    """Compute the features of the reference, then row after row.

    Args:
        recipe: of the evaluation.
        settings: of each row, by its name.
        folder_images: the images that exist; None if those of each row are generated.
        reference_source: what they are compared with.
        hw: size of the images.
        extractor: the network of all metrics but precision and recall.
        prc_extractor: that of precision and recall, which may be the same.
    """
    out, state = Path(recipe.out), process_state()
    prepare, cache = ResizeAndCrop(hw, recipe.reference_resize), expand_home(recipe.cache)
    reference = prc_reference = load_reference(reference_source, prepare, extractor, cache, recipe.workers)
    if prc_extractor is not extractor:
        prc_reference = load_reference(
            reference_source, prepare, prc_extractor, cache, recipe.workers, reference.digest
        )

    report: dict[str, Any] = {"features": extractor.label, "reference": recipe.reference}
    if not isinstance(reference_source, Path):
        report["reference_resize"] = recipe.reference_resize
    if reference.features.features is not None:
        report["precision_recall"] = {"features": prc_extractor.layer, "neighbors": NEIGHBORS}
    report["rows"] = []
    for name, sampling in settings.items():
        if sampling is not None:
            generate.run(generate_recipe(recipe, out / name, sampling))
        images = open_images(out / name, recipe.n) if folder_images is None else folder_images
        warn_if_same_images(images, reference, recipe)
        folder = out / f"{TEMPORARY_PREFIX}features"
        features = extract_features(images, RequireSize(hw), extractor, folder, recipe.workers)
        prc_features = features
        if prc_extractor is not extractor:
            folder = out / f"{TEMPORARY_PREFIX}prc-features"
            prc_features = extract_features(images, RequireSize(hw), prc_extractor, folder, recipe.workers)
        if state.is_main_process:
            row: dict[str, Any] = {"name": name, "images": len(images)}
            row |= compute_metrics(features, reference.features, recipe, extractor)
            row |= compute_precision_recall(prc_features, prc_reference.features)
            report["rows"].append(row | ({} if sampling is None else {"sampling": vars(sampling)}))
            write_report(report, out, complete=len(report["rows"]) == len(settings))
        state.wait_for_everyone()
    if state.is_main_process:
        if len(images) < ENOUGH_IMAGES:
            log.warning("%d images are too few to compare the metrics with published ones", len(images))
        for folder in out.glob(f"{TEMPORARY_PREFIX}*features"):
            shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.write(format_report(report))


# -------------------- images and settings


def sampling_settings(recipe: Recipe) -> dict[str, SampleConfig | None]:
    """Return the name and the sampling settings of each row; the settings are None for a folder of existing images."""
    if bool(recipe.images) == bool(recipe.model):
        raise UserError(
            "images, model: expected one of them, a folder of generated images or a model to generate them from"
        )
    if recipe.images:
        if recipe.sweep.values():
            raise UserError("sweep: needs model=<run or file>, from which the images of each setting are generated")
        return {recipe.images: None}
    settings = [replace(recipe.sampling, **combination) for combination in recipe.sweep.combinations()]
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


def check_rows(recipe: Recipe, settings: dict[str, SampleConfig | None]) -> tuple[int, int]:
    """Return (height, width) of the model's images. Raises UserError if a row's folder holds images of other settings
    or weights.
    """
    state = process_state()
    model = load_for_sampling(recipe, state.device)
    weights = fingerprint(model) if state.is_main_process else ""
    for name, sampling in settings.items():
        if sampling is not None and state.is_main_process:
            generate.check_out_of(generate_recipe(recipe, Path(recipe.out, name), sampling), weights)
    return model.config.image_size


def check_headers(images: ImageSource, hw: tuple[int, int]) -> None:
    """Raise UserError if an image is no image by its first bytes, or of another size; the processes share the work."""
    state = process_state()
    assigned = range(state.process_index, len(images), state.num_processes)
    hidden = not state.is_main_process
    for index in tqdm(assigned, unit="img", desc="checking images", delay=2, leave=False, disable=hidden):
        try:
            check_size(images.open_image(index)[0], hw)
        except ImageError as error:
            raise UserError(f"{images.name(index)}: {error}; repair or remove it") from error


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
    generated: FeatureSet, reference: FeatureSet, recipe: Recipe, extractor: Extractor
) -> dict[str, float]:
    """Return the metrics but precision and recall, by names that say whether the features are Inception's."""
    distance, score, kernel = ("fid", "is", "kid") if extractor.is_inception else ("fd", "cs", "kd")
    assert generated.features is not None  # as `extract_features` returned them
    assert generated.logits is not None
    metrics = {distance: frechet_distance(generated, reference)}
    metrics[f"{score}_mean"], metrics[f"{score}_std"] = inception_score(generated.logits, recipe.is_splits)
    if reference.features is not None:
        pair = generated.features, reference.features
        subset = min(recipe.kid_subset, *map(len, pair))
        metrics[f"{kernel}_mean"], metrics[f"{kernel}_std"] = kernel_distance(*pair, subset)
        metrics[f"{kernel}_subset"] = subset
    return metrics


def compute_precision_recall(generated: FeatureSet, reference: FeatureSet) -> dict[str, float]:
    """Return precision and recall; nothing if only statistics of the reference are available."""
    if generated.features is None or reference.features is None:
        return {}
    precision, recall = precision_recall(generated.features, reference.features, PartialState().device)
    return {"precision": precision, "recall": recall}
