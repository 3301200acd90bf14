"""mmengine's configs: reading those in seg/configs, and filling in the segmentor, its inference and the dataset."""

import contextlib
import importlib
import io
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.launch import world_size
from addp_core.data.stream import default_workers
from addp_core.weights.encoders import DEFAULT_PATCH_SIZE
from addp_core.weights.pretrained import NORMALISATION
from seg.mmseg_checkpoint import MmsegSegmentor
from seg.recipe import AugmentedInferenceConfig as AugmentedInferenceConfig
from seg.recipe import InferenceConfig as InferenceConfig
from seg.recipe import TrainScenes
from seg.segmentor import Segmentor

CONFIG_FOLDER = Path(__file__).parent / "configs"
BASE_CONFIG = CONFIG_FOLDER / "_base_" / "upernet_addp_ade20k.py"
MMSEG_CONFIG = CONFIG_FOLDER / "_base_" / "upernet_addp_mmseg.py"

CNN_BACKBONE = "AddpCNN"  # in a config for CNNs


# -------------------- reading configs


def config_names() -> list[str]:
    """Return the names of the configs in seg/configs."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.py"))


def read_config(name: str) -> Any:
    """Read the config of this name as an mmengine Config. Raises UserError if there is none."""
    path = CONFIG_FOLDER / f"{name}.py"
    if not path.is_file():
        names = config_names()
        raise UserError(f"config: found {name!r}, expected one of {', '.join(names)}{did_you_mean(name, names)}")
    return _read_file(path)


def read_base_config() -> Any:
    """Read what all configs share, as an mmengine Config."""
    return _read_file(BASE_CONFIG)


def read_mmseg_config() -> Any:
    """Read the config for mmseg's own tools, as an mmengine Config."""
    return _read_file(MMSEG_CONFIG)


def _read_file(path: Path) -> Any:
    import_mmseg()
    from mmengine.config import Config

    return Config.fromfile(path)


def import_mmseg() -> None:
    """Import mmseg without its warnings about missing optional parts; it prints some to stdout, which is for
    results.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"mm(cv|engine|seg)\b")
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("mmseg.datasets")
        importlib.import_module("mmseg.models")


# -------------------- filling configs


def fill_model(cfg: Any, segmentor: Segmentor | MmsegSegmentor) -> None:
    """Write a segmentor's architecture and sizes into a config. Raises UserError if mmseg lacks one of its parts."""
    if isinstance(segmentor, MmsegSegmentor):
        fill_mmseg_model(cfg, segmentor)
        return
    s, model = segmentor, cfg.model
    crop = (s.crop, s.crop)
    mean, std = ([255 * value for value in channels] for channels in NORMALISATION[s.normalisation])
    model.data_preprocessor.update(mean=mean, std=std, size=crop, test_cfg={"size_divisor": s.patch_size})
    norm = {"type": "SyncBN" if torch.cuda.is_available() and world_size() > 1 else "BN", "requires_grad": True}
    if s.cnn is None:
        _fill_vit(model, s, norm)
    else:
        _fill_cnn(model, s, s.cnn.arch, norm)
    channels = [s.width] * 4 if s.cnn is None else list(s.cnn.channels)
    classes = len(s.classes)
    model.decode_head.update(in_channels=channels, channels=s.channels, num_classes=classes, norm_cfg=norm)
    third = channels[model.auxiliary_head.in_index]
    model.auxiliary_head.update(in_channels=third, channels=s.aux_channels, num_classes=classes, norm_cfg=norm)
    model.test_cfg.update(crop_size=crop, stride=(s.crop * 2 // 3,) * 2)
    fill_sizes(cfg, crop, s.scale)


def _fill_vit(model: Any, s: Segmentor, norm: dict[str, Any]) -> None:
    """Write a backbone over pixels or token ids, and the pyramid over its maps of one scale, into a model's config."""
    model.backbone.update(
        arch={"width": s.width, "depth": s.depth, "heads": s.heads, "layer_scale": s.layer_scale},
        img_size=(s.crop, s.crop),
        patch_size=s.patch_size,
        out_indices=s.out_indices,
        relative=s.relative,
        class_token=s.has_class_token,
        tokenizer_norm=s.tokenizer_norm,
        init_cfg=None,
    )
    if s.tokens is not None:
        for key in ("patch_size", "tokenizer_norm"):
            model.backbone.pop(key)
        model.backbone.update(type="AddpTokenViT", normalisation=s.normalisation, **asdict(s.tokens))
    model.neck.update(embed_dim=s.width, rescales=list(s.rescales), norm_cfg=norm)


def _fill_cnn(model: Any, s: Segmentor, arch: str, norm: dict[str, Any]) -> None:
    """Write a CNN, whose stages need no pyramid, into a model's config."""
    model.pop("neck", None)
    sizes = {"img_size": (s.crop, s.crop), "out_indices": s.out_indices, "norm_cfg": norm}
    model.backbone = {"type": CNN_BACKBONE, "arch": arch, **sizes, "init_cfg": None}


def fill_sizes(cfg: Any, crop: tuple[int, int], scale: tuple[int, int]) -> None:
    """Write the size of crops, and the shorter and longest side of resized images, into the pipelines of a config."""
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for transform in loader.dataset.pipeline:
            if transform.type in ("Resize", "ResizePicture", "RandomResize"):
                transform.scale = scale[::-1]
            elif transform.type == "RandomCrop":
                transform.crop_size = crop


def fill_augmentation(cfg: Any, data: TrainScenes) -> None:
    """Write how training varies the size of images, and whether it mirrors them, into the pipeline of a config."""
    for transform in cfg.train_dataloader.dataset.pipeline:
        if transform.type == "RandomResize":
            transform.ratio_range = data.jitter
        elif transform.type == "RandomFlip":
            transform.prob = 0.5 if data.flip else 0.0


def fill_mmseg_model(cfg: Any, segmentor: MmsegSegmentor) -> None:
    """Write the model of a checkpoint of mmengine's Runner, and the sizes of its images, into a config.

    Raises UserError if mmseg lacks one of its parts.
    """
    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    model, crop = ConfigDict(segmentor.model), (segmentor.crop, segmentor.crop)
    for part in ("backbone", "neck", "decode_head", "auxiliary_head"):
        configs = model.get(part) or []
        for config in configs if isinstance(configs, list) else [configs]:
            if MODELS.get(config.type) is None:
                raise UserError(f"model: its {part} is a {config.type}, which is not among mmseg's models or ours")
    model.pop("pretrained", None)
    model.backbone.init_cfg = None
    model.backbone.pop("pretrained", None)
    model.data_preprocessor.setdefault(
        "test_cfg", {"size_divisor": model.backbone.get("patch_size", DEFAULT_PATCH_SIZE)}
    )
    test_cfg = model.setdefault("test_cfg", ConfigDict(mode="slide"))
    if tuple(test_cfg.get("crop_size") or ()) != crop:
        test_cfg.update(crop_size=crop, stride=(segmentor.crop * 2 // 3,) * 2)
    cfg.model = model
    fill_sizes(cfg, crop, segmentor.scale)


def fill_inference(cfg: Any, inference: AugmentedInferenceConfig) -> None:
    """Write how class maps are predicted into a config; more than one scale or a flip wraps the model for test-time
    augmentation.
    """
    cfg.model.test_cfg.mode = inference.mode
    if not inference.flip and tuple(inference.scales) == (1.0,):
        return
    load, resize, labels, pack = cfg.test_dataloader.dataset.pipeline
    resizes = [{**resize, "scale": tuple(round(side * factor) for side in resize.scale)} for factor in inference.scales]
    flips = [{"type": "RandomFlip", "prob": float(flip)} for flip in range(1 + inference.flip)]
    augmented = {"type": "TestTimeAug", "transforms": [resizes, flips, [labels], [pack]]}
    cfg.test_dataloader.dataset.pipeline = [load, augmented]
    cfg.model = {"type": "SegTTAModel", "module": cfg.model}


def fill_runtime(cfg: Any, out: Path, workers: int | None, source: str = "", class_table: str = "") -> None:
    """Write the dataset's path, the number of workers, the launcher and the folder of mmengine's log into a config."""
    count = default_workers() if workers is None else workers
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=count, persistent_workers=count > 0, worker_init_fn={"type": "start_worker"})
        loader.dataset.update(data_root=source, table=class_table)
    cfg.work_dir = str(out / "mmengine")
    cfg.log_level = "ERROR"  # the run folder's report shows progress instead
    cfg.experiment_name = f"addp-{out.resolve()}".replace("/", "_")
    cfg.visualizer = {"type": "Visualizer", "vis_backends": []}
    if world_size() > 1:
        cfg.launcher = "pytorch"
        if not torch.cuda.is_available():  # DDP on CPUs takes no device
            cfg.model_wrapper_cfg = {
                "type": "MMDistributedDataParallel",
                "device_ids": None,
                "broadcast_buffers": False,
            }
