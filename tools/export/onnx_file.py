"""layout=onnx: one ONNX file."""

import json
import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace
from addp_core.networks.classifier import Classifier
from tools.export.compare import check_equal, load_exported, random_images, removed_on_failure
from tools.export.recipe import Recipe

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_BATCH = 2**31 - 1  # without a bound, torch 2.6 exports the batch of the example


def export_onnx(recipe: Recipe, out: Path) -> None:
    """Write one ONNX file with mean, std and class names in its metadata.

    It maps images (Float[batch,3,H,W], normalized) to logits, or for an encoder to its tokens before the final norm
    (Float[batch,1+N,D]).
    """
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"layout=onnx: not installed: {', '.join(missing)}; pip install 'addp[onnx]'")
    model = load_exported(recipe)
    name, module = ("logits", model) if model.num_classes else ("features", FeatureModel(model))
    out.parent.mkdir(parents=True, exist_ok=True)
    program = _quietly(
        lambda: torch.onnx.export(
            module,
            (random_images(model, 2),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=[name],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},),
        )
    )
    metadata = {"mean": model.mean, "std": model.std, "class_names": model.class_names}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items() if value})
    with atomic_replace(out) as temporary:
        program.save(temporary, external_data=False)

    import onnxruntime

    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = random_images(model, batch)
        (output,) = session.run([name], {"images": images.numpy()})
        with removed_on_failure(out), torch.inference_mode():
            check_equal(out, f"{name} of {batch}", module(images), torch.from_numpy(output))


class FeatureModel(nn.Module):
    """An encoder whose forward pass is `forward_features`."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.encoder = model.encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.forward_features(images)


def _quietly(function: Callable[[], Any]) -> Any:
    """Call the function without warnings and log messages: the exporter's notes on its passes do not help users."""
    level = logging.getLogger("onnxscript").level
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function()
    finally:
        logging.getLogger("onnxscript").setLevel(level)
