"""What images look like to a network: the extractors of `addp evaluate`, and sets of features on the disk.

Features live in .npy files that are mapped into memory and read in chunks: 50,000 images need no more memory than 500.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import register_feature_extractor
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.base.files import TEMPORARY, write_atomically
from addp_core.data.images import ImageError, Picture, eval_transform, image_errors
from addp_core.data.sources import ImageSource
from addp_core.networks.classifier import normalise
from addp_core.weights.checkpoint import fingerprint, load_classifier, read_tensors

log = logging.getLogger("addp")

INCEPTION = "inception-v3-compat"  # torch-fidelity's names of extractors: its own, and ours
CLASSIFIER = "addp-classifier"
AT_ONCE = 32  # images that an extractor sees at a time
ROWS = 2048  # of features that are in memory at a time
DAY = 24 * 3600  # seconds; no extraction takes longer


class ClassifierFeatures(FeatureExtractorBase):
    """A classifier of `addp finetune` as an extractor of torch-fidelity: what its head sees, and its logits."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: Any
    ):
        super().__init__(name, features_list)
        self.classifier = load_classifier(feature_extractor_weights_path)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """UInt8[B,3,H,W] -> the features asked for."""
        model = self.classifier
        images = images.float() / 255
        if images.shape[-2:] != tuple(model.encoder.image_size):
            size = tuple(model.encoder.image_size)
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        pooled = model.forward_head(model.forward_features(normalise(images, model.mean, model.std)), pre_logits=True)
        found = {"pooled": pooled, "logits": model.head(pooled)}
        return tuple(found[name] for name in self.features_list)


register_feature_extractor(CLASSIFIER, ClassifierFeatures)


@dataclass(frozen=True)
class Extractor:
    """A network of torch-fidelity. `label` says which for people, `key` for caches; `is_inception`: FID is defined."""

    module: FeatureExtractorBase
    label: str
    key: str
    is_inception: bool

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """UInt8[B,3,H,W] -> features Float[B,D] and logits Float[B,C], float32."""
        with torch.no_grad():
            found = self.module.convert_features_tuple_to_dict(self.module(images))
        return tuple(found[layer].float() for layer in self.module.features_list)


def open_extractor(inception: str, classifier: str, device: torch.device) -> Extractor:
    """The classifier where one is named, else Inception-v3 from the file `inception`, or as torch-fidelity loads it."""
    if classifier:
        module = _create(CLASSIFIER, ClassifierFeatures, classifier)
        label = f"the classifier {classifier} (not Inception: no FID, and not comparable with published numbers)"
    else:
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity unpickles whatever the file holds: it gets the tensors alone
            path = os.path.join(folder, "inception.pth")
            torch.save(_inception_weights(inception), path)
            module = _create_inception(inception, path)
        label = f"Inception-v3 ({inception or URL_INCEPTION_V3.rpartition('/')[2]})"
    return Extractor(module.to(device), label, fingerprint(module), not classifier)


def _create(name: str, cls: type[FeatureExtractorBase], weights: str) -> FeatureExtractorBase:
    """With the layers that FID and IS read, in this order."""
    layers = [cls.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
    return create_feature_extractor(name, layers, cuda=False, feature_extractor_weights_path=weights, verbose=False)


def _create_inception(inception: str, path: str) -> FeatureExtractorBase:
    try:
        return _create(INCEPTION, FeatureExtractorInceptionV3, path)
    except RuntimeError as error:  # load_state_dict lists every tensor
        detail = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(
            f"inception: {inception or URL_INCEPTION_V3} has another layout than torch-fidelity's Inception-v3 "
            f"({detail[0].strip()[:120]}); expected {URL_INCEPTION_V3}"
        ) from error


def _inception_weights(inception: str) -> dict[str, Tensor]:
    if inception:
        return dict(read_tensors(inception))
    try:
        return torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, a proxy's page in its place, a full disk
        raise UserError(
            f"inception: {URL_INCEPTION_V3} cannot be downloaded ({error}); expected inception=<that file>, or "
            "extractor=<a run of addp finetune on labelled images> for numbers of its own instead of FID"
        ) from error


# -------------------- sets of features


@dataclass(frozen=True)
class Features:
    """Of n images: features Float32[n,D] and logits Float32[n,C] (None: statistics alone), both on the disk; mean
    Float64[D] and covariance Float64[D,D] of the features.
    """

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray | None = None
    logits: np.ndarray | None = None

    @classmethod
    def read(cls, folder: Path) -> "Features":
        """What `extract` wrote. OSError or ValueError where it is not all there."""
        # copy-on-write: torch wants memory that could be written
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("features", "logits")}
        return cls(np.load(folder / "mean.npy"), np.load(folder / "covariance.npy"), **arrays)


def extract(source: ImageSource, prepare: Callable, extractor: Extractor, folder: Path, workers: int) -> Features:
    """Features of all images into `folder`; every process of a torchrun does its share. UserError names a bad image.

    prepare(picture) -> UInt8[3,h,w].
    """
    state, n = PartialState(), len(source)
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        blank = torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=state.device)
        for name, found in zip(("features", "logits"), extractor(blank), strict=True):
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (n, found.shape[1])).flush()
    state.wait_for_everyone()
    files = [np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("features", "logits")]
    mine = np.array_split(np.arange(n), state.num_processes)[state.process_index]
    rows = DataLoader(_Rows(source, prepare, mine), AT_ONCE, num_workers=workers, collate_fn=list)
    position = int(mine[0]) if len(mine) else n
    with tqdm(total=len(mine), unit="img", desc="features", disable=not state.is_main_process, leave=False) as bar:
        for batch in rows:
            for bad in filter(lambda item: isinstance(item, str), batch):
                raise UserError(bad)
            for file, found in zip(files, extractor(torch.stack(batch).to(state.device)), strict=True):
                file[position : position + len(batch)] = found.cpu().numpy()
            position += len(batch)
            bar.update(len(batch))
    for file in files:
        file.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        for name, value in zip(("mean", "covariance"), moments(files[0]), strict=True):
            np.save(folder / f"{name}.npy", value)
    state.wait_for_everyone()
    return Features.read(folder)


class _Rows(Dataset):
    """The images `indices` of a source, prepared; what is wrong with one, as text, in its place."""

    def __init__(self, source: ImageSource, prepare: Callable, indices: np.ndarray):
        self.source, self.prepare, self.indices = source, prepare, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> Tensor | str:
        index = int(self.indices[row])
        try:
            return self.prepare(self.source.picture(index)[0])
        except ImageError as error:
            return f"{self.source.name(index)}: {error}; repair or remove it"


def central(hw: tuple[int, int]) -> Callable[[Picture], Tensor]:
    """Prepares a reference: the largest central part of the shape `hw`, resized bicubically."""
    return eval_transform(hw).pixels


def only(hw: tuple[int, int]) -> Callable[[Picture], Tensor]:
    """Takes images of this size as they are; `ImageError` for others."""

    def prepare(picture: Picture) -> Tensor:
        if (picture.height, picture.width) != hw:
            raise ImageError(f"{picture.width} x {picture.height} pixels, where others have {hw[1]} x {hw[0]}")
        return eval_transform(hw).pixels(picture)

    return prepare


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float[n,D] -> mean Float64[D] and covariance Float64[D,D], n > 1, a chunk at a time."""
    mean = sum(chunk.sum(0) for chunk in chunks(features)) / len(features)
    scatter = np.zeros((features.shape[1],) * 2)
    for chunk in chunks(features):
        chunk -= mean
        scatter += chunk.T @ chunk
    return mean, scatter / (len(features) - 1)


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows after the other, as float64 in memory."""
    for start in range(0, len(array), ROWS):
        yield np.array(array[start : start + ROWS], dtype=np.float64)


# -------------------- the reference, whose features are kept


def content(source: ImageSource) -> str:
    """A digest of the files of all images, in order. UserError names one that cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    for index in tqdm(range(len(source)), unit="img", desc="reading", leave=False, disable=len(source) < 5000):
        try:
            with image_errors():
                encoded, _ = source.load(index)
        except ImageError as error:
            raise UserError(f"{source.name(index)}: {error}; repair or remove it") from error
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def cached(
    source: ImageSource, of: str, hw: tuple[int, int], extractor: Extractor, cache: Path, workers: int
) -> Features:
    """Features of a reference prepared at `hw`, from the cache where its content `of` has been seen before.

    Several starts may fill the cache at once. UserError where it cannot be written.
    """
    state = PartialState()
    key = hashlib.blake2b(f"{of} {hw} {extractor.key}".encode(), digest_size=16).hexdigest()
    folder = cache / key
    found = [_unfinished(folder) if state.is_main_process else None]
    broadcast_object_list(found)
    if found[0] is None:
        log.info("reference: features found in %s", folder)
        return Features.read(folder)
    temporary = Path(found[0])
    try:
        extract(source, central(hw), extractor, temporary, workers)
        if state.is_main_process:
            about = {"content": of, "images": len(source), "size": hw}
            about |= {"extractor": extractor.label, "key": extractor.key}
            write_atomically(temporary / "about.json", json.dumps(about, indent=2).encode())
            try:
                os.replace(temporary, folder)
            except OSError:
                if not folder.exists():  # else another start was quicker, with the same
                    raise
            log.info("reference: features kept in %s", folder)
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
    return Features.read(folder)


def _unfinished(folder: Path) -> str | None:
    """A folder of this start's own beside `folder`, to be renamed; None where that is there. What others left a day ago
    is removed.
    """
    try:
        if folder.exists():
            return None
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in folder.parent.glob(f"{TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > DAY:
                    shutil.rmtree(path, ignore_errors=True)
        return tempfile.mkdtemp(prefix=f"{TEMPORARY}{folder.name}-", dir=folder.parent)
    except OSError as error:
        raise UserError(f"cache: {folder.parent} cannot be written ({error.strerror}); choose another one") from error


def read_statistics(path: Path, extractor: Extractor) -> tuple[Features, str]:
    """A reference that is a folder of the cache, or an .npz file with `mu` and `sigma` (as TTUR and ADM write them);
    and the digest of its images ("": unknown).
    """
    try:
        if path.is_dir():
            about = json.loads((path / "about.json").read_text())
            if about["key"] != extractor.key:
                raise UserError(f"reference: {path} holds features of {about['extractor']}, not of {extractor.label}")
            return Features.read(path), about["content"]
        with np.load(path, allow_pickle=False) as file:
            statistics = Features(*(np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma")))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"reference: {path} cannot be read as statistics ({error}); expected mu and sigma") from error
    dim = extractor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=PartialState().device))[0].shape[1]
    if statistics.mean.shape != (dim,) or statistics.covariance.shape != (dim, dim):
        raise UserError(f"reference: {path} has mu {statistics.mean.shape}; expected ({dim},) for {extractor.label}")
    return statistics, ""
