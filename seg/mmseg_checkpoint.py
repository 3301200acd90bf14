"""Checkpoints of mmengine's Runner, as segmentors that `addp seg test` and `addp seg predict` read.

Such a checkpoint holds the text of its config and the classes in its `meta`. The config is read as data: nothing in it
is executed, unlike by `mmengine.Config`.
"""

import ast
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.weights.files import FileContent

log = logging.getLogger("addp")

BACKBONES = ("AddpViT", "AddpTokenViT", "AddpCNN")
HINT = "expected a checkpoint that mmengine's Runner wrote"


@dataclass(frozen=True)
class MmsegSegmentor:
    """A segmentor over our backbone that mmengine's Runner trained: its model as mmseg's config describes it."""

    model: dict[str, Any]
    classes: tuple[str, ...]
    crop: int  # side in pixels
    scale: tuple[int, int]  # shorter and longest side of a resized image


def is_runner_checkpoint(content: FileContent) -> bool:
    """Check whether a file is a segmentor's checkpoint of mmengine's Runner."""
    return content.description is None and any(name.startswith("decode_head.") for name in content.state)


def read_runner_checkpoint(content: FileContent) -> tuple[MmsegSegmentor, dict[str, Tensor]]:
    """Return the description and the tensors of a segmentor that mmengine's Runner trained.

    Raises UserError if the checkpoint says too little about its model, or its backbone is not ours.
    """
    source, meta = content.source, content.metadata.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    if not isinstance(meta, Mapping) or not isinstance(text, str):
        raise UserError(f"{source}: a segmentor without its config (meta, cfg); {HINT}")
    classes = (meta.get("dataset_meta") or {}).get("classes")
    if not classes:
        raise UserError(f"{source}: a segmentor without the names of its classes (meta, dataset_meta); {HINT}")
    cfg = read_config_text(source, text)
    model = cfg.get("model") or {}
    backbone = model.get("backbone") or {}
    if backbone.get("type") not in BACKBONES:
        expected = " or ".join(map(repr, BACKBONES))
        raise UserError(f"{source}: its backbone is {backbone.get('type')!r}; expected {expected}")
    if not model.setdefault("data_preprocessor", cfg.get("data_preprocessor")):
        raise UserError(f"{source}: its config has no data_preprocessor, which normalizes images; {HINT}")
    size = backbone.get("img_size") or model["data_preprocessor"].get("size") or 512
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"{source}: its img_size is {size}; expected square crops")
    crop = sides.pop()
    scale = scale_of(cfg)
    if scale is None:
        scale = (crop, 4 * crop)
        log.warning("%s: its test pipeline has no Resize to a scale with keep_ratio; took %d to %d px", source, *scale)
    return MmsegSegmentor(model, tuple(str(name).strip() for name in classes), crop, scale), dict(content.state)


def scale_of(cfg: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the shorter and longest side of resized test images; None if the config does not resize to such a size."""
    pipeline = ((cfg.get("test_dataloader") or {}).get("dataset") or {}).get("pipeline") or cfg.get("test_pipeline")
    types = {"Resize": False, "ResizePicture": True}  # whether they keep the ratio if nothing is said
    resize: dict[str, Any] = next((step for step in pipeline or () if step.get("type") in types), {"type": "Resize"})
    if not resize.get("keep_ratio", types[resize["type"]]) or not isinstance(resize.get("scale"), tuple):
        return None
    return min(resize["scale"]), max(resize["scale"])


def read_config_text(source: str, text: str) -> dict[str, Any]:
    """Return the variables of a config, which are literals and calls of dict.

    Raises UserError if it is no such text.
    """
    try:
        return {
            statement.targets[0].id: _literal(statement.value)
            for statement in ast.parse(text).body
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{source}: its config cannot be read as data ({error}); {HINT}") from error


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal, in which calls of dict are allowed. Raises ValueError if it is none."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        pairs = {name: value for argument in node.args for name, value in dict(_literal(argument)).items()}
        return pairs | {_key(keyword): _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("** in a dict")
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    return ast.literal_eval(node)


def _key(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("** in a call of dict")
    return keyword.arg
