"""Timing of the authors' own code, unchanged, for `addp throughput published=<clone>`.

`PublishedCode` talks to a worker process (`python -m tools.speed.published`), the only one that imports the clone. To
run it on a CPU or without its other dependencies, the worker makes `.cuda()` and `torch.cuda.synchronize()` do nothing
and replaces the few functions that the clone uses of packages that are not installed. Weights are random.

The worker reads one JSON request a line, `{"do": "train", "ratio": 0.7}`, `{"do": "sample", "steps": 20}` or
`{"do": "memory"}`, and writes one JSON answer a line. Everything that the clone prints goes to stderr.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import yaml
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.training.timing import PartTimer, peak_memory, reset_peak_memory
from tools.speed.recipe import IMAGE_SIZE as IMAGE_SIZE
from tools.speed.recipe import MODELS as MODELS

OPTIONS = {  # of the authors' pretraining and generation scripts, as the published commands set them
    "drop_out_rate": 0.1,
    "decoder_depth": 8,
    "label_smoothing": 0.1,
    "mask_ratio_mu": 0.55,
    "mask_ratio_std": 0.25,
    "mask_ratio_min": 0.5,
    "mask_ratio_max": 1.0,
    "accum_iter": 1,
    "clip_grad": 3.0,
    "lr": 1e-6,
    "min_lr": 0.0,
    "warmup_epochs": 40,
    "epochs": 1600,
    "mask_ratio": 1.0,
    "choice_temperature": 6.0,
    "temperature_strategy": "dynamic",
    "sampling_strategy": "default",
    "mask_ratio_sample_strategy": "cosine",
    "save_dir_suffix": "",
}


class PublishedCode:
    """The worker process and its requests. It is idle between requests."""

    def __init__(self, clone: str, size: str, batch: int, device: torch.device, precision: str):
        """Start the worker.

        Raises UserError if `clone` is not the authors' repository, or if its code does not run here.
        """
        self.path = Path(clone).resolve()
        if not ((self.path / "engine_pretrain.py").is_file() and (self.path / "modeling").is_dir()):
            raise UserError(
                f"published: {clone} does not look like the authors' repository; expected a clone of ChangyaoTian/ADDP"
            )
        precision = precision if device.type == "cuda" else "fp32"  # the authors' autocast works on CUDA alone
        settings = {"path": str(self.path), "size": size, "batch": batch, "device": str(device), "precision": precision}
        with tempfile.NamedTemporaryFile("w", suffix=".log", delete=False) as messages:
            self.messages = Path(messages.name)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tools.speed.published", json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
            )
        assert self.process.stdin is not None  # they are pipes
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self._answer()

    def train(self, ratio: float) -> dict[str, float]:
        """Run a training step of the authors' loop; return the seconds of each part, and of the `whole`."""
        return self._ask(do="train", ratio=ratio)

    def sample(self, steps: int) -> dict[str, float]:
        """Generate a batch with the authors' loop; return the seconds of each part, and of the `whole`."""
        return self._ask(do="sample", steps=steps)

    def peak_memory(self) -> int:
        """Return the worker's peak memory in bytes since the last call."""
        return self._ask(do="memory")["bytes"]

    def close(self) -> None:
        """End the worker."""
        self.requests.close()
        self.answers.close()
        self.process.wait()
        self.messages.unlink(missing_ok=True)

    def _ask(self, **request: Any) -> dict[str, Any]:
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            last = (self.messages.read_text().strip().splitlines() or ["no message"])[-1]
            self.close()
            raise UserError(f"published: the code in {self.path} does not run here: {last}")
        return json.loads(line)


class Worker:
    """The authors' model, optimizer and loops, with random weights and images; runs in the worker process."""

    def __init__(self, path: str, size: str, batch: int, device: str, precision: str):
        self.device, self.batch = torch.device(device), batch
        sys.path.insert(0, path)
        os.chdir(path)  # the code opens ./configs/... by itself
        replace_missing_modules()
        if self.device.type == "cpu":
            run_without_cuda()
        self.pretraining, self.generation = map(importlib.import_module, ("engine_pretrain", "engine_generate"))
        setattr(self.generation, "save_imgs", lambda *args, **kwargs: None)  # noqa: B010 (a module attribute)
        misc, modeling = map(importlib.import_module, ("util.misc", "modeling"))

        build, predictor = MODELS[size]
        self.args = SimpleNamespace(**OPTIONS, fp32=precision == "fp32", token_predictor_name=predictor)
        with tempfile.TemporaryDirectory() as folder:
            self.args.token_predictor_ckpt = os.path.join(folder, "empty.pth")
            torch.save({"model": {}}, self.args.token_predictor_ckpt)
            self.model = getattr(modeling, build)(norm_pix_loss=True, args=self.args).to(self.device)
        groups = param_groups_weight_decay(self.model, 0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.lr, betas=(0.9, 0.95))
        self.scaler = misc.NativeScalerWithGradNormCount(enabled=not self.args.fp32, growth_interval=500)
        self.parts = PartTimer(self.device)
        for owner, name, part in (
            (self.model.vqgan, "encode", "vq_encode"),
            (self.model.vqgan, "decode", "vq_decode"),
            (self.model.token_predictor, "sample_tokens", "predictor"),
            (self.model, "generate_mask_mlp_tokens", "encoder"),
            (self.model, "forward_online_encoder", "encoder"),
            (self.model, "forward_decoder", "decoder"),
            (self.optimizer, "step", "optimizer"),
        ):
            self.parts.wrap(owner, name, part)

    def images(self) -> Tensor:
        """Return random images Float[batch,3,256,256] in [0,1]."""
        return torch.rand(self.batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=self.device)

    def train(self, ratio: float) -> dict[str, float]:
        """Run one step of the training loop with the mask ratio nearest to `ratio`; return the seconds of each part."""
        index = (self.model.mask_ratios - ratio).abs().argmin().reshape(1)
        self.model.mask_ratio_generator = SimpleNamespace(sample=lambda shape: index)
        random.seed(0)

        class TimedScaler:
            state_dict = self.scaler.state_dict

            def __call__(scaler, *args: Any, **kwargs: Any) -> Tensor:
                with self.parts("backward"):
                    return self.scaler(*args, **kwargs)

        with tempfile.TemporaryDirectory() as self.args.output_dir, self.parts("whole"):
            self.pretraining.train_one_epoch(
                self.model, [(self.images(),)], self.optimizer, self.device, 0, TimedScaler(), args=self.args
            )
        return self.parts.take()

    def sample(self, steps: int) -> dict[str, float]:
        """Generate one batch, which the authors' loop does in float32; return the seconds of each part."""
        self.args.num_iteration = steps
        wrapped = SimpleNamespace(module=self.model, eval=self.model.eval)
        with self.parts("whole"):
            self.generation.masked_generate_multi_step_addp(
                wrapped, [(self.images(), None, None)], self.device, self.args
            )
        return self.parts.take()

    def memory(self) -> dict[str, int]:
        """Return the peak memory in bytes since the last call."""
        answer = {"bytes": peak_memory(self.device)}
        reset_peak_memory(self.device)
        return answer


def replace_missing_modules() -> None:
    """Register replacements of the few functions that the clone uses of packages that are not installed."""

    class Section(dict):
        __getattr__ = dict.__getitem__

    def read(path: str) -> Section:
        def sections(value: Any) -> Any:
            return Section((key, sections(inner)) for key, inner in value.items()) if isinstance(value, dict) else value

        return sections(yaml.safe_load(Path(path).read_text()))

    def rearrange(x: Tensor, pattern: str) -> Tensor:
        before, after = (side.split() for side in pattern.split("->"))
        return x.permute([before.index(axis) for axis in after])

    replacements: dict[str, dict[str, Any]] = {
        "pytorch_lightning": {"LightningModule": nn.Module},
        "omegaconf": {"OmegaConf": SimpleNamespace(load=read)},
        "einops": {"rearrange": rearrange},
        "cv2": {},
    }
    for name, content in replacements.items():
        if importlib.util.find_spec(name) is None:
            module = ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # packages look for optional ones by find_spec
            module.__dict__.update(content)
            sys.modules[name] = module


def run_without_cuda() -> None:
    """Let code that moves tensors to CUDA and synchronizes with it run on the CPU."""
    setattr(Tensor, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010 (replaces a method)
    setattr(torch.cuda, "synchronize", lambda *args, **kwargs: None)  # noqa: B010


def main() -> None:
    """Answer requests from stdin until it is closed."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(**json.loads(sys.argv[1]))
    answers.write("{}\n")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(getattr(worker, request.pop("do"))(**request)) + "\n")


if __name__ == "__main__":
    main()
