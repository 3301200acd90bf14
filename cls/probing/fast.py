"""The fast mode of `addp linprobe`: linear heads of many learning rates, and k-NN, on features computed once.

For each block and pooling, the heads of all learning rates are trained together, as one tensor. The learning rate is
chosen on a fraction of the training images that these heads have not seen; a head with this learning rate is then
trained on all of them, and only this one is evaluated on the validation images. An interrupted run continues from what
is on disk: features in files of `fast.shard` images, and one file for each head.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace
from addp_core.base.paths import expand_home
from addp_core.data.images import eval_transform
from addp_core.data.sources import ImageSource
from addp_core.networks.classifier import Classifier, Pooling
from addp_core.networks.pooled_features import PooledFeatures
from addp_core.training.compute import accelerate_model
from addp_core.training.pace import HEADS, mark_pace
from addp_core.training.precision import matrix_width
from addp_core.training.probes import LinearHeads, NearestNeighbors, held_out_count, train_best_head, train_heads
from addp_core.training.processes import process_state
from addp_core.training.run_folder import mark_finished, release_out, settle_precision
from addp_core.weights.files import MODEL_FILE
from addp_core.weights.fitting import AnyEncoder
from addp_core.weights.frozen import resolve_block, spaced_blocks
from addp_core.weights.pretrained import NORMALISATION
from addp_core.weights.saving import save_model
from cls.data import evaluation_crop
from cls.probing.features import FeatureBank, compute_features, truncate
from cls.probing.recipe import Recipe
from cls.probing.report import best_row, metric_names, print_results, write_results

log = logging.getLogger("addp")

Row = dict[str, Any]  # of the results: block, pooling, learning rate and metrics
ROW, KEY = "row", "key"  # entries in the metadata of a head's file


def run_fast(recipe: Recipe, encoder: AnyEncoder, train_set: ImageSource, val_set: ImageSource) -> None:
    """Compute what is not on disk yet; end with a table on stdout and the best classifier in the run folder."""
    config, out = recipe.fast, Path(recipe.out)
    state = process_state()
    settle_precision(out, recipe, recipe.train, matrix_width(encoder))
    requested = config.blocks or spaced_blocks(encoder.depth, config.spaced, encoder.first_wide_block)
    blocks = sorted({resolve_block(encoder, block, "fast.blocks") for block in requested})
    classes = len(train_set.classes)
    train_bank = _features(recipe, encoder, blocks, "train", train_set, config.mirrored)
    val_bank = _features(recipe, encoder, blocks, "val", val_set, mirrored=False)

    key = _head_key(recipe, train_bank, val_bank, classes)
    settings = [(block, pooling) for block in blocks for pooling in config.poolings]
    mark_pace(HEADS, 0)
    for block, pooling in settings[state.process_index :: state.num_processes]:
        path = _head_path(out, block, pooling)
        if _read_row(path, key) is None:
            row, head = probe_block(recipe, train_bank, val_bank, block, pooling, classes, state.device)
            _write_head(path, row, head, key)
            metrics = ", ".join(f"{name} {row[name]:.2f}" for name in metric_names(row))
            log.info("block %d %s: %s", block, pooling, metrics)
        mark_pace(HEADS, state.num_processes / len(settings))
    state.wait_for_everyone()
    if state.is_main_process:
        stored = [_read_row(_head_path(out, block, pooling), key) for block, pooling in settings]
        rows = [row for row in stored if row is not None]
        best = best_row(rows, config)
        sizes = {"classes": classes, "train_images": len(train_bank), "val_images": len(val_bank)}
        write_results(out, rows, best, config, norm=recipe.norm, **sizes)
        save_model(_best_classifier(recipe, best, encoder, train_set.classes), out / MODEL_FILE)
        mark_finished(out, recipe, {})
        print_results(out, recipe.mode)
    state.wait_for_everyone()
    release_out(out)


def _features(
    recipe: Recipe,
    encoder: AnyEncoder,
    blocks: list[int],
    title: str,
    source: ImageSource,
    mirrored: bool,
) -> FeatureBank:
    """Return the features of a dataset's center crops, and of their mirror images if `mirrored`."""
    config = recipe.fast
    mean, std = NORMALISATION[recipe.normalisation]
    model = PooledFeatures(encoder, blocks, config.poolings, mirrored, recipe.norm)
    model.to(process_state().device).eval().requires_grad_(False)
    accelerate_model(model, recipe.train.compile, recipe.train.channels_last)
    return compute_features(
        model,
        source,
        eval_transform(recipe.data.hw, evaluation_crop(recipe.data.hw, recipe.eval_crop)),
        expand_home(config.cache) if config.cache else Path(recipe.out) / "features",
        title=title,
        store=config.store,
        shard=config.shard,
        mean=mean,
        std=std,
        batch=recipe.eval_batch,
        precision=recipe.train.precision,
        workers=recipe.data.workers,
        max_errors=recipe.data.max_errors,
    )


# -------------------- one block and pooling


def probe_block(
    recipe: Recipe,
    train_bank: FeatureBank,
    val_bank: FeatureBank,
    block: int,
    pooling: Pooling,
    classes: int,
    device: torch.device,
) -> tuple[Row, LinearHeads]:
    """Return the row of results of one block and pooling, and the head with the best learning rate."""
    config, seed = recipe.fast, recipe.train.seed
    features, labels = train_bank.load(block, pooling).to(device), train_bank.labels.to(device)  # [n,V,W]
    val_features, val_labels = val_bank.load(block, pooling)[:, 0].to(device), val_bank.labels.to(device)
    if config.held_out:
        if held_out_count(len(features), config.held_out) == len(features):
            raise UserError(f"fast.held_out={config.held_out}: leaves none of the {len(features)} images to train on")
        head, accuracies = train_best_head(features, labels, classes, config.lrs, config, seed, config.held_out)
        best = int(accuracies.argmax())
    else:
        heads = train_heads(features, labels, torch.arange(len(features)), classes, config.lrs, config, seed)
        accuracies = heads.accuracy(val_features, val_labels)
        best = int(accuracies.argmax())
        head = heads.select(best)
    row: Row = {"block": block, "pooling": pooling, "lr": config.lrs[best]}
    if config.held_out:
        row["held_out"] = accuracies[best].item()
    row |= {f"top{k}": head.accuracy(val_features, val_labels, k).item() for k in (1, 5)}
    if config.knn:
        row["knn"] = NearestNeighbors(features[:, 0], labels, classes, config.knn).accuracy(val_features, val_labels)
    return row | {"sweep": accuracies.tolist()}, head


# -------------------- heads on disk


def _head_key(recipe: Recipe, train_bank: FeatureBank, val_bank: FeatureBank, classes: int) -> str:
    """Return a digest of everything the heads depend on."""
    settings = asdict(recipe.fast)
    for key in ("cache", "spaced"):  # where features are, and which blocks are probed, change no head
        settings.pop(key)
    content = [train_bank.key, val_bank.key, classes, recipe.train.seed, settings]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _head_path(out: Path, block: int, pooling: str) -> Path:
    return out / "heads" / f"block{block}-{pooling}.safetensors"


def _write_head(path: Path, row: Row, head: LinearHeads, key: str) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in vars(head).items()}
        with atomic_replace(path) as temporary:
            save_file(tensors, temporary, {KEY: key, ROW: json.dumps(row)})
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _read_row(path: Path, key: str) -> Row | None:
    """Return the row of results of a head's file, or None if there is no such file or it has another key."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return json.loads(metadata[ROW]) if metadata[KEY] == key else None


def _best_classifier(recipe: Recipe, row: Row, encoder: AnyEncoder, class_names: tuple[str, ...]) -> Classifier:
    """Return the encoder up to the row's block with its head; the standardization becomes batch norm statistics."""
    mean, std = NORMALISATION[recipe.normalisation]
    truncate(encoder, row["block"])
    options = (class_names, mean, std, recipe.eval_crop, recipe.norm)
    model = Classifier(encoder, len(class_names), row["pooling"], "batch", *options)
    norm, head = cast(nn.BatchNorm1d, model.fc_norm), cast(nn.Linear, model.head)
    with safe_open(_head_path(Path(recipe.out), row["block"], row["pooling"]), "pt") as file:
        norm.running_mean, norm.running_var = file.get_tensor("mean"), file.get_tensor("variance")
        head.weight = nn.Parameter(file.get_tensor("weight")[0])
        head.bias = nn.Parameter(file.get_tensor("bias")[0])
    return model
