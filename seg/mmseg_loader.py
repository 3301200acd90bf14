"""model.safetensors as a checkpoint of mmengine, for `init_model`, the inferencer and mmseg's tools.

Registers a loader of such files in mmengine's CheckpointLoader, whose own one finds no classes in them.
"""

from collections import OrderedDict
from typing import Any

from mmengine.runner.checkpoint import CheckpointLoader

from addp_core.weights.architectures import parse_architecture
from addp_core.weights.files import read_file
from seg.scenes import dataset_meta
from seg.segmentor import SEGMENTOR_KIND

LOCAL_SAFETENSORS = r"[^:]*\.safetensors$"  # no URL


@CheckpointLoader.register_scheme(prefixes=LOCAL_SAFETENSORS)
def load_from_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Return the content of a file as mmengine's checkpoints have it, on the CPU.

    `dataset_meta` is empty if the file is no segmentor of ours. Raises UserError if the file cannot be read.
    """
    content = read_file(filename)
    meta: dict[str, Any] = {}
    if content.description is not None:
        kind, architecture = parse_architecture(content.source, content.description)
        meta = {"dataset_meta": dataset_meta(architecture.classes)} if kind == SEGMENTOR_KIND else {}
    return {"meta": meta, "state_dict": OrderedDict(content.state)}
