"""`addp tokenizer cache`: the ids of K random crops of each image, computed once, so that the later stages neither
decode nor tokenize images (`data.tokens=<out>` of `addp predictor` and `addp pretrain`).

The crops are those of the first K epochs of a run with the same `seed` and the same keys of `data`, mirror images
included: such a run has the same losses with and without the cache. From then on, it sees the same crops again. The
ids take 2 bytes for each token: 512 for a crop at 256 px. A stopped command continues with the file it was at; several
processes share the files.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace, check_space, write_atomically
from addp_core.base.launch import rank
from addp_core.base.paths import TOKENS_FILE
from addp_core.data.images import pretrain_transform
from addp_core.data.sources import ImageSource, open_source
from addp_core.data.stream import Stream
from addp_core.networks.tokenizer import Tokenizer
from addp_core.training.compute import accelerate_model, autocast
from addp_core.training.processes import process_state
from addp_core.training.run_folder import lock_out, release_out
from addp_core.weights.fingerprint import fingerprint
from pretrain.common import load_frozen_tokenizer
from pretrain.recipe import TokenCacheRecipe as Recipe
from pretrain.tokens import MAX_CODES, TokenCacheKey, as_record, file_name, read_record

log = logging.getLogger("addp")


def run(recipe: Recipe) -> None:
    """Compute the ids that are missing. Raises UserError if `out` holds a cache of other crops or cannot be written."""
    state, out = process_state(), Path(recipe.out)
    tokenizer, grid = load_frozen_tokenizer(recipe.model, recipe.data)
    if tokenizer.config.codebook > MAX_CODES:
        raise UserError(f"model: found {tokenizer.config.codebook:,} codes, expected at most {MAX_CODES:,}")
    source = open_source(recipe.data)
    key = replace(TokenCacheKey.of(recipe.data, recipe.interpolation, source), tokenizer=fingerprint(tokenizer))
    record = as_record(key) | {
        "crops": recipe.crops,
        "seed": recipe.seed,
        "grid": list(grid),
        "cache": recipe.data.cache,  # which changes pixels slightly, and no run that reads ids uses
        "rows_per_file": recipe.rows_per_file,
    }
    rows = recipe.crops * len(source)
    try:
        if rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            lock_out(out)
            _claim(out, record)
        state.wait_for_everyone()
        missing = [i for i in range(-(-rows // recipe.rows_per_file)) if not (out / file_name(i)).exists()]
        if rank() == 0:
            _check_space(out, rows, grid[0] * grid[1], len(missing), recipe)
        state.wait_for_everyone()  # all have listed what is missing
        _write_files(recipe, source, tokenizer, missing[state.process_index :: state.num_processes], rows)
        state.wait_for_everyone()
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror or error})") from error
    finally:
        release_out(out)
    log.info("tokens: complete; give data.tokens=%s to `addp predictor` and `addp pretrain`", out)


def _claim(out: Path, record: dict) -> None:
    """Write tokens.json, unless the same is there. Raises UserError if there is another one."""
    if (out / TOKENS_FILE).exists():
        found = read_record(out)
        for name in record:
            if found.get(name) != record[name]:
                raise UserError(
                    f"out={out}: holds a token cache with {name}={found.get(name)}, expected {record[name]}; "
                    "choose another folder"
                )
        return
    write_atomically(out / TOKENS_FILE, json.dumps(record, indent=1).encode())


def _check_space(out: Path, rows: int, tokens: int, missing: int, recipe: Recipe) -> None:
    """Log how large the cache will be. Raises UserError if the disk is too small for what is missing."""
    size = 2 * rows * tokens
    crops, images = recipe.crops, f"{rows // recipe.crops:,}"
    log.info(
        "tokens: %d crops of %s images, %d ids each: %s MB in %s; %d files of %s crops to compute",
        *(crops, images, tokens, f"{size / 1e6:,.1f}", out, missing, f"{recipe.rows_per_file:,}"),
    )
    needed = min(size, 2 * missing * recipe.rows_per_file * tokens)
    check_space(out, needed, f"out: {out} needs", "choose fewer crops or another disk")


def _write_files(recipe: Recipe, source: ImageSource, tokenizer: Tokenizer, numbers: list[int], rows: int) -> None:
    """Compute and write the files with these numbers."""
    if not numbers:
        return
    device = process_state().device
    tokenizer = tokenizer.to(device).requires_grad_(False)
    accelerate_model(tokenizer)
    transform = pretrain_transform(recipe.data, recipe.interpolation)
    stream = Stream(source, transform, recipe.data, seed=recipe.seed, batch=recipe.batch)
    lengths = {i: min(recipe.rows_per_file, rows - i * recipe.rows_per_file) for i in numbers}
    with tqdm(total=sum(lengths.values()), desc="tokens", unit="img", disable=rank() != 0) as progress:
        batches: Iterator | None = None
        for previous, number in zip([-1, *numbers], numbers, strict=False):
            if batches is None or number != previous + 1:
                batches = stream.batches(number * recipe.rows_per_file // recipe.batch)
            parts, done = [], 0
            while done < lengths[number]:
                parts.append(_encode(tokenizer, next(batches).images.to(device)))
                progress.update(min(len(parts[-1]), lengths[number] - done))
                done += len(parts[-1])
            path = Path(recipe.out) / file_name(number)
            with atomic_replace(path) as temporary, open(temporary, "wb") as file:
                np.save(file, np.concatenate(parts)[: lengths[number]])
        if batches is not None:
            batches.close()  # type: ignore[attr-defined]  # a generator, which stops its workers


@torch.no_grad()
def _encode(tokenizer: Tokenizer, images: torch.Tensor) -> np.ndarray:
    """Float[B,3,H,W] in [0,1] -> UInt16[B,N]"""
    with autocast("fp32", images.device):
        return tokenizer.encode(images).cpu().numpy().astype(np.uint16)
