"""What generated images are compared with: a set of images, whose features are cached, or precomputed statistics."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.files import TEMPORARY_PREFIX, write_atomically
from addp_core.base.paths import expand_home
from addp_core.data.images import ImageError, wrap_image_errors
from addp_core.data.sources import ImageSource, open_source
from addp_core.training.extractors import Extractor
from addp_core.training.image_metrics import FeatureSet
from gen.features import ResizeAndCrop, extract_features
from gen.image_folder import is_generated, open_images

log = logging.getLogger("addp")

ABOUT = "about.json"  # in a folder of the cache: what its features were computed from
RESIZE_BEFORE_IT_WAS_RECORDED = "bicubic"
READ_AHEAD = 256  # images that a source over the network is asked for together
STALE_SECONDS = 24 * 3600  # after which an unfinished folder is abandoned; no extraction takes as long


@dataclass(frozen=True)
class Reference:
    """The features that generated images are compared with, and the digest of their image files ("" if unknown)."""

    features: FeatureSet
    digest: str = ""


def open_reference(reference: str, split: str) -> ImageSource | Path:
    """Open the recipe's `reference`: return its images, or the path of precomputed statistics."""
    path = expand_home(reference)
    if path.suffix == ".npz" or (path / ABOUT).is_file():
        return path
    with renaming_keys({"data.source": "reference", "data.split": "split"}):
        return open_images(path) if is_generated(path) else open_source(reference, split)


def is_statistics_file(reference: ImageSource | Path) -> bool:
    """Check whether `open_reference` returned a file of mean and covariance alone, without features of images."""
    return isinstance(reference, Path) and not reference.is_dir()


def load_reference(
    reference: ImageSource | Path,
    prepare: ResizeAndCrop,
    extractor: Extractor,
    cache: Path,
    workers: int,
    digest: str = "",
) -> Reference:
    """Load what `open_reference` returned; the features of images that were prepared like this are cached.

    digest: that of the images, if it is known.
    """
    if isinstance(reference, Path):
        return read_statistics(reference, extractor, prepare)
    digest = digest or digest_of_images(reference)
    return Reference(cached_features(reference, digest, prepare, extractor, cache, workers), digest)


def digest_of_images(source: ImageSource) -> str:
    """Return a digest of all image files, in order. Raises UserError if one cannot be read; the message names it."""
    digest = hashlib.blake2b(digest_size=16)
    for index in tqdm(range(len(source)), unit="img", desc="reading", leave=False, disable=len(source) < 5000):
        if index % READ_AHEAD == 0:
            source.read_ahead(range(index, min(index + READ_AHEAD, len(source))))
        try:
            with wrap_image_errors():
                encoded, _ = source.read_bytes(index)
        except ImageError as error:
            raise UserError(f"{source.name(index)}: {error}; repair or remove it") from error
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def cached_features(
    source: ImageSource, digest: str, prepare: ResizeAndCrop, extractor: Extractor, cache: Path, workers: int
) -> FeatureSet:
    """Read the features of a reference from the cache; extract them first if they are not there.

    Several runs may fill the cache at once.

    Args:
        source: the images.
        digest: the digest of their files.
        prepare: resizes and crops an image.
        extractor: the network.
        cache: folder of all cached features.
        workers: number of data loading processes of each process.

    Raises:
        UserError: if the cache cannot be written, or an image cannot be read.
    """
    state = PartialState()
    described = f"{digest} {prepare.hw} {prepare.resize} {extractor.key}"
    key = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
    folder = cache / key
    unfinished = [_make_unfinished_folder(folder) if state.is_main_process else None]
    broadcast_object_list(unfinished)
    if unfinished[0] is None:
        log.info("reference: features found in %s", folder)
        return FeatureSet.read(folder)
    temporary = Path(unfinished[0])
    try:
        extract_features(source, prepare, extractor, temporary, workers)
        if state.is_main_process:
            about = {"content": digest, "images": len(source), "size": prepare.hw, "resize": prepare.resize}
            about |= {"extractor": extractor.label, "key": extractor.key}
            write_atomically(temporary / ABOUT, json.dumps(about, indent=2).encode())
            try:
                os.replace(temporary, folder)
            except OSError:
                if not folder.exists():  # otherwise another run has stored the same features first
                    raise
            log.info("reference: features kept in %s", folder)
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
    return FeatureSet.read(folder)


def _make_unfinished_folder(folder: Path) -> str | None:
    """Create a folder beside `folder`, for this run alone, to be renamed to it; return None if `folder` exists.

    Also removes folders of the same kind that interrupted runs left behind.
    """
    try:
        if folder.exists():
            return None
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in folder.parent.glob(f"{TEMPORARY_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
        return tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{folder.name}-", dir=folder.parent)
    except OSError as error:
        raise UserError(
            f"cache: {folder.parent} cannot be written ({error.strerror}); choose another folder"
        ) from error


def read_statistics(path: Path, extractor: Extractor, prepare: ResizeAndCrop) -> Reference:
    """Read a folder of the cache, or an .npz file with `mu` and `sigma` (as TTUR and ADM publish them).

    Warns if the folder's images were not prepared by `prepare`. Raises UserError if the file cannot be read, or belongs
    to another extractor.
    """
    try:
        if path.is_dir():
            about = json.loads((path / ABOUT).read_text())
            if about["key"] != extractor.key:
                raise UserError(f"reference: {path} holds features of {about['extractor']}, not of {extractor.label}")
            cached_resize = about.get("resize", RESIZE_BEFORE_IT_WAS_RECORDED)
            if cached_resize != prepare.resize:
                log.warning(
                    "reference: the images of %s were resized by %s, not by reference_resize=%s",
                    path,
                    cached_resize,
                    prepare.resize,
                )
            if (size := tuple(about["size"])) != prepare.hw:
                log.warning(
                    "reference: the images of %s had %d x %d pixels, and those that they are compared with have %d x "
                    "%d: the metrics then tell their sharpness apart; expected the images, or features of that size",
                    *(path, *size, *prepare.hw),
                )
            return Reference(FeatureSet.read(path), about["content"])
        with np.load(path, allow_pickle=False) as file:
            statistics = FeatureSet(*(np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma")))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"reference: {path} cannot be read as statistics ({error}); expected mu and sigma") from error
    dim = extractor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=PartialState().device))[0].shape[1]
    if statistics.mean.shape != (dim,) or statistics.covariance.shape != (dim, dim):
        raise UserError(f"reference: {path} has mu {statistics.mean.shape}; expected ({dim},) for {extractor.label}")
    return Reference(statistics)
