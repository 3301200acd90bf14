"""The authors' own code, timed unchanged, for `addp throughput published=<clone>`.

`Clone` is our end. The clone itself is imported only by a worker process (`python -m tools.speed.published`) whose
Python is bent a little to run it on a CPU or without its further dependencies: `.cuda()` and `torch.cuda.synchronize()`
do nothing there, and the little that it uses of modules that are not installed is replaced. Weights are random.

The worker reads one JSON request a line, `{"do": "train", "ratio": 0.7}`, `{"do": "sample", "steps": 20}` or
`{"do": "memory"}`, and writes one JSON answer a line. All that the clone prints goes to standard error.
"""

import importlib
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
from addp_core.training.timing import Parts, peak_memory, reset_peak_memory

MODELS = {  # size: (their ADDP, their token predictor)
    "base": ("addp_vit_base_patch16", "mage_vit_base_patch16"),
    "large": ("addp_vit_large_patch16", "mage_vit_large_patch16"),
}
IMAGE_SIZE = 256  # the only one that they know
OPTIONS = {  # of their pretraining and generation scripts, as the published commands set them
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


class Clone:
    """The worker, seen from outside. It rests while it is not asked."""

    def __init__(self, clone: str, size: str, batch: int, device: torch.device, precision: str):
        """UserError where `clone` is not the authors' repository, or cannot be run here."""
        self.path = Path(clone).resolve()
        if not ((self.path / "engine_pretrain.py").is_file() and (self.path / "modeling").is_dir()):
            raise UserError(
                f"published: {clone} does not look like the authors' repository; expected a clone of ChangyaoTian/ADDP"
            )
        precision = precision if device.type == "cuda" else "fp32"  # their autocast is CUDA's
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
        self._answer()

    def train(self, ratio: float) -> dict[str, float]:
        """Seconds of a training step of their loop: of each part, and of the `whole`."""
        return self._ask(do="train", ratio=ratio)

    def sample(self, steps: int) -> dict[str, float]:
        """Seconds of a batch of their generation loop."""
        return self._ask(do="sample", steps=steps)

    def peak_memory(self) -> int:
        """Bytes since the last call."""
        return self._ask(do="memory")["bytes"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.messages.unlink(missing_ok=True)

    def _ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            last = (self.messages.read_text().strip().splitlines() or ["no message"])[-1]
            self.close()
            raise UserError(f"published: the code in {self.path} does not run here: {last}")
        return json.loads(line)


class Published:
    """Their model, optimizer and loops, in the worker; on random weights and images."""

    def __init__(self, path: str, size: str, batch: int, device: str, precision: str):
        self.device, self.batch = torch.device(device), batch
        sys.path.insert(0, path)
        os.chdir(path)  # they open ./configs/... themselves
        stand_in_for_missing_modules()
        if self.device.type == "cpu":
            run_without_cuda()
        self.pretraining, self.generation = map(importlib.import_module, ("engine_pretrain", "engine_generate"))
        self.generation.save_imgs = lambda *args, **kwargs: None
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
        self.parts = Parts(self.device)
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
        return torch.rand(self.batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=self.device)

    def train(self, ratio: float) -> dict[str, float]:
        """One step of their training loop, with the one of their mask ratios that is nearest to `ratio`."""
        index = (self.model.mask_ratios - ratio).abs().argmin().reshape(1)
        self.model.mask_ratio_generator = SimpleNamespace(sample=lambda shape: index)
        random.seed(0)

        def backward_and_step(*args: Any, **kwargs: Any) -> Tensor:
            with self.parts("backward"):
                return self.scaler(*args, **kwargs)

        backward_and_step.state_dict = self.scaler.state_dict
        with tempfile.TemporaryDirectory() as self.args.output_dir, self.parts("whole"):
            self.pretraining.train_one_epoch(
                self.model, [(self.images(),)], self.optimizer, self.device, 0, backward_and_step, args=self.args
            )
        return self.parts.take()

    def sample(self, steps: int) -> dict[str, float]:
        """One batch of their generation loop, which knows no mixed precision."""
        self.args.num_iteration = steps
        wrapped = SimpleNamespace(module=self.model, eval=self.model.eval)
        with self.parts("whole"):
            self.generation.masked_generate_multi_step_addp(
                wrapped, [(self.images(), None, None)], self.device, self.args
            )
        return self.parts.take()

    def memory(self) -> dict[str, int]:
        answer = {"bytes": peak_memory(self.device)}
        reset_peak_memory(self.device)
        return answer


def stand_in_for_missing_modules() -> None:
    """Register the little that the clone uses of packages that are not installed."""

    class Section(dict):
        __getattr__ = dict.__getitem__

    def read(path: str) -> Section:
        def sections(value: Any) -> Any:
            return Section((key, sections(inner)) for key, inner in value.items()) if isinstance(value, dict) else value

        return sections(yaml.safe_load(Path(path).read_text()))

    def rearrange(x: Tensor, pattern: str) -> Tensor:
        before, after = (side.split() for side in pattern.split("->"))
        return x.permute([before.index(axis) for axis in after])

    stand_ins = {
        "pytorch_lightning": {"LightningModule": nn.Module},
        "omegaconf": {"OmegaConf": SimpleNamespace(load=read)},
        "einops": {"rearrange": rearrange},
        "cv2": {},
    }
    for name, content in stand_ins.items():
        if importlib.util.find_spec(name) is None:
            module = ModuleType(name)
            module.__dict__.update(content)
            sys.modules[name] = module


def run_without_cuda() -> None:
    """Let code that moves tensors to CUDA and waits for it run on the CPU."""
    Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.synchronize = lambda *args, **kwargs: None


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Published(**json.loads(sys.argv[1]))
    answers.write("{}\n")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(getattr(worker, request.pop("do"))(**request)) + "\n")


if __name__ == "__main__":
    main()
