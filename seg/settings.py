"""Between typed settings and mmengine's config: what a segmentor is, how it is tested, what fills a config's places."""

import contextlib
import importlib
import io
import json
import logging
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.files import atomic_replace
from addp_core.weights.checkpoint import METADATA_KEY, read_weights
from addp_core.weights.layouts import ARCHITECTURES
from addp_core.weights.start import NORMALISATION

log = logging.getLogger("addp")

CONFIGS = Path(__file__).parent / "configs"
BASE = CONFIGS / "_base_" / "upernet_addp_ade20k.py"
KIND = "segmentor"  # in a file's metadata


@dataclass(frozen=True)
class Segmentor:
    """What a trained file says about itself; everything that is needed to build it again."""

    width: Annotated[int, Ge(1)]
    depth: Annotated[int, Ge(1)]
    heads: Annotated[int, Ge(1)]
    layer_scale: bool
    patch_size: Annotated[int, Ge(1)]
    tokenizer_norm: bool
    relative: Literal["none", "table"]
    out_indices: tuple[int, ...]
    channels: Annotated[int, Ge(1)]  # of the UperNet head
    aux_channels: Annotated[int, Ge(1)]  # of the auxiliary FCN head
    classes: tuple[str, ...]
    crop: Annotated[int, Ge(1)]  # pixels of a side
    scale: tuple[int, int]  # shorter and longest side of a resized image
    normalisation: Literal["imagenet", "half"] = "imagenet"

    def __post_init__(self) -> None:
        if len(self.out_indices) not in (1, 4):
            raise UserError(f"out_indices: found {list(self.out_indices)}, expected four blocks or one")
        if self.crop % self.patch_size:
            raise UserError(
                f"data.crop: found {self.crop}, expected a multiple of the model's patch size {self.patch_size}"
            )


ARCHITECTURES[KIND] = Segmentor  # so that read_weights knows our files


@dataclass
class MapConfig:
    """How maps are made of whole images."""

    mode: Annotated[
        Literal["slide", "whole"], "crops that overlap by a third, averaged, or the resized image in one piece"
    ] = "slide"


@dataclass
class TestConfig(MapConfig):
    """The same, perhaps of several sizes and both ways round."""

    flip: Annotated[bool, "average with the mirrored image"] = False
    scales: Annotated[tuple[Annotated[float, Gt(0)], ...], "factors on the size whose maps are averaged"] = (1.0,)


def config_names() -> list[str]:
    """The names of the configs that come with the suite."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def read_config(name: str) -> Any:
    """An mmengine Config by its name. UserError where there is none."""
    path = CONFIGS / f"{name}.py"
    if not path.is_file():
        known = config_names()
        raise UserError(f"config: no config {name!r}; there are {', '.join(known)}{did_you_mean(name, known)}")
    return _from_file(path)


def base_config() -> Any:
    """What all configs share."""
    return _from_file(BASE)


def _from_file(path: Path) -> Any:
    import_mmseg()
    from mmengine.config import Config

    return Config.fromfile(path)


def import_mmseg() -> None:
    """Import it without its remarks on what it was built without, some of them on stdout, which is for results."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"mm(cv|engine|seg)\b")
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("mmseg.datasets")
        importlib.import_module("mmseg.models")


def fill_model(cfg: Any, segmentor: Segmentor) -> None:
    """Write a segmentor's architecture and sizes into a config."""
    s, model = segmentor, cfg.model
    crop = (s.crop, s.crop)
    mean, std = ([255 * value for value in part] for part in NORMALISATION[s.normalisation])
    model.data_preprocessor.update(mean=mean, std=std, size=crop, test_cfg={"size_divisor": s.patch_size})
    model.backbone.update(
        arch={"width": s.width, "depth": s.depth, "heads": s.heads, "layer_scale": s.layer_scale},
        img_size=crop,
        patch_size=s.patch_size,
        out_indices=s.out_indices,
        relative=s.relative,
        tokenizer_norm=s.tokenizer_norm,
        init_cfg=None,
    )
    norm = {"type": "SyncBN" if torch.cuda.is_available() and world() > 1 else "BN", "requires_grad": True}
    model.neck.update(embed_dim=s.width, norm_cfg=norm)
    classes = len(s.classes)
    model.decode_head.update(in_channels=[s.width] * 4, channels=s.channels, num_classes=classes, norm_cfg=norm)
    model.auxiliary_head.update(in_channels=s.width, channels=s.aux_channels, num_classes=classes, norm_cfg=norm)
    model.test_cfg.update(crop_size=crop, stride=(s.crop * 2 // 3,) * 2)
    long_short = s.scale[::-1]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for transform in loader.dataset.pipeline:
            if transform.type in ("Resize", "RandomResize"):
                transform.scale = long_short
            elif transform.type == "RandomCrop":
                transform.crop_size = crop


def fill_test(cfg: Any, test: TestConfig) -> None:
    """Write the way of testing into a config; several scales or mirrored images make it test-time augmentation."""
    cfg.model.test_cfg.mode = test.mode
    if not test.flip and tuple(test.scales) == (1.0,):
        return
    load, resize, labels, pack = cfg.test_dataloader.dataset.pipeline
    sizes = [{**resize, "scale": tuple(round(side * factor) for side in resize.scale)} for factor in test.scales]
    flips = [{"type": "RandomFlip", "prob": float(on)} for on in range(1 + test.flip)]
    several = {"type": "TestTimeAug", "transforms": [sizes, flips, [labels], [pack]]}
    cfg.test_dataloader.dataset.pipeline = [load, several]
    cfg.model = {"type": "SegTTAModel", "module": cfg.model}


def fill_runtime(cfg: Any, out: Path, workers: int | None, source: str = "", table: str = "") -> None:
    """Write the data's place, the processes, and where mmengine keeps its own log into a config."""
    from addp_core.data.stream import default_workers

    count = default_workers() if workers is None else workers
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=count, persistent_workers=count > 0, worker_init_fn={"type": "start_worker"})
        loader.dataset.update(data_root=source, table=table)
    cfg.work_dir = str(out / "mmengine")
    cfg.log_level = "ERROR"  # the suite reports progress itself
    cfg.experiment_name = f"addp-{out.resolve()}".replace("/", "_")
    cfg.visualizer = {"type": "Visualizer", "vis_backends": []}
    if world() > 1:
        cfg.launcher = "pytorch"
        if not torch.cuda.is_available():  # DDP on CPUs takes no device
            cfg.model_wrapper_cfg = {
                "type": "MMDistributedDataParallel",
                "device_ids": None,
                "broadcast_buffers": False,
            }


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes torchrun or another launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def save_segmentor(segmentor: Segmentor, state: dict[str, Tensor], path: Path) -> None:
    """Write a segmentor as one safetensors file. OSError where it cannot be written."""
    text = json.dumps({"kind": KIND, "architecture": asdict(segmentor)})
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_replace(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: text})
        except SafetensorError as error:  # how its writer reports a full disk
            raise OSError(str(error)) from error


def load_segmentor(source: str | Path) -> tuple[Segmentor, dict[str, Tensor]]:
    """(architecture, tensors) of a run of `addp seg train` or its file. UserError where it is none."""
    weights = read_weights(source)
    if weights.kind != KIND:
        raise UserError(f"model: {weights.where} is no segmentor; expected a run of `addp seg train` or its file")
    return weights.architecture, weights.state
