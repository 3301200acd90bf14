"""`addp export`: write a checkpoint in another layout and check it by reading it back.

Files of the layouts `timm` and `onnx` can be used without this project. The outputs of the exported model are compared
with those of the original on random images before the export counts as done.
"""

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from annotated_types import Ge
from safetensors.torch import save_file
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace, write_atomically
from addp_core.base.rng import generator
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import VIT_SIZES
from addp_core.weights.architectures import recipe_heads
from addp_core.weights.encoders import load_encoder
from addp_core.weights.files import MODEL_FILE, read_tensors
from addp_core.weights.layouts.published import from_published
from addp_core.weights.layouts.vit import to_timm
from addp_core.weights.loading import load_addp, load_classifier
from addp_core.weights.reading import read_weights
from addp_core.weights.saving import save_model, save_published
from cls.data import classifier_crop

log = logging.getLogger("addp")

TOLERANCE = 1e-4  # for the largest difference of two outputs, relative to the largest output
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SUFFIX = {"addp": ".safetensors", "published": ".pth", "encoder": ".safetensors", "timm": "", "onnx": ".onnx"}


@dataclass
class Recipe:
    """Keys of `addp export`."""

    model: Annotated[
        str,
        "a run of `addp pretrain`, an ADDP file (ours or published), or hf://owner/repository/file; for timm and onnx "
        "also a run of `addp finetune` or `addp linprobe`, or a ViT file",
    ]
    out: Annotated[
        str, "file to write, .safetensors (addp, encoder), .pth (published) or .onnx, or the folder of layout=timm"
    ]
    layout: Annotated[
        Literal["addp", "published", "encoder", "timm", "onnx"],
        "ours, the authors' (which their code reads), the pixel encoder alone, a folder for timm.create_model, or ONNX",
    ] = "addp"
    img_size: Annotated[
        int | None, Ge(1), "timm, onnx: side of the images in pixels (default: the classifier's own; 224 for encoders)"
    ] = None
    tokenizer_norm: Annotated[bool, "timm, onnx: keep ADDP's norm on the patches, which transfers drop"] = False
    tokenizer: Annotated[str, "tokenizer for a model file without one"] = ""
    predictor: Annotated[str, "token predictor for a model file without one"] = ""
    encoder_heads: Annotated[
        int | None, Ge(1), "heads of a foreign file, if not those of published ViTs of its width"
    ] = None
    decoder_heads: Annotated[int | None, Ge(1), "decoder heads of a published file, if not 16"] = None
    predictor_heads: Annotated[
        int | None, Ge(1), "heads of a foreign file, if not those of published ViTs of its width"
    ] = None
    predictor_decoder_heads: Annotated[int | None, Ge(1), "decoder heads of a published file, if not 16"] = None


def run(recipe: Recipe) -> None:
    """Write the layout, read it back and compare.

    Raises UserError if the layout cannot hold the model, and RuntimeError if the outputs differ.
    """
    out = Path(recipe.out)
    if recipe.layout == "timm" and (out.is_file() or out.suffix in (".safetensors", ".pth", ".onnx")):
        raise UserError(f"out: found {out.name}, expected a folder for layout=timm")
    if recipe.layout != "timm" and out.suffix != SUFFIX[recipe.layout]:
        raise UserError(
            f"out: found {out.name}, expected a name that ends in {SUFFIX[recipe.layout]} for layout={recipe.layout}"
        )
    exporter = {"timm": export_timm, "onnx": export_onnx}.get(recipe.layout, export_checkpoint)
    for key in ("img_size", "tokenizer_norm"):
        if exporter is export_checkpoint and getattr(recipe, key):
            raise UserError(f"{key}: layout={recipe.layout} keeps the model as it is; expected layout=timm or onnx")
    try:
        exporter(recipe, out)
    except ValueError as error:
        raise UserError(f"layout={recipe.layout}: {error}") from error
    except OSError as error:
        raise UserError(
            f"out: {out} cannot be written ({error.strerror or error}); expected free space and permission"
        ) from error
    size = sum(p.stat().st_size for p in out.iterdir()) if out.is_dir() else out.stat().st_size
    log.info("%s: %.1f MB", out, size / 1e6)


def export_checkpoint(recipe: Recipe, out: Path) -> None:
    """Write the whole model in our layout or the published one, or its encoder alone."""
    model = load_addp(
        recipe.model, tokenizer=recipe.tokenizer or None, predictor=recipe.predictor or None, **recipe_heads(recipe)
    )
    part = model.denoiser.encoder if recipe.layout == "encoder" else model
    out.parent.mkdir(parents=True, exist_ok=True)
    save_published(model, out) if recipe.layout == "published" else save_model(part, out)
    again = from_published(read_tensors(out)) if recipe.layout == "published" else read_weights(out).state
    written = part.state_dict()
    if again.keys() != written.keys() or not all(torch.equal(value, again[key]) for key, value in written.items()):
        raise RuntimeError(f"{out}: the tensors read back differ from those written")


def load_exported(recipe: Recipe) -> Classifier:
    """Load the classifier in the file, or the encoder as a classifier without a head (`num_classes` 0)."""
    if read_weights(recipe.model).kind == "classifier":
        if recipe.tokenizer_norm:
            raise UserError(
                f"tokenizer_norm: {recipe.model} is a classifier with a fixed architecture; leave the key out"
            )
        return load_classifier(recipe.model, recipe.img_size)
    encoder = load_encoder(
        recipe.model,
        recipe.img_size or 224,
        encoder_heads=recipe.encoder_heads,
        tokenizer_norm=recipe.tokenizer_norm,
        tokenizer=recipe.tokenizer or None,
    )
    return Classifier(encoder, 0).eval()


# -------------------- timm


def export_timm(recipe: Recipe, out: Path) -> None:
    """Write a folder of model.safetensors and config.json.

    timm loads it with `timm.create_model("local-dir:<folder>", pretrained=True)` or, from the Hugging Face Hub, with
    "hf-hub:<owner>/<name>".
    """
    model = load_exported(recipe)
    state, arguments = to_timm(model)
    height, width = model.encoder.image_size
    config = {
        "architecture": f"vit_{_size_name(model.embed_dim)}_patch16_224",  # every part of which the arguments replace
        "num_classes": model.num_classes,
        "num_features": model.embed_dim,
        "global_pool": model.pooling,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "addp",
            "custom_load": False,
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": classifier_crop(model),
            "crop_mode": "center",
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if model.class_names:
        config["label_names"] = list(model.class_names)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_replace(out / MODEL_FILE) as temporary:
        save_file({key: value.contiguous() for key, value in state.items()}, temporary, metadata={"format": "pt"})
    write_atomically(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    again: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.inference_mode():
        images = _random_images(model, 2)
        _check_equal(out, "tokens", model.forward_features(images), again.forward_features(images))
        _check_equal(out, "logits" if model.num_classes else "pooled features", model(images), again(images))


def _size_name(width: int) -> str:
    return next((name for name, size in VIT_SIZES.items() if size["width"] == width), "base")


# -------------------- ONNX


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
            (_random_images(model, 2),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=[name],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    )
    metadata = {"mean": model.mean, "std": model.std, "class_names": model.class_names}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items() if value})
    with atomic_replace(out) as temporary:
        program.save(temporary, external_data=False)

    import onnxruntime

    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = _random_images(model, batch)
        (output,) = session.run([name], {"images": images.numpy()})
        with torch.inference_mode():
            _check_equal(out, f"{name} of {batch}", module(images), torch.from_numpy(output))


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


# -------------------- comparing


def _random_images(model: Classifier, batch: int) -> Tensor:
    """Return random images Float[batch,3,H,W] of the model's size, distributed like normalized ones."""
    return torch.randn(batch, 3, *model.encoder.image_size, generator=generator("export", batch))


def _check_equal(out: Path, name: str, expected: Tensor, found: Tensor) -> None:
    """Remove the export and raise RuntimeError if two outputs differ by more than rounding."""
    difference = (found - expected).abs().max().item()
    relative = difference / max(expected.abs().max().item(), 1e-12)
    if not relative <= TOLERANCE:
        for path in out.iterdir() if out.is_dir() else [out]:
            if path.name in (MODEL_FILE, "config.json", out.name):
                path.unlink()
        raise RuntimeError(
            f"{out}: its {name} differ from PyTorch's by {difference:.3g} ({relative:.2g} of the largest); removed"
        )
    log.info("%s differ from PyTorch's by at most %.2g (%.1g of the largest)", name, difference, relative)
