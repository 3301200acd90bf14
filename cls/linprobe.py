"""`addp linprobe`: train a linear classifier on the features of a frozen encoder (App. D.2).

mode=full is the published protocol: random crops, LARS, a batch norm without affine parameters before the head.
mode=fast computes the features of each image once and tries many learning rates on them, for each block and pooling.
"""

import functools
from pathlib import Path

import torch

from addp_core.training.run_folder import prepare_out
from addp_core.weights.frozen import check_pretrained_norm
from cls.data import open_splits
from cls.probing.fast import run_fast
from cls.probing.full import check_batch_norm, run_full
from cls.probing.recipe import Recipe
from cls.probing.report import print_results


def run(recipe: Recipe) -> None:
    """Probe an encoder, or continue; end with results.json and `<out>/model.safetensors`, a classifier."""
    datasets = functools.cache(
        lambda: open_splits(recipe.data, recipe.val, recipe.val_share, recipe.train.seed, recipe.label_share)
    )
    if prepare_out(recipe.out, recipe, lambda: dict(zip(("train", "val"), datasets(), strict=True))):
        print_results(Path(recipe.out), recipe.mode)
        return
    if recipe.mode == "full":
        check_batch_norm(recipe)
    train_set, val_set = datasets()
    torch.manual_seed(recipe.train.seed)
    encoder = recipe.load_encoder(recipe.data.hw)
    if recipe.norm == "pretrained" and recipe.init == "pretrained":
        check_pretrained_norm(encoder, recipe.model, recipe.weights)
    run_mode = run_fast if recipe.mode == "fast" else run_full
    run_mode(recipe, encoder, train_set, val_set)
