"""From a filled config to a Runner or a model: processes, registered parts, errors of the data told as such."""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.training.compute import arithmetic
from addp_core.training.engine import leave_group, process_state
from seg import backbone, dataset, evaluation  # noqa: F401 (what they register is called by name)
from seg.runner import AddpRunner, fill
from seg.settings import Segmentor, TestConfig, base_config, fill_model, fill_test, world


def start_runner(cfg: Any) -> AddpRunner:
    """A Runner on all processes of the launcher; on GPUs where there are any."""
    process_state()  # mmengine alone would not find processes on CPUs
    if world() > 1:
        atexit.register(leave_group)
    return AddpRunner.from_cfg(cfg)


@contextmanager
def loading(runner: AddpRunner) -> Iterator[None]:
    """Within it the runner's loading processes live. A UserError of one of them arrives with that process's traceback
    around it; its line alone goes on.
    """
    try:
        yield
    except UserError as error:
        last = str(error).splitlines()[-1]
        raise UserError(last.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from error
    finally:
        # Else multiprocessing would wait at the interpreter's end for processes that do not heed its SIGTERM.
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            iterator = getattr(getattr(loop, "dataloader", None), "_iterator", None)
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()


def build(cfg: Any) -> nn.Module:
    """The model of a filled config, without a Runner."""
    init_default_scope("mmseg")
    return MODELS.build(cfg.model)


class Painter:
    """A segmentor that answers pictures with class maps; `test` says how."""

    def __init__(self, segmentor: Segmentor, state: dict[str, Tensor], where: str, test: TestConfig, precision: str):
        cfg = base_config()
        fill_model(cfg, segmentor)
        fill_test(cfg, test)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = build(cfg)  # first: it names the scope in which the steps are looked up
        steps = without_files(cfg.test_dataloader.dataset.pipeline)
        self.pipeline, self.collate = Compose(steps), pseudo_collate
        fill(getattr(model, "module", model), state, where)
        self.model, self.precision = model.to(self.device).eval(), precision

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Tensor:
        """Long[H,W] on the CPU, the class of each pixel of the RGB picture, from 0."""
        named = {"img_path": ""} | dataset.loaded(picture)  # SegTTAModel asks for the key
        data = self.collate([self.pipeline(named)])
        with arithmetic(self.precision, self.device):
            [sample] = self.model.test_step(data)
        return sample.pred_sem_seg.data.squeeze(0).cpu()


def without_files(pipeline: list[Any]) -> list[Any]:
    """A test pipeline for pictures as `dataset.loaded` gives them, without class maps."""
    _, first, *rest = pipeline
    if first["type"] != "TestTimeAug":
        return [first, *(step for step in rest if step["type"] != "LoadClassMap")]
    branches = [branch for branch in first["transforms"] if branch[0]["type"] != "LoadClassMap"]
    return [{**first, "transforms": branches}]
