"""Features of a frozen encoder: pooled tokens after any of its blocks, computed once and stored in shards on disk."""

import hashlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from addp_core.data.images import CenterCrop
from addp_core.data.sources import ImageSource
from addp_core.data.stream import ReadErrors
from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.pooled_features import PooledFeatures
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.training.evaluation import check_unreadable
from addp_core.training.feature_files import STORAGE_DTYPES, FeatureFiles, to_storage
from addp_core.weights.fingerprint import fingerprint
from addp_core.weights.fitting import AnyEncoder
from cls.evaluation import OutputBatch, compute_outputs

log = logging.getLogger("addp")


def truncate(encoder: AnyEncoder, block: int) -> None:
    """Remove the blocks after `block` (counted from 1), in place."""
    if isinstance(encoder, CnnEncoder):
        return  # the last stage is the only one that is probed
    encoder.blocks = encoder.blocks[:block]
    encoder.config = replace(encoder.config, depth=block)
    if isinstance(encoder, TokenEncoder):  # it is saved with the config of the predictor that it comes from
        encoder.predictor_config = replace(encoder.predictor_config, depth=block)


class FeatureBank:
    """The features of a dataset on disk; each file holds the labels and the indices of its images too.

    `key` identifies the weights, images and settings of the features, and the images that could not be read.

    Args:
        files: the files.
        images: how many the dataset has.
    """

    def __init__(self, files: FeatureFiles, images: int):
        self.key, self._files = files.folder.name, files
        self.labels, self.indices = files.concatenate_all("labels"), files.concatenate_all("indices")
        if len(self) < images:
            self.key += f" {hashlib.blake2b(self.indices.numpy().tobytes(), digest_size=8).hexdigest()}"

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, block: int, pooling: str) -> Tensor:
        """Return [n,V,W] features in the type they are stored in; only this block and pooling are read."""
        return self._files.concatenate(_tensor_name(block, pooling), len(self))


def compute_features(
    model: PooledFeatures,
    source: ImageSource,
    transform: CenterCrop,
    cache: Path,
    *,
    title: str,
    store: str,
    shard: int,
    **options: Any,
) -> FeatureBank:
    """Return the features of every readable image, computing those that are not in the cache yet.

    Images that could not be read when their file was written are tried again. The folder in `cache` depends on the
    weights, the images and the settings. Each file holds `shard` images and is complete or absent. Images are
    identified by name and label: an image replaced under the same name goes unnoticed.

    Args:
        title: prefix of the folder's name, and title of the progress bar.
        store: the type that the features are stored in, a key of `STORAGE_DTYPES`.
        options: of `compute_outputs`.

    Raises:
        UserError: the disk is full, features exceed the range of float16, or a label is out of range.
    """
    state = PartialState()
    folder = cache / f"{title}-{_cache_key(model, source, transform, store, shard, options)}"
    files = FeatureFiles(folder, -(-len(source) // shard))
    missing = files.missing()
    _add_unreadable(files, missing, model, source, transform, title=title, store=store, shard=shard, **options)
    if missing:
        indices = [i for number in missing for i in _shard_indices(number, shard, source)]
        if state.is_main_process:
            size = len(indices) * math.prod(model.shape) * STORAGE_DTYPES[store].itemsize
            files.create_folder(size, "choose fewer fast.blocks or fast.poolings, or another fast.cache")
            log.info("%s: computing the features of %d of %d images: %s", title, len(indices), len(source), folder)
        bar = title if sys.stderr.isatty() else ""
        errors: ReadErrors = []
        batches = compute_outputs(model, source, transform, indices=indices, title=bar, errors=errors, **options)
        for number, part in zip(missing, _split_by_shard(batches, missing, shard, model), strict=True):
            check_unreadable(errors, options["max_errors"], len(indices))
            gathered = gather_object([part])
            if state.is_main_process:
                files.write(number, _tensors(gathered, model, STORAGE_DTYPES[store]))
    state.wait_for_everyone()
    return FeatureBank(files, len(source))


def _add_unreadable(
    files: FeatureFiles,
    missing: Sequence[int],
    model: PooledFeatures,
    source: ImageSource,
    transform: CenterCrop,
    *,
    title: str,
    store: str,
    shard: int,
    **options: Any,
) -> None:
    """Add to the files those of their images that could not be read when they were written, and can be now.

    missing: numbers of the files that are not there; the other arguments are those of `compute_features`.
    """
    state = PartialState()
    shared: list[dict[int, list[int]]] = [{}]
    if state.is_main_process:
        for number in sorted(set(range(files.count)) - set(missing)):
            absent = set(_shard_indices(number, shard, source)) - set(files.read(number, "indices").tolist())
            if absent:
                shared[0][number] = sorted(absent)
    broadcast_object_list(shared)
    absent_by_file = shared[0]
    indices = [index for absent in absent_by_file.values() for index in absent]
    if not indices:
        return
    if state.is_main_process:
        log.info("%s: trying %d images again that could not be read before", title, len(indices))
    errors: ReadErrors = []
    batches = compute_outputs(model, source, transform, indices=indices, errors=errors, **options)
    added = _concatenate([_nothing(model), *batches])
    check_unreadable(errors, options["max_errors"], len(source))
    gathered = gather_object([added])
    if state.is_main_process:
        for number in absent_by_file:
            inside = [_select(part, part.indices // shard == number) for part in gathered]
            tensors = _tensors(inside, model, STORAGE_DTYPES[store])
            if len(tensors["indices"]):
                merged = {name: torch.cat([files.read(number, name), new]) for name, new in tensors.items()}
                order = merged["indices"].argsort()
                files.write(number, {name: value[order] for name, value in merged.items()})
    state.wait_for_everyone()


def _shard_indices(number: int, shard: int, source: ImageSource) -> range:
    return range(number * shard, min((number + 1) * shard, len(source)))


def _tensor_name(block: int, pooling: str) -> str:
    return f"block{block}.{pooling}"


def _cache_key(
    model: PooledFeatures, source: ImageSource, transform: CenterCrop, store: str, shard: int, options: dict[str, Any]
) -> str:
    """Return a digest of everything the features depend on."""
    encoder = model.encoder
    digest = hashlib.blake2b(fingerprint(encoder).encode(), digest_size=8)
    settings = [asdict(encoder.config), encoder.image_size, encoder.patch_size, model.blocks, model.poolings]
    settings += [model.mirrored, transform.hw, transform.fraction, store, shard]
    settings += [options[name] for name in ("mean", "std", "precision")]
    settings += [] if model.norm == "none" else [model.norm]
    digest.update(json.dumps(settings).encode())
    for index in range(len(source)):
        digest.update(source.name(index).encode(errors="surrogateescape"))
    if source.labels is not None:
        digest.update(source.labels.tobytes())
    return digest.hexdigest()


def _split_by_shard(
    batches: Iterator[OutputBatch], numbers: Sequence[int], shard: int, model: PooledFeatures
) -> Iterator[OutputBatch]:
    """Yield this process's part of each of the shards `numbers`; all images come in the order of their indices."""
    rest = _nothing(model)
    for number in numbers:
        pending, end = [rest], (number + 1) * shard
        while not (len(pending[-1].indices) and pending[-1].indices[-1] >= end):
            batch = next(batches, None)
            if batch is None:
                break
            pending.append(batch)
        merged = _concatenate(pending)
        inside = merged.indices < end
        rest = _select(merged, ~inside)
        yield _select(merged, inside)


def _nothing(model: PooledFeatures) -> OutputBatch:
    """Return the outputs for no image."""
    return OutputBatch(torch.empty(0, *model.shape), torch.empty(0).long(), torch.empty(0).long())


def _concatenate(parts: Sequence[OutputBatch]) -> OutputBatch:
    names = ("outputs", "labels", "indices")
    return OutputBatch(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _select(part: OutputBatch, which: Tensor) -> OutputBatch:
    """Return the rows of a mask or of indices."""
    return OutputBatch(part.outputs[which], part.labels[which], part.indices[which])


def _tensors(parts: list[OutputBatch], model: PooledFeatures, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of one file from the parts of all processes."""
    merged = _concatenate(parts)
    merged = _select(merged, merged.indices.argsort())
    outputs = to_storage(merged.outputs, dtype, "fast.store")
    tensors = {"labels": merged.labels, "indices": merged.indices}
    for k, block in enumerate(model.blocks):
        for p, pooling in enumerate(model.poolings):
            tensors[_tensor_name(block, pooling)] = outputs[:, :, k, p].contiguous()
    return tensors
