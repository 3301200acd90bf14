"""From a filled config to a runner or a model: starting processes, registering our parts, reporting data errors."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.training.compute import autocast
from addp_core.training.precision import matrix_width, resolve_precision
from addp_core.training.processes import process_state
from seg import (  # noqa: F401 (importing them registers their parts)
    backbone,
    cnn_backbone,
    dataset,
    evaluation,
    token_backbone,
)
from seg.mmseg_checkpoint import MmsegSegmentor
from seg.mmseg_config import AugmentedInferenceConfig, fill_inference, fill_model, read_base_config
from seg.runner import AddpRunner
from seg.segmentor import Segmentor, load_tensors


def start_runner(cfg: Any) -> AddpRunner:
    """Create a runner on all processes of the launcher, on GPUs if there are any."""
    process_state()  # mmengine alone would not detect processes on CPUs
    return AddpRunner.from_cfg(cfg)


def compute_in(precision: str, model: nn.Module, training: bool) -> None:
    """Let a model compute in this precision whenever it is called in training mode, or whenever it is not.

    mmengine's own mixed precision needs a GPU to train, and does not know bf16 in its evaluations.
    """
    device = process_state().device
    contexts: list[AbstractContextManager[None]] = []

    def enter(module: nn.Module, *_: Any) -> None:
        contexts.append(autocast(precision, device) if module.training is training else nullcontext())
        contexts[-1].__enter__()

    def leave(*_: Any) -> None:  # what a hook returns would replace the output
        contexts.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


@contextmanager
def data_workers(runner: AddpRunner) -> Iterator[None]:
    """Run the block and end the runner's data loading processes after it.

    A UserError of a data loading process arrives with that process's traceback; it is raised again with its message
    alone.
    """
    try:
        yield
    except UserError as error:
        last_line = str(error).splitlines()[-1]
        raise UserError(last_line.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from error
    finally:
        # Otherwise multiprocessing would, when the interpreter exits, wait for processes that ignore its SIGTERM.
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            iterator = getattr(getattr(loop, "dataloader", None), "_iterator", None)
            if iterator is not None and hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()


def build_model(cfg: Any) -> BaseModel:
    """Build the model of a filled config, without a runner."""
    return build_part(cfg.model)


def build_part(cfg: Any) -> Any:
    """Build a model, or a part of one such as its backbone, from its config."""
    init_default_scope("mmseg")
    return MODELS.build(cfg)


class ClassMapPredictor:
    """A segmentor that predicts the class maps of single images.

    Args:
        segmentor: its description.
        state: its tensors.
        source: where the tensors come from, for error messages.
        inference: how class maps are predicted for whole images.
        precision: of the network's arithmetic, or "auto".
    """

    def __init__(
        self,
        segmentor: Segmentor | MmsegSegmentor,
        state: dict[str, Tensor],
        source: str,
        inference: AugmentedInferenceConfig,
        precision: str,
    ):
        cfg = read_base_config()
        fill_model(cfg, segmentor)
        fill_inference(cfg, inference)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = build_model(cfg)  # before Compose, since it sets the scope in which transforms are looked up
        self.pipeline, self.collate = Compose(for_loaded_images(cfg.test_dataloader.dataset.pipeline)), pseudo_collate
        load_tensors(getattr(model, "module", model), state, source)
        self.model = model.to(self.device).eval()
        self.precision = resolve_precision(precision, self.device, matrix_width(self.model))

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Tensor:
        """Return the class of each pixel of an RGB image, Long[H,W] from 0, on the CPU."""
        fields = {"img_path": ""} | dataset.image_fields(image)  # SegTTAModel expects the key img_path
        data = self.collate([self.pipeline(fields)])
        with autocast(self.precision, self.device):
            [sample] = self.model.test_step(data)
        return sample.pred_sem_seg.data.squeeze(0).cpu()


def for_loaded_images(pipeline: list[Any]) -> list[Any]:
    """Return a test pipeline without its steps that load files, for images that `dataset.image_fields` provides."""
    _, first, *rest = pipeline
    if first["type"] != "TestTimeAug":
        return [first, *(step for step in rest if step["type"] != "LoadClassMap")]
    branches = [branch for branch in first["transforms"] if branch[0]["type"] != "LoadClassMap"]
    return [{**first, "transforms": branches}]
