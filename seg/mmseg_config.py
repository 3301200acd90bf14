"""mmengine's configs: reading those in seg/configs, and filling in the segmentor, its inference and the dataset."""

import contextlib
import importlib
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt

from addp_core.base.errors import UserError, did_you_mean
from addp_core.data.stream import default_workers
from addp_core.weights.pretrained import NORMALISATION
from seg.segmentor import Segmentor

CONFIG_FOLDER = Path(__file__).parent / "configs"
BASE_CONFIG = CONFIG_FOLDER / "_base_" / "upernet_addp_ade20k.py"


@dataclass
class InferenceConfig:
    """How class maps are predicted for whole images."""

    mode: Annotated[
        Literal["slide", "whole"],
        "slide: average over crops that overlap by a third; whole: the resized image at once",
    ] = "slide"


@dataclass
class AugmentedInferenceConfig(InferenceConfig):
    """How class maps are predicted for whole images, with test-time augmentation."""

    flip: Annotated[bool, "average with the prediction for the mirrored image"] = False
    scales: Annotated[
        tuple[Annotated[float, Gt(0)], ...], "factors on the image size whose predictions are averaged"
    ] = (1.0,)


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


def fill_model(cfg: Any, segmentor: Segmentor) -> None:
    """Write a segmentor's architecture and sizes into a config."""
    s, model = segmentor, cfg.model
    crop = (s.crop, s.crop)
    mean, std = ([255 * value for value in channels] for channels in NORMALISATION[s.normalisation])
    model.data_preprocessor.update(mean=mean, std=std, size=crop, test_cfg={"size_divisor": s.patch_size})
    model.backbone.update(
        arch={"width": s.width, "depth": s.depth, "heads": s.heads, "layer_scale": s.layer_scale},
        img_size=crop,
        patch_size=s.patch_size,
        out_indices=s.out_indices,
        relative=s.relative,
        class_token=s.has_class_token,
        tokenizer_norm=s.tokenizer_norm,
        init_cfg=None,
    )
    norm = {"type": "SyncBN" if torch.cuda.is_available() and world_size() > 1 else "BN", "requires_grad": True}
    model.neck.update(embed_dim=s.width, norm_cfg=norm)
    classes = len(s.classes)
    model.decode_head.update(in_channels=[s.width] * 4, channels=s.channels, num_classes=classes, norm_cfg=norm)
    model.auxiliary_head.update(in_channels=s.width, channels=s.aux_channels, num_classes=classes, norm_cfg=norm)
    model.test_cfg.update(crop_size=crop, stride=(s.crop * 2 // 3,) * 2)
    longest_and_shorter = s.scale[::-1]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for transform in loader.dataset.pipeline:
            if transform.type in ("Resize", "RandomResize"):
                transform.scale = longest_and_shorter
            elif transform.type == "RandomCrop":
                transform.crop_size = crop


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


def process_rank() -> int:
    """Return the rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes that torchrun or another launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
