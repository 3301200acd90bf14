"""layout=detectron2: a folder of model_final.pth and config.yaml for detectron2's own scripts."""

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.weights.encoders import load_encoder
from addp_core.weights.reading import read_weights
from det.config import vitdet_attention
from det.model import DETECTRON2_CONFIG, DETECTRON2_WEIGHTS, KIND, load_detector
from tools.export.compare import FIXED_KEYS, check_equal, given_heads, refuse_keys, removed_on_failure
from tools.export.recipe import Recipe


def export_detectron2(recipe: Recipe, out: Path) -> None:
    """Write a trained detector as detectron2 reads it, or a pretrained encoder with a config that trains over it.

    Raises UserError if the model is neither, or detectron2 is not installed.
    """
    if find_spec("detectron2") is None:
        raise UserError("layout=detectron2: it is not installed; `addp doctor` shows the command to install it")
    from det.native.export import write_detector, write_encoder

    if read_weights(recipe.model, heads=given_heads(recipe), wanted=recipe.weights).kind == KIND:
        refuse_keys(recipe, FIXED_KEYS, "detector")
        detector = load_detector(recipe.model)
        out.mkdir(parents=True, exist_ok=True)
        _check(out, *write_detector(detector, out))
        return
    encoder = load_encoder(
        recipe.model,
        recipe.img_size,
        encoder_heads=recipe.encoder_heads,
        weights=recipe.weights,
        tokenizer_norm=recipe.tokenizer_norm,
        attention=vitdet_attention(),
        drop_path=0.1,
        dynamic=True,
        tokenizer=recipe.tokenizer or None,
        stages=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    _check(out, *write_encoder(encoder, recipe.normalisation or "imagenet", out))


def _check(out: Path, found: Tensor, expected: Tensor) -> None:
    """Remove the export and raise RuntimeError if the maps of detectron2's model are not those of ours."""
    with removed_on_failure(out / DETECTRON2_CONFIG, out / DETECTRON2_WEIGHTS):
        check_equal(out, "feature maps", expected, found)
