"""layout=mmseg: a folder of config.py and model.pth for mmseg's own tools."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.rng import generator
from addp_core.weights.encoders import load_encoder
from addp_core.weights.files import read_file
from addp_core.weights.reading import read_weights
from seg.mmseg_checkpoint import is_runner_checkpoint
from seg.segmentor import SEGMENTOR_KIND, load_segmentor
from tools.export.compare import FIXED_KEYS, check_equal, given_heads, refuse_keys, removed_on_failure
from tools.export.recipe import Recipe

CROP = 512  # pixels: of the training on ADE20K


def export_mmseg(recipe: Recipe, out: Path) -> None:
    """Write a trained segmentor as mmseg reads it, or a pretrained encoder with a config that trains over it.

    Raises UserError if the model is neither, or mmseg is not installed.
    """
    if find_spec("mmseg") is None:
        raise UserError("layout=mmseg: mmseg is not installed; pip install 'addp[seg]'")
    content = read_file(recipe.model, recipe.weights)
    if is_runner_checkpoint(content):
        raise UserError(f"model: {recipe.model} is a checkpoint of mmengine's Runner already; mmseg reads it as it is")
    is_segmentor = content.description is not None and content.description.get("kind") == SEGMENTOR_KIND
    (_export_segmentor if is_segmentor else _export_encoder)(recipe, out)


def _export_segmentor(recipe: Recipe, out: Path) -> None:
    from seg.mmseg_checkpoint import MmsegSegmentor
    from seg.mmseg_export import compare_segmentor, write_segmentor

    refuse_keys(recipe, FIXED_KEYS, "segmentor")
    segmentor, state = load_segmentor(recipe.model)
    assert not isinstance(segmentor, MmsegSegmentor)  # as the file has a description
    out.mkdir(parents=True, exist_ok=True)
    write_segmentor(segmentor, state, out)
    _check(out, "logits", lambda: compare_segmentor(segmentor, state, out, _random_images(segmentor.crop)))


def _export_encoder(recipe: Recipe, out: Path) -> None:
    from seg.mmseg_export import compare_encoder, write_encoder

    file = read_weights(recipe.model, heads=given_heads(recipe), wanted=recipe.weights)
    normalisation = recipe.normalisation or "imagenet"
    options: dict[str, Any] = {"encoder_heads": recipe.encoder_heads, "weights": recipe.weights}
    options |= {"tokenizer": recipe.tokenizer or None, "normalisation": normalisation}
    norm = file.kind != "predictor" and any(name.endswith("tokenizer_norm.weight") for name in file.state)
    whole = load_encoder(recipe.model, None, tokenizer_norm=norm, **options)
    out.mkdir(parents=True, exist_ok=True)
    crop = recipe.img_size or CROP
    with renaming_keys({"data.crop": "img_size"}):
        write_encoder(whole, out, crop, recipe.tokenizer_norm, normalisation)
    images = _random_images(crop)
    _check(out, "feature maps", lambda: compare_encoder(recipe.model, out, images, recipe.tokenizer_norm, options))


def _random_images(crop: int) -> Tensor:
    """Return two random images Float[2,3,H,W], distributed like normalized ones."""
    return torch.randn(2, 3, crop, crop, generator=generator("export", crop))


def _check(out: Path, name: str, compare: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Remove the export if mmseg's model cannot be built, or if its outputs are not those of ours (RuntimeError)."""
    from seg.mmseg_export import CHECKPOINT_FILE, CONFIG_FILE

    with removed_on_failure(out / CONFIG_FILE, out / CHECKPOINT_FILE):
        check_equal(out, name, *compare())
