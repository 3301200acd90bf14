"""`addp seg probe`: mIoU of small probes on the patch tokens of a frozen encoder.

Two probes are trained for each block: a batch norm without affine parameters with a linear layer, of several learning
rates at once, and the vote of the nearest training patches (k-NN). The features of all patches are computed once and
stored on disk. Scores of patches are enlarged to the size of the annotation, and evaluated as `addp seg test` does.

The same command continues a stopped run from its files of features and of finished probes.

References: CAPI (arXiv 2502.08769) and DINOv3 (arXiv 2508.10104), whose code docs/segmentation.md compares.
"""

import functools
import logging
from pathlib import Path

import torch

from addp_core.base.launch import rank
from addp_core.training.pace import HEADS, mark_pace
from addp_core.training.precision import matrix_width
from addp_core.training.processes import process_state
from addp_core.training.run_folder import mark_finished, prepare_out, release_out, settle_precision
from addp_core.weights.fitting import AnyEncoder
from addp_core.weights.frozen import check_pretrained_norm, resolve_block, spaced_blocks
from seg.mmseg_config import import_mmseg
from seg.probing.recipe import Recipe as Recipe
from seg.scenes import ClassMaps, SceneListing, check_scenes, read_class_names, recorded_datasets

log = logging.getLogger("addp")


def run(recipe: Recipe) -> None:
    """Probe an encoder, or continue; end with results.json and a table on stdout.

    Raises UserError if the recipe, the encoder or the dataset cannot be used.
    """
    import_mmseg()
    from seg.probing.report import RESULTS, print_results

    out = Path(recipe.out)
    listings = functools.cache(lambda: {split: SceneListing(recipe.data.source, split) for split in ("train", "val")})

    def datasets() -> dict[str, SceneListing | ClassMaps]:
        recipe.train.held_out_images(len(listings()["train"]))  # not after all features have been computed
        return recorded_datasets(listings())

    if prepare_out(out, recipe, datasets, RESULTS):
        print_results(out)
        return
    try:
        classes = read_class_names(recipe.data.source, recipe.data.classes)
        if rank() == 0:
            check_scenes(recipe.data, classes)
        torch.manual_seed(recipe.train.seed)
        encoder = recipe.load_encoder(recipe.data.size)
        if recipe.norm == "pretrained" and recipe.init == "pretrained":
            check_pretrained_norm(encoder, recipe.model, recipe.weights)
        probe(recipe, encoder, listings(), classes)
        print_results(out)
    finally:
        release_out(out)


def probe(recipe: Recipe, encoder: AnyEncoder, listings: dict[str, SceneListing], classes: tuple[str, ...]) -> None:
    """Compute what is not on disk yet, and write the results."""
    from seg.probing import report
    from seg.probing.features import compute_bank, patch_grid, prepare_encoder
    from seg.probing.probes import Scenes, probe_block, probe_key, probe_path, read_previews, read_row, write_probe

    out, state = Path(recipe.out), process_state()
    requested = recipe.blocks or spaced_blocks(encoder.depth, recipe.spaced, encoder.first_wide_block)
    blocks = sorted({resolve_block(encoder, block, "blocks") for block in requested})
    settle_precision(out, recipe, recipe.train, matrix_width(encoder))
    prepare_encoder(encoder, recipe)
    banks = [compute_bank(encoder, recipe, blocks, split, listings[split], len(classes)) for split in ("train", "val")]
    scenes = Scenes(banks[0], banks[1], listings["val"], classes, patch_grid(encoder, recipe.data.size), state.device)
    key = probe_key(recipe, scenes)
    settings = [(block, name) for block in blocks for name in recipe.probes]
    mark_pace(HEADS, 0)
    for block, name in settings[state.process_index :: state.num_processes]:
        path = probe_path(out, block, name)
        if read_row(path, key) is None:
            row, tensors = probe_block(recipe, scenes, block, name)
            write_probe(path, row, tensors, key)
            log.info("block %d %s: mIoU %.2f", block, name, row["mIoU"])
        mark_pace(HEADS, state.num_processes / len(settings))
    state.wait_for_everyone()
    if state.is_main_process:
        stored = [read_row(probe_path(out, block, name), key) for block, name in settings]
        rows = [row for row in stored if row is not None]
        best = report.best_rows(rows, recipe)
        report.write_results(out, recipe, scenes, rows, best)
        report.plot_by_block(rows, out / "images" / "blocks.png")
        predictions = {
            f"{report.PROBE_NAMES[name]}, block {row['block']}": read_previews(probe_path(out, row["block"], name))
            for name, row in best.items()
        }
        report.draw_predictions(scenes.listing.pairs, predictions, len(classes), out / "images" / "predictions.png")
        mark_finished(out, recipe, {})
    state.wait_for_everyone()
