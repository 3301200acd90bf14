"""The keys of `addp export`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

LayoutName = Literal["addp", "published", "encoder", "timm", "onnx", "detectron2", "mmseg"]  # the keys of `LAYOUTS`


@dataclass
class Recipe:
    """Keys of `addp export`."""

    model: Annotated[
        str,
        "a run of `addp pretrain`, an ADDP file (ours or published), or hf://owner/repository[/file]; for encoder, "
        "timm and onnx also a run of `addp finetune` or `addp linprobe`, or the file of a ViT, with its head if it has "
        "one; for mmseg and detectron2 a run of `addp seg|det train` or anything with an encoder",
    ]
    out: Annotated[
        str,
        "file to write, .safetensors (addp, encoder), .pth (published) or .onnx, or the folder of the other layouts",
    ]
    layout: Annotated[
        LayoutName,
        "ours, the authors' (which their code reads), the pixel encoder alone, a folder for timm.create_model, ONNX, "
        "or a folder for detectron2 or mmseg",
    ] = "addp"
    img_size: Annotated[
        int | None,
        Ge(1),
        "timm, onnx, detectron2: side of the images in pixels (default: the file's own); mmseg: of the crops (default: "
        "512)",
    ] = None
    tokenizer_norm: Annotated[
        bool, "timm, onnx, detectron2, mmseg: keep ADDP's norm on the patches, which transfers drop"
    ] = False
    normalisation: Annotated[
        Literal["imagenet", "half"] | None,
        "timm, onnx, detectron2, mmseg: mean and std of the images, ImageNet's or 0.5 (default: the file's own; "
        "ImageNet's)",
    ] = None
    weights: Annotated[
        str,
        "encoder, timm, onnx, detectron2, mmseg: the model to read if a checkpoint holds several, as in "
        "`addp finetune`",
    ] = ""
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
    push: Annotated[
        str,
        "also upload the export, with a model card, to this repository (owner/name) of the Hugging Face Hub, which is "
        "created if it is new",
    ] = ""
    private: Annotated[bool, "push: create the repository as a private one"] = False
    license: Annotated[str, "push: license of the weights in the model card, such as apache-2.0"] = ""
    bench: Annotated[str, "push: folder of an `addp bench` whose scores of this model the model card shows"] = ""
