"""Patch features of a frozen encoder, with the class of each patch, computed once and stored in files on disk.

A whole image is resized to a square, bicubically, and its class map with it, by the nearest pixel. A patch has the
class of most of its pixels, as in CAPI's code.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.base.paths import expand_home
from addp_core.base.rng import generator
from addp_core.data.stream import default_workers, ignore_signals
from addp_core.networks.classifier import NORM_EPS, normalize
from addp_core.training.compute import accelerate_model, autocast
from addp_core.training.feature_files import STORAGE_DTYPES, FeatureFiles, to_storage
from addp_core.training.pace import VALIDATION, mark_pace
from addp_core.training.processes import process_state
from addp_core.weights.fingerprint import fingerprint
from addp_core.weights.fitting import AnyEncoder
from addp_core.weights.pretrained import NORMALISATION
from seg.probing.recipe import Recipe
from seg.scenes import IGNORED, SceneListing, ScenePair, read_class_map, read_image

log = logging.getLogger("addp")

LABELS, IMAGES = "labels", "images"  # of each patch, beside its features in a file


class PatchBank:
    """The patch features of a split on disk, image by image, row by row.

    Attributes:
        key: identifies the weights, images and settings of the features.
        shards: number of files.
        labels: the class of each patch, Long[m]; `IGNORED` for other.
        images: the number of its image, Long[m].
    """

    def __init__(self, files: FeatureFiles):
        self.key, self.shards, self._files = files.folder.name, files.count, files
        self.labels, self.images = (files.concatenate_all(name).long() for name in (LABELS, IMAGES))

    def load(self, block: int) -> Tensor:
        """Return the features after a block, [m,W] in the type they are stored in."""
        return self._files.concatenate(_tensor_name(block), len(self.labels))

    def load_shard(self, number: int, block: int) -> Tensor:
        """Return those of one file."""
        return self._files.read(number, _tensor_name(block))


def compute_bank(
    encoder: AnyEncoder, recipe: Recipe, blocks: Sequence[int], split: str, listing: SceneListing, classes: int
) -> PatchBank:
    """Return the patch features of a split after these blocks, counted from 1; compute the files that are missing.

    Of the training split, the labeled patches are kept, or `data.patches` of them; of the other one, all patches.

    Raises UserError if an image or class map cannot be read, the disk is full, or features exceed float16.
    """
    state, config = process_state(), recipe.data
    grid = patch_grid(encoder, config.size)
    patches = grid[0] * grid[1]
    limit = min(config.patches or patches, patches) if split == "train" else None
    cache = expand_home(recipe.cache) if recipe.cache else Path(recipe.out) / "features"
    folder = cache / f"{split}-{_cache_key(encoder, recipe, blocks, listing, classes, limit)}"
    files = FeatureFiles(folder, -(-len(listing) // recipe.shard))
    if missing := files.missing():
        mark_pace(VALIDATION, 0)
        if state.is_main_process:
            remaining = min(len(missing) * recipe.shard, len(listing))
            numbers = remaining * (limit or patches) * len(blocks) * encoder.width
            files.create_folder(
                numbers * STORAGE_DTYPES[recipe.store].itemsize,
                "choose fewer blocks or data.patches, a smaller data.size, or another cache",
            )
            log.info("%s: computing the features of up to %d images: %s", split, remaining, folder)
        state.wait_for_everyone()
        for number in tqdm(missing[state.process_index :: state.num_processes], desc=split, leave=False, disable=None):
            images = range(number * recipe.shard, min((number + 1) * recipe.shard, len(listing)))
            tensors = _features(encoder, recipe, blocks, listing, classes, images, limit)
            files.write(number, tensors)
    state.wait_for_everyone()
    return PatchBank(files)


def _features(
    encoder: AnyEncoder,
    recipe: Recipe,
    blocks: Sequence[int],
    listing: SceneListing,
    classes: int,
    images: range,
    limit: int | None,
) -> dict[str, Tensor]:
    """Return the tensors of one file."""
    device, dtype = process_state().device, STORAGE_DTYPES[recipe.store]
    mean, std = NORMALISATION[recipe.normalisation]
    batches = [images[first : first + recipe.eval_batch] for first in range(0, len(images), recipe.eval_batch)]
    loader = DataLoader(
        _SceneBatches(listing.pairs, batches, recipe.data.size, patch_grid(encoder, recipe.data.size), classes),
        batch_size=None,
        num_workers=min(default_workers() if recipe.data.workers is None else recipe.data.workers, len(batches)),
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    parts: dict[str, list[Tensor]] = {name: [] for name in (LABELS, IMAGES, *map(_tensor_name, blocks))}
    for batch, loaded in zip(batches, loader, strict=True):
        if isinstance(loaded, str):
            raise UserError(loaded)
        pixels, labels = loaded
        with torch.inference_mode(), autocast(recipe.train.precision, device):
            x = normalize(pixels.to(device, non_blocking=True).float() / 255, mean, std)
            tokens = [_normed(encoder, x, recipe.norm) for x in encoder.forward_tokens(x, [b - 1 for b in blocks])]
        mark_pace(VALIDATION, len(batch) * process_state().num_processes)
        kept = [_kept_patches(row, limit, image) for row, image in zip(labels, batch, strict=True)]
        for row, (image, chosen) in enumerate(zip(batch, kept, strict=True)):
            parts[LABELS].append(labels[row, chosen])
            parts[IMAGES].append(torch.full((len(chosen),), image, dtype=torch.int32))
            for block, x in zip(blocks, tokens, strict=True):
                patches = x[row, encoder.num_prefix_tokens :][chosen.to(x.device)]
                parts[_tensor_name(block)].append(to_storage(patches, dtype, "store").cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _normed(encoder: AnyEncoder, tokens: Tensor, norm: str) -> Tensor:
    if norm == "pretrained":
        return encoder.norm(tokens)
    return layer_norm(tokens.float(), tokens.shape[-1:], eps=NORM_EPS) if norm == "layer" else tokens


def _kept_patches(labels: Tensor, limit: int | None, image: int) -> Tensor:
    """Return the indices of the patches of an image to keep: all, or up to `limit` of the labeled ones."""
    if limit is None:
        return torch.arange(len(labels))
    [labeled] = torch.nonzero(labels != IGNORED, as_tuple=True)
    if len(labeled) <= limit:
        return labeled
    return labeled[torch.randperm(len(labeled), generator=generator("patches", image))[:limit].sort().values]


class _SceneBatches(Dataset):
    """Batch number -> (UInt8[b,3,S,S] images, UInt8[b,N] classes of the patches), or the message of a UserError."""

    def __init__(
        self, pairs: Sequence[ScenePair], batches: Sequence[range], size: int, grid: tuple[int, int], classes: int
    ):
        self.pairs, self.batches, self.size, self.grid, self.classes = pairs, batches, size, grid, classes

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | str:
        try:
            images, labels = zip(*(self._read(self.pairs[i]) for i in self.batches[number]), strict=True)
        except UserError as error:
            return str(error)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels))

    def _read(self, pair: ScenePair) -> tuple[np.ndarray, np.ndarray]:
        image, square = read_image(pair.image), (self.size, self.size)
        class_map = read_class_map(pair.class_map, (image.height, image.width), self.classes)
        resized = Image.fromarray(class_map).resize(square, Image.Resampling.NEAREST)
        pixels = np.asarray(image.resize(square, Image.Resampling.BICUBIC))
        return pixels, patch_labels(np.asarray(resized), self.grid)


def patch_labels(class_map: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the most frequent value in each cell of the grid, row by row: UInt8[H,W] -> UInt8[N]."""
    rows, columns = grid
    height, width = class_map.shape
    blocks = class_map.reshape(rows, height // rows, columns, width // columns).swapaxes(1, 2)
    cells, values = blocks.reshape(rows * columns, -1), 256
    offsets = values * np.arange(len(cells))[:, None]
    counts = np.bincount((cells + offsets).ravel(), minlength=values * len(cells)).reshape(-1, values)
    return counts.argmax(1).astype(np.uint8)


# -------------------- what a file depends on


def _tensor_name(block: int) -> str:
    return f"block{block}"


def _cache_key(
    encoder: AnyEncoder,
    recipe: Recipe,
    blocks: Sequence[int],
    listing: SceneListing,
    classes: int,
    limit: int | None,
) -> str:
    """Return a digest of everything the features depend on."""
    settings = [fingerprint(encoder), asdict(encoder.config), encoder.patch_size, list(blocks)]
    settings += [listing.digest(), listing.class_maps.digest()]
    settings += [recipe.data.size, limit, classes, recipe.norm, recipe.normalisation]
    settings += [recipe.train.precision, recipe.store, recipe.shard]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


def patch_grid(encoder: AnyEncoder, size: int) -> tuple[int, int]:
    """Return the rows and columns of patches of a square image of this side."""
    return size // encoder.patch_size, size // encoder.patch_size


def prepare_encoder(encoder: AnyEncoder, recipe: Recipe) -> None:
    """Move the encoder to the device, frozen. Raises UserError if its patches do not tile the resized images."""
    if recipe.data.size % encoder.patch_size:
        raise UserError(
            f"data.size: found {recipe.data.size}, expected a multiple of the model's patch size {encoder.patch_size}"
        )
    encoder.to(process_state().device).eval().requires_grad_(False)
    accelerate_model(encoder)
