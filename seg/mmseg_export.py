"""Writing for mmseg's users: a config.py that stands alone, and a checkpoint with classes and palette beside it.

`mmseg.apis.init_model(config, checkpoint)`, `MMSegInferencer` and mmseg's `tools/test.py` read them as they are;
`addp seg test` and `addp seg predict` read the checkpoint too.
"""

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addp_core.base.files import atomic_replace, write_atomically
from addp_core.networks.encoder import METADATA_KEY
from seg.mmseg_config import AugmentedInferenceConfig, fill_inference, fill_model, read_mmseg_config
from seg.scenes import class_colors
from seg.segmentor import SEGMENTOR_KIND, Segmentor

CONFIG_FILE = "config.py"
CHECKPOINT_FILE = "model.pth"
TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of `tools/test.py --tta`, as in mmseg's configs for ADE20K


def write_segmentor(
    segmentor: Segmentor, state: Mapping[str, Tensor], folder: Path, source: str = "", class_table: str = ""
) -> None:
    """Write the config and the checkpoint of a segmentor into a folder. Raises OSError if they cannot be written.

    Args:
        segmentor: its description.
        state: its tensors, as `state_dict` of the model returns them.
        folder: an existing folder.
        source: the dataset that the config reads; by default where mmseg's configs look for ADE20K.
        class_table: its table of classes, if not in its folder.
    """
    cfg = config_for(segmentor)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for key, path in (("data_root", source), ("table", class_table)):
            if path:
                loader.dataset[key] = str(Path(path).absolute())
    write_atomically(folder / CONFIG_FILE, cfg.pretty_text.encode())
    dataset_meta = {
        "classes": list(segmentor.classes),
        "palette": class_colors(len(segmentor.classes)).tolist(),
        "reduce_zero_label": True,
    }
    description = {"kind": SEGMENTOR_KIND, "architecture": asdict(segmentor)}
    meta = {"dataset_meta": dataset_meta, "cfg": cfg.pretty_text}
    write_checkpoint(folder / CHECKPOINT_FILE, state, meta, description)


def write_checkpoint(path: Path, state: Mapping[str, Tensor], meta: dict[str, Any], description: Any) -> None:
    """Write a checkpoint of mmengine that also holds our description of its architecture.

    Raises OSError if it cannot be written.
    """
    tensors: Any = OrderedDict((name, value.detach().cpu()) for name, value in state.items())
    tensors._metadata = getattr(state, "_metadata", {})  # of `state_dict`, with the number of heads
    content = {"meta": meta, "state_dict": tensors, METADATA_KEY: json.dumps(description)}
    with atomic_replace(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def config_for(segmentor: Segmentor) -> Any:
    """Return the mmengine Config with which mmseg's tools train, test and predict with a segmentor."""
    cfg = read_mmseg_config()
    fill_model(cfg, segmentor)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.train_pipeline = cfg.train_dataloader.dataset.pipeline
    cfg.crop_size, cfg.scale = (segmentor.crop,) * 2, segmentor.scale[::-1]
    augmented = copy.deepcopy(cfg)
    fill_inference(augmented, AugmentedInferenceConfig(flip=True, scales=TTA_SCALES))
    cfg.tta_pipeline = augmented.test_dataloader.dataset.pipeline
    cfg.norm_cfg = cfg.model.decode_head.norm_cfg
    return cfg
