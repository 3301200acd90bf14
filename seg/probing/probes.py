"""The probes of one block, trained on stored features and evaluated; each is kept in a file of its own on disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace
from addp_core.base.rng import generator
from addp_core.training.probes import (
    CHUNK,
    LinearHeads,
    NearestNeighbors,
    mean_and_variance,
    standardize,
    train_heads,
)
from seg.probing.evaluation import evaluate, patch_miou
from seg.probing.features import PatchBank
from seg.probing.recipe import ProbeTraining, Recipe
from seg.scenes import IGNORED, SceneListing, class_map_folder
from seg.test import MAPS_FOLDER

Row = dict[str, Any]  # of the results: block, probe, learning rate and metrics
Tensors = dict[str, Tensor]
Score = Callable[[Tensor], Tensor]  # features [n,W] -> scores Float[n,C]
ROW, KEY, PREVIEW = "row", "key", "preview"  # entries in a probe's file


@dataclass
class Scenes:
    """What the probes are trained and evaluated on."""

    train: PatchBank
    val: PatchBank
    listing: SceneListing  # of the validation split
    classes: tuple[str, ...]
    grid: tuple[int, int]  # rows and columns of patches
    device: torch.device

    def split(self, config: ProbeTraining) -> tuple[Tensor, Tensor]:
        """Return the indices of the patches of the training images that are not held out, and of those that are.

        Raises UserError if all images with labels are held out.
        """
        images = self.train.images.unique()
        order = images[torch.randperm(len(images), generator=generator(config.seed, "held out"))]
        held_out = torch.isin(self.train.images, order[: config.held_out_images(len(images))])
        [chosen], [held] = (~held_out).nonzero(as_tuple=True), held_out.nonzero(as_tuple=True)
        return chosen, held


def probe_block(recipe: Recipe, scenes: Scenes, block: int, probe: str) -> tuple[Row, Tensors]:
    """Return the row of results of one probe, and the tensors of its file."""
    features, labels = scenes.train.load(block).to(scenes.device), scenes.train.labels.to(scenes.device)
    fit = _fit_linear if probe == "linear" else _fit_neighbors
    row, tensors, score = fit(recipe, scenes, block, features, labels)
    result = evaluate(
        score,
        scenes.val,
        block,
        scenes.listing.pairs,
        scenes.classes,
        scenes.grid,
        scenes.device,
        maps=Path(recipe.out) / MAPS_FOLDER / f"block{block}-{probe}" if recipe.maps else None,
        root=class_map_folder(recipe.data.source, "val"),
        preview=recipe.preview,
    )
    tensors |= {f"{PREVIEW}{i:04}": class_map for i, class_map in enumerate(result.previews)}
    return {"block": block, "probe": probe, **row, **result.means, "iou": result.iou}, tensors


def _fit_linear(
    recipe: Recipe, scenes: Scenes, block: int, features: Tensor, labels: Tensor
) -> tuple[Row, Tensors, Score]:
    """Return learning rate and held-out mIoU, the head's tensors, and the function that scores features."""
    config, classes, everything = recipe.train, len(scenes.classes), torch.arange(len(features))

    def train(chosen: Tensor, lrs: Sequence[float]) -> LinearHeads:
        return train_heads(features[:, None], labels, chosen, classes, lrs, config, config.seed)

    if config.held_out:
        chosen, held = scenes.split(config)
        sweep = _patch_mious(train(chosen, config.lrs), features[held.to(labels.device)], labels[held], classes)
        lr = config.lrs[int(np.argmax(sweep))]
        row, head = {"lr": lr, "held_out": max(sweep), "sweep": sweep}, train(everything, [lr])
    else:
        heads = train(everything, config.lrs)
        val_features, val_labels = scenes.val.load(block).to(labels.device), scenes.val.labels.to(labels.device)
        sweep = _patch_mious(heads, val_features[val_labels != IGNORED], val_labels[val_labels != IGNORED], classes)
        best = int(np.argmax(sweep))
        row, head = {"lr": config.lrs[best], "sweep": sweep}, heads.select(best)
    tensors = {name: value.cpu().contiguous() for name, value in vars(head).items()}
    return row, tensors, lambda patches: head.logits(head.standardize(patches))[:, 0]


def _patch_mious(heads: LinearHeads, features: Tensor, labels: Tensor, classes: int) -> list[float]:
    """Return the mIoU over patches of the head of each learning rate."""
    predicted = torch.cat([heads.logits(heads.standardize(part)).argmax(2) for part in features.split(CHUNK)])
    return [patch_miou(column, labels, classes) for column in predicted.unbind(1)]


def _fit_neighbors(
    recipe: Recipe, scenes: Scenes, block: int, features: Tensor, labels: Tensor
) -> tuple[Row, Tensors, Score]:
    """Return the held-out mIoU, the tensors of the standardization, and the function that scores features."""
    config, classes = recipe.train, len(scenes.classes)

    def fit(chosen: Tensor) -> tuple[Tensors, Score]:
        mean, variance = mean_and_variance(features, chosen)
        drawn = chosen[torch.randperm(len(chosen), generator=generator(config.seed, "bank"))[: recipe.bank]]
        drawn = drawn.to(features.device)
        neighbors = NearestNeighbors(standardize(features[drawn], mean, variance), labels[drawn], classes, recipe.k)
        tensors = {"mean": mean.cpu(), "variance": variance.cpu()}
        return tensors, lambda patches: neighbors.votes(standardize(patches, mean, variance))

    row: Row = {}
    if config.held_out:
        chosen, held = (indices.to(features.device) for indices in scenes.split(config))
        _, score = fit(chosen.cpu())
        predicted = torch.cat([score(part).argmax(1) for part in features[held].split(CHUNK)])
        row["held_out"] = patch_miou(predicted, labels[held], classes)
    return row, *fit(torch.arange(len(features)))


# -------------------- on disk


def probe_key(recipe: Recipe, scenes: Scenes) -> str:
    """Return a digest of everything the probes depend on."""
    content: list[Any] = [scenes.train.key, scenes.val.key, list(scenes.classes), asdict(recipe.train)]
    content += [recipe.k, recipe.bank, recipe.maps, recipe.preview]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def probe_path(out: Path, block: int, probe: str) -> Path:
    """Return the path of a probe's file."""
    return out / "probes" / f"block{block}-{probe}.safetensors"


def write_probe(path: Path, row: Row, tensors: Tensors, key: str) -> None:
    """Write a probe's file. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_replace(path) as temporary:
            save_file(tensors, temporary, {KEY: key, ROW: json.dumps(row)})
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def read_row(path: Path, key: str) -> Row | None:
    """Return the row of results in a probe's file, or None if there is no such file or it has another key."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return json.loads(metadata[ROW]) if metadata[KEY] == key else None


def read_previews(path: Path) -> list[np.ndarray]:
    """Return the first class maps in a probe's file, UInt8[H,W] each."""
    with safe_open(path, "pt") as file:
        names = sorted(name for name in file.keys() if name.startswith(PREVIEW))  # noqa: SIM118 (it is no mapping)
        return [file.get_tensor(name).numpy() for name in names]
