"""The layouts that `addp export` writes, one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from addp_core.weights.architectures import HEAD_KEYS
from addp_core.weights.files import MODEL_FILE
from det.model import DETECTRON2_WEIGHTS
from seg.mmseg_export import CHECKPOINT_FILE
from tools.export.checkpoints import export_checkpoint, export_encoder
from tools.export.detectron2_folder import export_detectron2
from tools.export.mmseg_folder import export_mmseg
from tools.export.onnx_file import export_onnx
from tools.export.recipe import LayoutName, Recipe
from tools.export.timm_folder import export_timm

PARTS = ("tokenizer", "predictor", *HEAD_KEYS)  # keys of what is read as a whole ADDP
CLASSIFIER = ("img_size", "normalisation", "weights", "tokenizer_norm", "tokenizer", "encoder_heads")  # or encoder


@dataclass(frozen=True)
class Layout:
    """What `addp export` can write."""

    write: Callable[[Recipe, Path], None]
    """Write the file or folder and read it back; raises ValueError if the layout cannot hold the model."""
    suffix: str  # of the file; "" if it is a folder
    weights: str  # the file with the weights in the folder; "" if it is a file
    keys: tuple[str, ...]  # of the recipe, besides model, out and layout, that it uses


LAYOUTS: dict[LayoutName, Layout] = {
    "addp": Layout(export_checkpoint, ".safetensors", "", PARTS),
    "published": Layout(export_checkpoint, ".pth", "", PARTS),
    "encoder": Layout(export_encoder, ".safetensors", "", ("weights", *PARTS)),
    "timm": Layout(export_timm, "", MODEL_FILE, CLASSIFIER),
    "onnx": Layout(export_onnx, ".onnx", "", CLASSIFIER),
    "detectron2": Layout(export_detectron2, "", DETECTRON2_WEIGHTS, CLASSIFIER),
    "mmseg": Layout(export_mmseg, "", CHECKPOINT_FILE, CLASSIFIER),
}
