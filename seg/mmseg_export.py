"""Writing for mmseg's users: a config.py that stands alone, and a checkpoint with classes and palette beside it.

`mmseg.apis.init_model(config, checkpoint)`, `MMSegInferencer` and mmseg's `tools/test.py` read them as they are;
`addp seg test` and `addp seg predict` read the checkpoint too.
"""

import contextlib
import copy
import io
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from addp_core.base.files import atomic_replace, write_atomically
from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.encoder import METADATA_KEY
from addp_core.weights.encoders import load_encoder
from addp_core.weights.fitting import AnyEncoder
from seg.mmseg_config import AugmentedInferenceConfig, fill_inference, fill_model, import_mmseg, read_mmseg_config
from seg.scenes import dataset_meta
from seg.segmentor import SEGMENTOR_KIND, Segmentor, describe_encoder, load_tensors

CONFIG_FILE = "config.py"
CHECKPOINT_FILE = "model.pth"
CNN_CHANNELS = 512  # of the head over a CNN, as in mmseg's upernet_r50
OTHER_TRAINING = "# How it trains is upernet_addp-b_80k_ade20k-512x512, not what the model beside it was trained with."
RUNS_TRAINING = "# How it trains is what the run did, as far as mmseg can: other crops are drawn, in another order."
TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of `tools/test.py --tta`, as in mmseg's configs for ADE20K


def write_segmentor(
    segmentor: Segmentor,
    state: Mapping[str, Tensor],
    folder: Path,
    source: str = "",
    class_table: str = "",
    run: Any = None,
) -> None:
    """Write the config and the checkpoint of a segmentor into a folder. Raises OSError if they cannot be written.

    Args:
        segmentor: its description.
        state: its tensors, as `state_dict` of the model returns them.
        folder: an existing folder.
        source: the dataset that the config reads; by default where mmseg's configs look for ADE20K.
        class_table: its table of classes, if not in its folder.
        run: the config with which `addp seg train` trained it, if that is known.
    """
    cfg = config_for(segmentor)
    if run is not None:
        fill_run(cfg, run)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for key, path in (("data_root", source), ("table", class_table)):
            if path:
                loader.dataset[key] = str(Path(path).absolute())
    header = OTHER_TRAINING if run is None else RUNS_TRAINING
    write_atomically(folder / CONFIG_FILE, f"{header}\n{cfg.pretty_text}".encode())
    description = {"kind": SEGMENTOR_KIND, "architecture": asdict(segmentor)}
    meta = {"dataset_meta": dataset_meta(segmentor.classes), "cfg": cfg.pretty_text}
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


def fill_run(cfg: Any, run: Any) -> None:
    """Write how a run trained into the config for mmseg's tools.

    run: the config of our runner, which `fill_config` of seg/train.py has filled.
    """
    for key in ("model", "optim_wrapper", "param_scheduler", "train_cfg", "randomness"):
        cfg[key] = copy.deepcopy(run[key])
    backbone = cfg.model.backbone
    for part, key in ((backbone.get("init_cfg") or {}, "checkpoint"), (backbone, "tokenizer_source")):
        if part.get(key) and Path(part[key]).exists():
            part[key] = str(Path(part[key]).absolute())
    of_run = {transform.type: transform for transform in run.train_dataloader.dataset.pipeline}
    for transform in cfg.train_dataloader.dataset.pipeline:
        for key in ("ratio_range", "prob"):
            if key in transform:
                transform[key] = of_run[transform.type][key]
    cfg.train_pipeline = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.batch_size = run.train_dataloader.batch_size
    hook, iterations = run.default_hooks.checkpoint, run.default_hooks.checkpoint.accumulate  # of a step
    cfg.auto_scale_lr.base_batch_size = hook.batch
    cfg.default_hooks.checkpoint.update(interval=hook.interval * iterations or -1, max_keep_ckpts=hook.keep)
    cfg.default_hooks.logger.interval = hook.log_every * iterations


def compare_segmentor(
    segmentor: Segmentor, state: dict[str, Tensor], folder: Path, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the logits Float[B,classes,H,W] of a segmentor for images Float[B,3,H,W], and those of mmseg's own reading
    of the folder.
    """
    from mmseg.apis import init_model

    from seg.launch import build_model

    cfg = read_mmseg_config()
    fill_model(cfg, segmentor)
    ours: Any = build_model(cfg).eval()
    load_tensors(ours, state, str(folder))
    with contextlib.redirect_stdout(io.StringIO()):  # mmengine says there what it loads
        theirs: Any = init_model(str(folder / CONFIG_FILE), str(folder / CHECKPOINT_FILE), device="cpu")
    metas = [{"img_shape": images.shape[2:], "ori_shape": images.shape[2:]}] * len(images)
    with torch.inference_mode():
        return ours.encode_decode(images, metas), theirs.encode_decode(images, metas)


# -------------------- pretrained encoders


def write_encoder(
    encoder: AnyEncoder, folder: Path, crop: int, tokenizer_norm: bool, normalisation: Literal["imagenet", "half"]
) -> None:
    """Write a pretrained encoder, and a config that trains UperNet over it on ADE20K with mmseg's `tools/train.py`.

    That of a CNN has the head of mmseg's UperNet over ResNets, and neither drop path nor layer decay.

    Args:
        encoder: with all its parts; that over token ids includes its tokenizer.
        folder: an existing folder.
        crop: side of the training crops in pixels.
        tokenizer_norm: keep ADDP's norm in the segmentor.
        normalisation: of the images.

    Raises:
        UserError: if the crop is no multiple of the patch size.
        OSError: if the files cannot be written.
    """
    import_mmseg()
    from mmseg.datasets import ADE20KDataset

    fields, is_cnn = describe_encoder(encoder), isinstance(encoder, CnnEncoder)
    if not isinstance(encoder, CnnEncoder):
        fields["tokenizer_norm"] = tokenizer_norm or encoder.config.pre_norm
    segmentor = Segmentor(
        **fields,
        relative="none" if is_cnn else "table",
        channels=CNN_CHANNELS if is_cnn else encoder.width,
        aux_channels=256,
        classes=tuple(ADE20KDataset.METAINFO["classes"]),
        crop=crop,
        scale=(crop, 4 * crop),
        normalisation=normalisation,
        class_token=None if isinstance(encoder, CnnEncoder) else encoder.attention.class_token,
    )
    cfg = config_for(segmentor)
    if is_cnn:
        cfg.optim_wrapper.paramwise_cfg.decay_rate = 1.0
    cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": f"{{{{ fileDirname }}}}/{CHECKPOINT_FILE}"}
    write_atomically(folder / CONFIG_FILE, cfg.pretty_text.encode())
    description = {"kind": encoder.kind, "architecture": asdict(encoder.architecture)}
    write_checkpoint(folder / CHECKPOINT_FILE, encoder.state_dict(), {}, description)


def compare_encoder(
    source: str, folder: Path, images: Tensor, tokenizer_norm: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the last feature map, Float[B,W,h,w], of an encoder for images Float[B,3,H,W], and that of the backbone
    that the folder's config builds.

    options: of `load_encoder`, for the file that was exported.
    """
    from mmengine.config import Config

    from seg.launch import build_part

    backbone: Any = build_part(Config.fromfile(folder / CONFIG_FILE).model.backbone).eval()
    backbone.init_weights()
    options |= {"attention": getattr(backbone, "attention", None), "dynamic": True}
    ours = load_encoder(source, images.shape[-1], tokenizer_norm=tokenizer_norm, **options)
    with torch.inference_mode():
        return ours.forward_maps(images, backbone.out_indices[-1:])[0], backbone(images)[-1]
