"""Features of a frozen encoder: pooled tokens after any of its blocks, and a folder that keeps those of a whole set."""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace
from addp_core.data.sources import ImageSource
from addp_core.networks.encoder import Encoder
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.weights.checkpoint import fingerprint
from cls.evaluation import Answers, answers

log = logging.getLogger("addp")

Pooling = Literal["avg", "token"]
STORED = {"float16": torch.float16, "float32": torch.float32}


def block_number(encoder: Encoder, block: int, key: str = "block") -> int:
    """A block counted from 1, or from the end as -1, -2, ... -> counted from 1. UserError where there is none."""
    depth = len(encoder.blocks)
    if not 1 <= abs(block) <= depth:
        raise UserError(f"{key}: found {block}, expected 1 to {depth}, or -1 to -{depth} from the end")
    return block if block > 0 else depth + 1 + block


def cut(encoder: Encoder | TokenEncoder, block: int) -> Encoder | TokenEncoder:
    """The same encoder without the blocks after `block`, counted from 1."""
    encoder.blocks = encoder.blocks[:block]
    encoder.config = replace(encoder.config, depth=block)
    if isinstance(encoder, TokenEncoder):  # which is saved by the config of the predictor that it comes from
        encoder.predictor_config = replace(encoder.predictor_config, depth=block)
    return encoder


class Features(nn.Module):
    """Images -> pooled tokens after some blocks of a frozen encoder, without its final norm.

    blocks: counted from 1. poolings: of "avg" (patch tokens) and "token" (class token). mirrored: of the mirror image
    too, as a second view.
    """

    def __init__(self, encoder: Encoder, blocks: Sequence[int], poolings: Sequence[Pooling], mirrored: bool = False):
        super().__init__()
        self.encoder, self.blocks, self.poolings, self.mirrored = encoder, tuple(blocks), tuple(poolings), mirrored

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(views, blocks, poolings, width) of an image's features."""
        return 1 + self.mirrored, len(self.blocks), len(self.poolings), self.encoder.config.width

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] normalised -> Float[B,V,K,P,W] in float32: views, blocks, poolings."""
        views = [images, images.flip(-1)] if self.mirrored else [images]
        return torch.stack([self._view(view) for view in views], 1)

    def _view(self, images: Tensor) -> Tensor:
        tokens = self.encoder.forward_tokens(images, [block - 1 for block in self.blocks])
        pooled = {"avg": lambda x: x[:, 1:].float().mean(1), "token": lambda x: x[:, 0].float()}
        return torch.stack([torch.stack([pooled[name](x) for name in self.poolings], 1) for x in tokens], 1)


class Bank:
    """The features of a set on the disk: `<folder>/00000.safetensors`, ..., each with its images' labels."""

    def __init__(self, folder: Path, shards: int):
        self.key = folder.name  # tells what the features are of
        self._paths = [_path(folder, number) for number in range(shards)]
        self.labels = torch.cat([self._read(path, "labels") for path in self._paths])
        self.indices = torch.cat([self._read(path, "indices") for path in self._paths])

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, block: int, pooling: str) -> Tensor:
        """Features[n,V,W] as they are stored. A file is mapped, not read: only this block and pooling cost memory."""
        parts = (self._read(path, _name(block, pooling)) for path in self._paths)
        first = next(parts)
        rows = torch.empty((len(self), *first.shape[1:]), dtype=first.dtype)
        rows[: len(first)], at = first, len(first)
        for part in parts:
            rows[at : at + len(part)] = part
            at += len(part)
        return rows

    def _read(self, path: Path, name: str) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it to compute it again") from error


def collect(
    features: Features,
    source: ImageSource,
    transform: Callable,
    cache: Path,
    *,
    title: str,
    store: str,
    shard: int,
    **options: Any,
) -> Bank:
    """The features of every image, from the folder in `cache` that belongs to these weights, images and settings.

    What is missing there is computed, `shard` images a file, each file whole or absent. store: a key of `STORED`.
    options: of `answers`. Images are told apart by name and label: one replaced under its name is not noticed.
    UserError: a full disk, features beyond float16, labels without a class.
    """
    state = PartialState()
    folder = cache / f"{title}-{_key(features, source, transform, store, shard, options)}"
    shards = -(-len(source) // shard)
    missing = [[number for number in range(shards) if not _path(folder, number).exists()]]
    broadcast_object_list(missing)  # one look at the folder for all: it fills while the others look
    if todo := missing[0]:
        indices = [i for number in todo for i in _members(number, shard, source)]
        if state.is_main_process:
            _make_room(folder, features, len(indices), STORED[store].itemsize)
            log.info("%s: features of %d of %d images to compute: %s", title, len(indices), len(source), folder)
        bar = title if sys.stderr.isatty() else ""
        found = answers(features, source, transform, indices=indices, title=bar, **options)
        for number, part in zip(todo, _parts(found, todo, shard, features), strict=True):
            gathered = gather_object([part])
            if state.is_main_process:
                _write(_path(folder, number), gathered, features, STORED[store])
    state.wait_for_everyone()
    return Bank(folder, shards)


def _members(number: int, shard: int, source: ImageSource) -> range:
    return range(number * shard, min((number + 1) * shard, len(source)))


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _name(block: int, pooling: str) -> str:
    return f"block{block}.{pooling}"


def _key(
    features: Features, source: ImageSource, transform: Callable, store: str, shard: int, options: dict[str, Any]
) -> str:
    """A digest of all that the features depend on."""
    encoder = features.encoder
    digest = hashlib.blake2b(fingerprint(encoder).encode(), digest_size=8)
    about = [asdict(encoder.config), encoder.image_size, encoder.patch_size, features.blocks, features.poolings]
    about += [features.mirrored, transform.hw, transform.share, store, shard]
    about += [options[name] for name in ("mean", "std", "precision")]
    digest.update(json.dumps(about).encode())
    for index in range(len(source)):
        digest.update(source.name(index).encode(errors="surrogateescape"))
    if source.labels is not None:
        digest.update(source.labels.tobytes())
    return digest.hexdigest()


def _make_room(folder: Path, features: Features, images: int, itemsize: int) -> None:
    """Make the folder. UserError where the features will not fit on its disk."""
    views, blocks, poolings, width = features.shape
    size = images * views * blocks * poolings * width * itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    if size > free:
        raise UserError(
            f"{folder}: the features take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "name fewer fast.blocks or fast.poolings, or another fast.cache"
        )


def _parts(found: Iterator[Answers], todo: Sequence[int], shard: int, features: Features) -> Iterator[Answers]:
    """This process's share of each file's images, one after the other; images come in the order of their indices."""
    held = Answers(torch.empty(0, *features.shape), torch.empty(0).long(), torch.empty(0).long())
    for number in todo:
        waiting, end = [held], (number + 1) * shard
        while not (len(waiting[-1].indices) and waiting[-1].indices[-1] >= end):
            more = next(found, None)
            if more is None:
                break
            waiting.append(more)
        merged = _merged(waiting)
        here = merged.indices < end
        held = _chosen(merged, ~here)
        yield _chosen(merged, here)


def _merged(parts: Sequence[Answers]) -> Answers:
    names = ("outputs", "labels", "indices")
    return Answers(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _chosen(part: Answers, which: Tensor) -> Answers:
    return Answers(part.outputs[which], part.labels[which], part.indices[which])


def _write(path: Path, parts: list[Answers], features: Features, dtype: torch.dtype) -> None:
    merged = _merged(parts)
    merged = _chosen(merged, merged.indices.argsort())
    outputs = merged.outputs.to(dtype)
    if not outputs.isfinite().all():
        raise UserError(
            f"fast.store: features up to {merged.outputs.abs().max():.3g} do not fit {dtype}; set fast.store=float32"
        )
    tensors = {"labels": merged.labels, "indices": merged.indices}
    for k, block in enumerate(features.blocks):
        for p, pooling in enumerate(features.poolings):
            tensors[_name(block, pooling)] = outputs[:, :, k, p].contiguous()
    try:
        with atomic_replace(path) as temporary:
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); start again to continue after it") from error
