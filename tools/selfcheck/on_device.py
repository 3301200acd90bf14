"""The checks that compute on the device: `python -m tools.selfcheck.on_device <check> <device> <file.json>`.

Each runs in a process of its own, because a fault of a device can end a process, and writes its outcome to the file.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addp_core.base.cpu import cpu_name
from addp_core.base.rng import generator
from addp_core.method.addp import ADDP
from addp_core.method.sampler import inpaint, sample
from addp_core.training.compute import accelerate_model, autocast
from addp_core.training.optimization import make_optimizer
from addp_core.training.stage import TrainConfig
from addp_core.training.timing import peak_memory, used_memory
from tools.selfcheck.networks import (
    golden_network,
    images_for,
    inputs_for,
    outputs,
    read_golden,
    sampled,
    wide_network,
)
from tools.selfcheck.outcome import Outcome

FP32_LIMIT = 1e-3  # largest error in standard deviations, or relative error of the loss and of gradients
LOW_PRECISION_LIMIT = 0.2  # root mean square error, in the same units
RELATIVE = ("loss", "gradients")
SETTLED_STEP, LAST_STEP = 10, 40  # memory is compared after these steps
MAX_GROWTH = {"cuda": 0, "cpu": 64 * 2**20}  # bytes between them; on a CPU it is that of the whole process
Errors = dict[str, dict[str, float]]


def parity(device: torch.device) -> Outcome:
    """Compare the tiny network in float32 with its golden numbers."""
    inputs, golden = read_golden()
    model = _on_device(golden_network(), device)
    with autocast("fp32", device):
        found = outputs(model, inputs.to(device, torch.float32)) | {"sample": sampled(model)}
    return _fp32_outcome(compare(found, golden), "the golden numbers")


def float64(device: torch.device) -> Outcome:
    """Compare a network of published widths in float32 with the same one in float64 on the CPU."""
    model = wide_network().double()
    inputs = inputs_for(model)
    expected = outputs(model, inputs)
    model = _on_device(model.float(), device)
    with autocast("fp32", device):
        found = outputs(model, inputs.to(device, torch.float32))
    return _fp32_outcome(compare(found, expected), "float64 on the CPU")


def precision(device: torch.device) -> Outcome:
    """Measure the distance of bf16 and fp16 from the golden numbers."""
    inputs, golden = read_golden()
    values, notes, failed = {}, [], False
    for name in ("bf16", "fp16"):
        if name == "fp16" and device.type == "cpu":
            notes.append("fp16 needs a GPU")
            continue
        model = _on_device(golden_network(), device)
        with autocast(name, device):
            values[name] = errors = compare(outputs(model, inputs.to(device, torch.float32)), golden)
        part, error = _worst(errors, "rms")
        changed = errors["ids"]["changed"]
        failed |= not error < LOW_PRECISION_LIMIT or changed > LOW_PRECISION_LIMIT
        notes.append(f"{name}: {error:.1e} of a standard deviation ({part}), {changed:.1%} of the ids change")
    return Outcome("failed" if failed else "ok", f"root mean square error of {'; '.join(notes)}", values)


def sampling(device: torch.device) -> Outcome:
    """Generate and inpaint: finite, a function of the seed, independent of the batch, nothing outside the hole."""
    model = _on_device(golden_network(), device)
    with autocast("fp32", device):
        images, again, single = (sample(model, 4, steps=5, seed=1, batch=batch) for batch in (4, 4, 1))
        pixels = images_for(model).to(device)
        hole = torch.zeros_like(pixels[:, 0], dtype=torch.bool)
        hole[:, 8:24, 4:20] = True
        filled = inpaint(model, pixels, hole, steps=5)
    outside = (~hole).unsqueeze(1).expand_as(pixels)
    faults = {
        "images are not finite": not (images.isfinite().all() and filled.isfinite().all()),
        "the same seed gives other images": not torch.equal(images, again),
        "an image depends on the others of its batch": (images - single).abs().max().item() > FP32_LIMIT,
        "inpainting changes pixels outside the hole": not torch.equal(filled[outside], pixels[outside]),
    }
    found = [fault for fault, is_there in faults.items() if is_there]
    return Outcome("failed" if found else "ok", "; ".join(found) or "5 steps: the same images for the same seed", {})


def memory(device: torch.device) -> Outcome:
    """Train for some steps: what is in use must not grow."""
    model = _on_device(golden_network(), device)
    optimizer = make_optimizer(model.denoiser, TrainConfig(lr=1e-4))
    used: dict[int, int] = {}
    images = images_for(model, 8).to(device)
    for step in range(1, LAST_STEP + 1):
        model.train()(images, generator(step))["loss"].backward()
        nn.utils.clip_grad_norm_(model.denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in (SETTLED_STEP, LAST_STEP):
            used[step] = used_memory(device)
    growth = used[LAST_STEP] - used[SETTLED_STEP]
    values: dict[str, Any] = {"used_bytes": used, "peak_bytes": peak_memory(device), "growth_bytes": growth}
    note = f"{growth / 2**20:+.1f} MiB between steps {SETTLED_STEP} and {LAST_STEP} of a training"
    if device.type == "cuda":
        values["free_bytes"], values["total_bytes"] = torch.cuda.mem_get_info(device)
        note += f"; {values['free_bytes'] / 2**30:.1f} of {values['total_bytes'] / 2**30:.1f} GiB are free"
    return Outcome("failed" if growth > MAX_GROWTH[device.type] else "ok", note, values)


CHECKS: dict[str, Callable[[torch.device], Outcome]] = {
    "parity": parity,
    "float64": float64,
    "precision": precision,
    "sampling": sampling,
    "memory": memory,
}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Errors:
    """Return the largest and the root mean square error of everything found, and the share of `ids` that differ.

    The unit is the standard deviation of the output; errors of the loss and of gradients are relative. An output that
    is not finite has infinite errors.
    """
    errors: Errors = {}
    for name, result in found.items():
        value = expected[name]
        if name == "ids":
            errors[name] = {"changed": (result != value).double().mean().item()}
            continue
        unit = value.double().abs() if name in RELATIVE else value.double().std()
        error = ((result.double() - value.double()) / unit).abs().nan_to_num(math.inf, math.inf)
        errors[name] = {"max": error.max().item(), "rms": error.square().mean().sqrt().item()}
    return errors


def _fp32_outcome(errors: Errors, reference: str) -> Outcome:
    part, error = _worst(errors, "max")
    changed = errors["ids"]["changed"]
    failed = not error < FP32_LIMIT or changed > 0
    note = f"largest error against {reference}: {error:.1e} of a standard deviation ({part}), limit {FP32_LIMIT:.0e}"
    note += f"; {changed:.1%} of the ids differ" if changed else "; ids are equal"
    return Outcome("failed" if failed else "ok", note, {"errors": errors})


def _worst(errors: Errors, kind: str) -> tuple[str, float]:
    """Return the output with the largest error of this kind, and the error."""
    return max(((name, error[kind]) for name, error in errors.items() if kind in error), key=lambda pair: pair[1])


def _on_device(model: ADDP, device: torch.device) -> ADDP:
    """Move a network to the device with the fast paths that all commands use."""
    model.to(device)
    for part in (model.tokenizer, model.predictor, model.denoiser):
        assert part is not None
        accelerate_model(part)
    return model


# -------------------- what the training runs of other checks read


def write_training_files(folder: Path) -> None:
    """Write the tiny network as `network.safetensors` and images as PNG files into `images`."""
    from torchvision.transforms.functional import to_pil_image

    from addp_core.weights.saving import save_model

    (folder / "images").mkdir(parents=True)
    model = golden_network()
    save_model(model, folder / "network.safetensors")
    for index, image in enumerate(images_for(model, 32)):
        to_pil_image(image).save(folder / "images" / f"{index:02}.png")


def main(name: str, device: torch.device, path: Path) -> None:
    """Run one check and write its outcome."""
    outcome = CHECKS[name](device)
    outcome.values["hardware"] = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    path.write_text(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    if sys.argv[1] == "files":
        write_training_files(Path(sys.argv[2]))
    else:
        main(sys.argv[1], torch.device(sys.argv[2]), Path(sys.argv[3]))
